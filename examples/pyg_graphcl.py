"""GraphCL with PyG, with and without UnDiMix: one argument apart.

The encoder (GIN), the data and the training loop are PyG's. The default data are MUTAG, 188 molecules that need no
download. The score is the literature's: the ten-fold accuracy of a support vector machine on the graphs' embeddings.

    python examples/pyg_graphcl.py
    python examples/pyg_graphcl.py --data PROTEINS --epochs 20
"""

from __future__ import annotations

import time

import torch
from torch_geometric import seed_everything
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GIN
from tqdm import tqdm

from _shared.compare import compare
from _shared.graphs import GRAPHS, graphs, svm_accuracy
from undimix_plugins import UnDiMix, Uniform
from undimix_pyg import GraphCL, GraphCLLoss

HIDDEN = 32


def train(
    weighted: bool,
    *,
    seed: int = 0,
    data: str = "MUTAG",
    epochs: int = 20,
    max_steps: int = -1,
    progress: bool = True,
) -> tuple[GraphCL, float, float]:
    """Trains GraphCL; returns the model, the accuracy of its embeddings and the seconds of training."""
    dataset = graphs(data)
    seed_everything(seed)
    encoder = GIN(dataset.num_features, HIDDEN, num_layers=3, norm="batch_norm")
    model = GraphCL(encoder, HIDDEN)
    criterion = GraphCLLoss(temperature=0.2, weighting=Uniform())
    if weighted:
        criterion = GraphCLLoss(temperature=0.2, weighting=UnDiMix())  # the one argument; it is the default, too
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loader = DataLoader(dataset, batch_size=64, shuffle=True)

    start = time.perf_counter()
    steps = 0
    for _ in tqdm(range(epochs), disable=not progress):
        model.train()
        for batch in loader:
            if steps == max_steps:
                break
            optimizer.zero_grad()
            loss = criterion(*model(batch))
            loss.backward()
            optimizer.step()
            steps += 1
    seconds = time.perf_counter() - start
    return model, svm_accuracy(model, dataset), seconds


def main() -> None:
    plain, method = "GraphCLLoss with Uniform()", "GraphCLLoss with UnDiMix()"
    compare(str(__doc__), train, score="SVM accuracy", plain=plain, method=method, data=GRAPHS)


if __name__ == "__main__":
    main()
