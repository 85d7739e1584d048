"""MUTAG for the tests. A test that asks for it is skipped where grakel, which carries it, is not installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from torch_geometric.datasets import TUDataset

from examples._shared import graphs

WITHOUT_GRAKEL = "MUTAG comes with grakel, which has no release for Python 3.13"
needs_grakel = pytest.mark.skipif(find_spec("grakel") is None, reason=WITHOUT_GRAKEL)


def mutag() -> TUDataset:
    if find_spec("grakel") is None:
        pytest.skip(WITHOUT_GRAKEL)
    return graphs.mutag()
