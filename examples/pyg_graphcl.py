"""GraphCL with PyG, with and without UnDiMix: one argument apart.

The training loop is PyG's, and so are the encoder (GIN) and the data. The default is MUTAG, 188 molecules that need
no download. The score is the literature's: ten-fold accuracy of a support vector machine on the graphs' embeddings.

    python examples/pyg_graphcl.py
    python examples/pyg_graphcl.py --data PROTEINS --epochs 20
"""

from __future__ import annotations

import argparse
import time

import torch
from graphs import mutag
from torch_geometric import seed_everything
from torch_geometric.data import Dataset
from torch_geometric.datasets import TUDataset
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GIN
from tqdm import tqdm

from undimix_plugins import UnDiMix, Uniform
from undimix_pyg import Evaluation, GraphCL, GraphCLLoss, evaluate_embedding

HIDDEN = 32


def graphs(data: str) -> Dataset:
    """The TUDataset called `data`; all but MUTAG are downloaded, as in PyG's examples."""
    return mutag() if data == "MUTAG" else TUDataset("datasets/TUDataset", data, use_node_attr=True)


@torch.no_grad()
def embeddings(model: GraphCL, dataset: Dataset) -> torch.Tensor:
    """The model's representation of each graph [graphs, HIDDEN]."""
    model.eval()
    return torch.cat([model.embed(batch) for batch in DataLoader(dataset, batch_size=128)])


def train(
    weighted: bool,
    *,
    seed: int = 0,
    data: str = "MUTAG",
    epochs: int = 20,
    max_steps: int = -1,
    progress: bool = True,
) -> tuple[GraphCL, Evaluation, float]:
    """Trains GraphCL.

    Args:
        weighted: Whether the loss is UnDiMix's or plain.
        seed: Of the model, the order of the graphs and their views.
        data: The name of a TUDataset whose nodes have features.
        epochs: Passes over the graphs; 0 leaves the model untrained.
        max_steps: Where to stop before that; -1 for nowhere.
        progress: Whether to show a progress bar.

    Returns:
        The model, the accuracy of its embeddings and the seconds of training.
    """
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
    return model, evaluate_embedding(embeddings(model, dataset), dataset.y), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", default="MUTAG", help="a TUDataset; all but MUTAG are downloaded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps")
    options = vars(parser.parse_args())

    _, untrained, _ = train(False, **options | {"epochs": 0})
    _, plain, plain_seconds = train(False, **options)
    _, weighted, weighted_seconds = train(True, **options)
    print(f"SVM accuracy, untrained: {untrained.accuracy:.3f}")
    print(f"SVM accuracy, GraphCLLoss with Uniform(): {plain.accuracy:.3f} ({plain_seconds:.1f} s)")
    print(f"SVM accuracy, GraphCLLoss with UnDiMix(): {weighted.accuracy:.3f} ({weighted_seconds:.1f} s)")


if __name__ == "__main__":
    main()
