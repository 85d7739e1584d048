"""GRACE with PyG, with and without UnDiMix: one argument apart.

The training loop is PyG's, and so are the encoder (GCN) and the data. The default is Zachary's karate club, 34 people
in four communities, which need no download and are too few to tell losses apart. The score is a linear probe's: the
accuracy, on the test nodes, of a logistic regression on the embeddings of the labelled ones (in the karate club one of
each community, and all others to test).

    python examples/pyg_grace.py
    python examples/pyg_grace.py --data Cora --epochs 200
"""

from __future__ import annotations

import time

import torch
from compare import compare
from sklearn.linear_model import LogisticRegression
from torch_geometric import seed_everything
from torch_geometric.data import Data
from torch_geometric.datasets import KarateClub, Planetoid
from torch_geometric.nn import GCN
from torch_geometric.transforms import NormalizeFeatures
from tqdm import tqdm

from undimix_plugins import UnDiMix, Uniform
from undimix_pyg import GRACE, GRACELoss

DATA = ("KarateClub", "Cora", "CiteSeer", "PubMed")
HIDDEN = 128


def graph(data: str) -> Data:
    """The graph called `data`; all but the karate club are downloaded, as in PyG's examples."""
    if data == "KarateClub":
        return KarateClub()[0]
    return Planetoid("datasets/Planetoid", data, transform=NormalizeFeatures())[0]


@torch.no_grad()
def probe(model: GRACE, data: Data) -> float:
    """The accuracy of a linear classifier on the nodes' embeddings."""
    rows = torch.nn.functional.normalize(model.eval().embed(data), dim=1).numpy()
    labels, labelled = data.y.numpy(), data.train_mask.numpy()
    test = data.test_mask.numpy() if "test_mask" in data else ~labelled
    classifier = LogisticRegression(max_iter=1000).fit(rows[labelled], labels[labelled])
    return float(classifier.score(rows[test], labels[test]))


def train(
    weighted: bool,
    *,
    seed: int = 0,
    data: str = "KarateClub",
    epochs: int = 50,
    max_steps: int = -1,
    progress: bool = True,
) -> tuple[GRACE, float, float]:
    """Trains GRACE.

    Args:
        weighted: Whether the loss is UnDiMix's or plain.
        seed: Of the model and the views.
        data: The name of a graph whose nodes have features and classes, one of `DATA`.
        epochs: Steps, each on the whole graph; 0 leaves the model untrained.
        max_steps: Where to stop before that; -1 for nowhere.
        progress: Whether to show a progress bar.

    Returns:
        The model, the accuracy of a linear probe on its embeddings and the seconds of training.
    """
    nodes = graph(data)
    seed_everything(seed)
    encoder = GCN(nodes.num_features, HIDDEN, num_layers=2)
    model = GRACE(encoder, HIDDEN)
    criterion = GRACELoss(temperature=0.4, weighting=Uniform())
    if weighted:
        criterion = GRACELoss(temperature=0.4, weighting=UnDiMix())  # the one argument; it is the default, too
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0005, weight_decay=0.00001)

    start = time.perf_counter()
    for step in tqdm(range(epochs), disable=not progress):
        if step == max_steps:
            break
        model.train()
        optimizer.zero_grad()
        loss = criterion(*model(nodes))
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    return model, probe(model, nodes), seconds


def main() -> None:
    compare(
        str(__doc__),
        train,
        score="linear probe accuracy",
        plain="GRACELoss with Uniform()",
        weighted="GRACELoss with UnDiMix()",
        data=DATA,
        epochs=50,
    )


if __name__ == "__main__":
    main()
