"""GRACE with PyG, with and without UnDiMix: one argument apart.

The encoder (GCN), the data and the training loop are PyG's. The default data are Zachary's karate club, 34 people in
four communities. It needs no download and is too small to tell losses apart. The score is a linear probe's: the
accuracy on the test nodes of a logistic regression on the embeddings of the labelled nodes. In the karate club, one
member of each community is labelled, and all others are test nodes.

    python examples/pyg_grace.py
    python examples/pyg_grace.py --data Cora --epochs 200
"""

from __future__ import annotations

import time

import torch
from torch_geometric import seed_everything
from torch_geometric.nn import GCN
from tqdm import tqdm

from _shared.compare import compare
from _shared.graphs import NODES, nodes, probe_accuracy
from undimix_plugins import UnDiMix, Uniform
from undimix_pyg import GRACE, GRACELoss

HIDDEN = 128


def train(
    weighted: bool,
    *,
    seed: int = 0,
    data: str = "KarateClub",
    epochs: int = 50,
    max_steps: int = -1,
    progress: bool = True,
) -> tuple[GRACE, float, float]:
    """Trains GRACE; returns the model, the accuracy of a linear probe and the seconds of training.

    An epoch is one step on the whole graph.
    """
    graph = nodes(data)
    seed_everything(seed)
    encoder = GCN(graph.num_features, HIDDEN, num_layers=2)
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
        loss = criterion(*model(graph))
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    return model, probe_accuracy(model, graph), seconds


def main() -> None:
    plain, method = "GRACELoss with Uniform()", "GRACELoss with UnDiMix()"
    compare(str(__doc__), train, score="linear probe accuracy", plain=plain, method=method, data=NODES)


if __name__ == "__main__":
    main()
