"""What all tests share: what they skip in an old release of a toolkit, because it is not there, and new names there."""

import re
import sys
from collections.abc import Callable, Generator
from importlib import import_module
from importlib.metadata import version
from typing import Any

import pytest

# Modules of sentence-transformers, which have these names from 5.4 on.
MOVED = {
    "sentence_transformer": "",
    "sentence_transformer.losses": "losses",
    "sentence_transformer.modules": "models",
    "sentence_transformer.evaluation": "evaluation",
    "sentence_transformer.training_args": "training_args",
    "sparse_encoder.modules": "sparse_encoder.models",
}
# What the error of a test says that needs a part of a toolkit, and the release that this part came with.
CAME_WITH = [
    ("lightly", "1.5.21", "DCLW?Loss of lightly 1.5.21 or newer"),
    ("lightly", "1.5.23", "DirectCLRLoss"),
    ("sentence-transformers", "5.1", "gather_across_devices|contrast_anchors|contrast_positives"),
    (
        "sentence-transformers",
        "5.3",
        "CachedMultipleNegativesSymmetricRankingLoss of|directions|partition_mode|hardness_mode|hardness_strength",
    ),
    ("sentence-transformers", "5.7", "mini_batch_num_tokens"),
    ("sentence-transformers", "5.3", "CachedSpladeLoss"),
    ("sentence-transformers", "6.0", "multi_vector_encoder"),
]


def release(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:3]))


LACKS = [
    (f"{toolkit} {version(toolkit)} is older than {since}", text)
    for toolkit, since, text in CAME_WITH
    if release(version(toolkit)) < release(since)
]


@pytest.fixture
def needs() -> Callable[[str, str, str], None]:
    """A function of a toolkit, a release of it and what is wrong before: it skips the test there."""

    def skip(toolkit: str, since: str, before: str) -> None:
        if release(version(toolkit)) < release(since):
            pytest.skip(f"{toolkit} {version(toolkit)} is older than {since}: {before}")

    return skip


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Skips a test that a toolkit is too old for, by the error of it or of ours. `test_old_releases.py` has ours."""
    try:
        return (yield)
    except (AttributeError, ImportError, TypeError) as error:
        for reason, text in LACKS:
            if found := re.search(text, str(error)):
                pytest.skip(f"{reason}, which has {found[0]}")
        raise


if release(version("sentence-transformers")) < (5, 4):
    for now, before in MOVED.items():
        module = import_module(f"sentence_transformers.{before}".rstrip("."))
        sys.modules[f"sentence_transformers.{now}"] = module
        parent, _, name = now.rpartition(".")
        setattr(import_module(f"sentence_transformers.{parent}".rstrip(".")), name, module)
