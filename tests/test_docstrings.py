"""Every example in a docstring runs as it stands there."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from types import ModuleType
from typing import Any

import pytest
import torch

import tests.quiet_imports  # noqa: F401
import undimix_plugins
from tests.releases import is_installed, is_older
from undimix_plugins import toolkit, weightings

ADAPTERS = (
    "undimix_lightly",
    "undimix_open_clip",
    "undimix_pytorch_metric_learning",
    "undimix_sentence_transformers",
    "undimix_pyg",
    "undimix_transformers",
    *(["undimix_stable_pretraining"] if is_installed("stable-pretraining") else []),
)
SINCE = {  # what a module's losses came with
    "undimix_lightly.directclr_loss": ("lightly", "1.5.23"),
    "undimix_sentence_transformers.multi_vector": ("sentence-transformers", "6.0"),
}


def modules_of(package: str) -> list[ModuleType]:
    path = importlib.import_module(package).__path__
    names = [package, *(found.name for found in pkgutil.walk_packages(path, f"{package}."))]
    return [importlib.import_module(name) for name in names if not (name in SINCE and is_older(*SINCE[name]))]


def names_for(module: ModuleType) -> dict[str, Any]:
    """What an example may use without importing it.

    That is torch, what a training script or an adapter imports of the core, and what its module defines.

    An adapter's examples may use its module's imports too: the toolkit's names are at hand to the toolkit's users.
    """
    own = {
        name: value
        for name, value in vars(module).items()
        if module.__name__.startswith(ADAPTERS) or getattr(value, "__module__", None) == module.__name__
    }
    public = {name: getattr(of, name) for of in (toolkit, undimix_plugins) for name in of.__all__}
    return {"torch": torch, **public, **own}


EXAMPLES = [
    test
    for package in ("undimix_plugins", *ADAPTERS)
    for module in modules_of(package)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, globs=names_for(module))
    if test.examples
]


@pytest.mark.parametrize("test", EXAMPLES, ids=lambda test: test.name)
def test_example(test: doctest.DocTest) -> None:
    torch.manual_seed(0)
    # An example whose result is not shown just has to run.
    try:  # the example's own error, by which conftest.py skips what an old release lacks
        doctest.DebugRunner(verbose=False).run(test)
    except doctest.UnexpectedException as error:
        raise error.exc_info[1] from None
    except doctest.DocTestFailure as failure:
        pytest.fail(f"{failure.example.source}expected {failure.example.want!r}, got {failure.got!r}")


UNDOCUMENTED = ("__version__", "ExcludedMask")  # a text, a type
PUBLIC = [
    (of, name) for of in (undimix_plugins, toolkit, weightings) for name in of.__all__ if name not in UNDOCUMENTED
]


@pytest.mark.parametrize(("of", "name"), PUBLIC, ids=lambda part: getattr(part, "__name__", part))
def test_public_names_are_documented(of: ModuleType, name: str) -> None:
    assert (getattr(of, name).__doc__ or "").strip()
