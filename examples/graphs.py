"""Graphs for the examples, without a download."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from copy import copy
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from torch_geometric.datasets.tu_dataset import TUDataset


def mutag() -> TUDataset:
    """MUTAG, read from the raw files that the package `grakel` carries: a data set of one's own, to set a transform on.

    Returns:
        PyG's own TUDataset of 188 molecules, in memory: `x` the one-hot atom [nodes, 7], `edge_attr` the one-hot bond
        [edges, 4], both floats, `y` [1] whether mutagenic, 0 or 1.

    Raises:
        ModuleNotFoundError: Without grakel.

    References:
        Debnath et al., J. Med. Chem. 34, 1991; Morris et al.: TUDataset, arXiv 2007.08663.

    Examples:
        >>> mutag()
        MUTAG(188)
    """
    return copy(_mutag())


@cache
def _mutag() -> TUDataset:
    grakel = find_spec("grakel")
    if grakel is None or grakel.origin is None:
        raise ModuleNotFoundError("MUTAG's files come with grakel: pip install grakel")
    files = Path(grakel.origin).parent / "tests" / "data" / "MUTAG"
    with tempfile.TemporaryDirectory() as root:
        # TUDataset downloads only where the raw files are missing
        shutil.copytree(files, Path(root) / "MUTAG" / "raw")
        with contextlib.redirect_stderr(io.StringIO()):  # it says that it is processing
            return TUDataset(root, "MUTAG")
