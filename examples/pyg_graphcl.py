"""GraphCL with PyG, with and without UnDiMix: one line apart.

The encoder (GIN) and the training loop are PyG's. The default data are scikit-learn's handwritten digits as graphs: the
nodes are the pixels with ink. They need no download. The score is the accuracy of a linear probe: a logistic regression
on the graphs' embeddings, by ten-fold cross-validation.

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
from _shared.graphs import GRAPHS, cross_validated_accuracy, graphs
from undimix_plugins import Uniform, undimix
from undimix_pyg import GraphCL, GraphCLLoss

HIDDEN = 64


def train(
    weighted: bool,
    *,
    seed: int = 0,
    data: str = "digits",
    epochs: int = 5,
    max_steps: int = -1,
    progress: bool = True,
) -> tuple[GraphCL, float, float]:
    """Trains GraphCL; returns the model, the accuracy of its embeddings and the seconds of training."""
    dataset = graphs(data)
    seed_everything(seed)
    encoder = GIN(dataset.num_features, HIDDEN, num_layers=3, norm="batch_norm")
    model = GraphCL(encoder, HIDDEN)
    criterion = GraphCLLoss(weighting=Uniform())  # the plain loss; its temperature is .2
    if weighted:
        criterion = undimix(criterion)  # the one line
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    loader = DataLoader(dataset, batch_size=128, shuffle=True)

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
    return model, cross_validated_accuracy(model, dataset), seconds


def main() -> None:
    plain, method = "GraphCLLoss(weighting=Uniform())", "undimix(GraphCLLoss(weighting=Uniform()))"
    compare(str(__doc__), train, score="linear probe accuracy", plain=plain, method=method, data=GRAPHS)


if __name__ == "__main__":
    main()
