"""GraphCL with PyG, with and without UnDiMix: one argument apart.

The training loop is PyG's, and so are the encoder (GIN) and the data. The default is MUTAG, 188 molecules that need
no download. The score is the literature's: ten-fold accuracy of a support vector machine on the graphs' embeddings.

    python examples/pyg_graphcl.py
    python examples/pyg_graphcl.py --data PROTEINS --epochs 20
"""

from __future__ import annotations

import time

import torch
from compare import compare
from graphs import mutag
from torch_geometric import seed_everything
from torch_geometric.data import Dataset
from torch_geometric.datasets import TUDataset
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GIN
from tqdm import tqdm

from undimix_plugins import UnDiMix, Uniform
from undimix_pyg import GraphCL, GraphCLLoss, evaluate_embedding

DATA = ("MUTAG", "PROTEINS", "ENZYMES", "NCI1", "DD", "PTC_MR", "AIDS", "Mutagenicity")  # those with node features
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
) -> tuple[GraphCL, float, float]:
    """Trains GraphCL.

    Args:
        weighted: Whether the loss is UnDiMix's or plain.
        seed: Of the model, the order of the graphs and their views.
        data: The name of a TUDataset whose nodes have features, one of `DATA`.
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
    return model, evaluate_embedding(embeddings(model, dataset), dataset.y).accuracy, seconds


def main() -> None:
    compare(
        str(__doc__),
        train,
        score="SVM accuracy",
        plain="GraphCLLoss with Uniform()",
        weighted="GraphCLLoss with UnDiMix()",
        data=DATA,
        epochs=20,
    )


if __name__ == "__main__":
    main()
