"""What is not there in an old release of a toolkit is skipped."""

import os
from collections.abc import Generator
from typing import Any

import pytest

import integration_tests  # noqa: F401  # sentence-transformers' modules by their present names
from tests.releases import skip_for


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Each test trains in its own precision, which an old transformers leaves behind for the next training."""
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Skips a test whose error, a toolkit's or ours, names what came later. `test_old_releases.py` tests ours."""
    try:
        return (yield)
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        skip_for(error)
        raise
