"""The linear probe on nodes: equal to plain loops and to the benchmarks' own, on GRACE's embeddings and by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.model_selection import StratifiedKFold
from torch_geometric import seed_everything
from torch_geometric.data import Data
from torch_geometric.nn import GCN
from torch_geometric.utils import stochastic_blockmodel_graph

from benchmarks.embeddings.graphs import probe
from undimix_pyg import GRACE, GRACELoss, evaluate_nodes

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4)


def nodes(seed: int, spread: float = 0.7) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Embeddings in 3 overlapping classes, and a split: 60 nodes to learn from, 60 to choose C on, 120 to score."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(240) % 3)
    x = rng.normal(size=(240, 5)) * spread + np.eye(3, 5)[y]
    place = rng.permutation(240)
    return x, y, {"train": place < 60, "val": (place >= 60) & (place < 120), "test": place >= 120}


def accuracy(x: Any, y: Any, train: Any, scored: Any, strength: float) -> float:
    """By hand: rows of length 1, scikit-learn's logistic regression."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    fitted = LogisticRegression(C=strength, max_iter=2000).fit(x[train], y[train])
    return float(accuracy_score(y[scored], fitted.predict(x[scored])))


@pytest.mark.parametrize("seed", range(4))
def test_validation_nodes_choose_the_strength(seed: int) -> None:
    x, y, split = nodes(seed)
    on_val = [accuracy(x, y, split["train"], split["val"], strength) for strength in STRENGTHS]
    best = STRENGTHS[int(np.argmax(on_val))]
    expected = accuracy(x, y, split["train"], split["test"], best)
    assert evaluate_nodes(x, y, **split) == pytest.approx(expected, abs=1e-12)
    assert 0.4 < expected < 0.95  # neither hopeless nor trivial
    assert len(set(on_val)) > 1


@pytest.mark.parametrize("seed", range(4))
def test_without_them_the_training_nodes_cross_validate_it(seed: int) -> None:
    x, y, split = nodes(seed)
    known, told = split["train"].nonzero()[0], split["test"].nonzero()[0]
    means = []
    for strength in STRENGTHS:
        parts = StratifiedKFold(5).split(x[known], y[known])
        means.append(np.mean([accuracy(x, y, known[a], known[b], strength) for a, b in parts]))
    expected = accuracy(x, y, known, told, STRENGTHS[int(np.argmax(means))])
    got = evaluate_nodes(x, y, train=split["train"], test=split["test"])
    assert got == pytest.approx(expected, abs=1e-12)
    assert got == probe(x, y, known, told)  # the benchmarks' tables


def test_test_labels_have_no_say() -> None:
    x, y, split = nodes(0)
    shuffled = y.copy()
    shuffled[split["test"]] = np.roll(shuffled[split["test"]], 1)
    chosen = [
        {"train": split["train"], "test": split["val"], "val": None},  # other nodes' score stays
        {"train": split["val"], "test": split["train"], "val": None},
    ]
    assert [evaluate_nodes(x, y, **of) for of in chosen] == [evaluate_nodes(x, shuffled, **of) for of in chosen]
    assert evaluate_nodes(x, shuffled, **split) < evaluate_nodes(x, y, **split)


def test_tensors_arrays_lists_and_any_labels_are_equally_good() -> None:
    x, y, split = nodes(0)
    rows = torch.as_tensor(x).bfloat16().requires_grad_()
    expected = evaluate_nodes(rows.detach().double().numpy(), y, **split)
    masks = {name: torch.as_tensor(mask) for name, mask in split.items()}
    assert evaluate_nodes(rows, torch.as_tensor(y), **masks) == expected
    names = np.array(["a", "b", "c"])[y]
    lists = {name: mask.tolist() for name, mask in split.items()}
    assert evaluate_nodes(rows.detach().double().tolist(), names, **lists) == expected


def test_lengths_of_embeddings_do_not_matter() -> None:
    x, y, split = nodes(0)
    lengths = np.random.default_rng(0).uniform(0.1, 10.0, size=(len(x), 1))
    assert evaluate_nodes(x * lengths, y, **split) == evaluate_nodes(x, y, **split)


def test_training_grace_raises_it() -> None:
    seed_everything(0)
    sizes, inside, across = [60, 60, 60], 0.15, 0.02
    chances = torch.full((3, 3), across).fill_diagonal_(inside)
    y = torch.arange(3).repeat_interleave(60)
    edge_index = stochastic_blockmodel_graph(sizes, chances)
    data = Data(x=torch.eye(3)[y] + 2.5 * torch.randn(180, 3), edge_index=edge_index, y=y)
    place = torch.randperm(180)
    masks = {"train": place < 30, "val": (place >= 30) & (place < 60), "test": place >= 60}
    model = GRACE(GCN(3, 32, num_layers=2), hidden_channels=32)
    criterion, optimizer = GRACELoss(temperature=0.5), torch.optim.Adam(model.parameters(), lr=0.01)
    raw = evaluate_nodes(data.x, data.y, **masks)
    for _ in range(30):
        optimizer.zero_grad()
        criterion(*model(data)).backward()
        optimizer.step()
    assert evaluate_nodes(model.eval().embed(data), data.y, **masks) > raw + 0.1


HALF = torch.arange(30) < 15
GOOD: dict[str, Any] = {
    "embeddings": torch.randn(30, 2, generator=torch.Generator().manual_seed(0)),
    "labels": torch.arange(30) % 2,
    "train": HALF,
    "test": ~HALF,
}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"embeddings": torch.zeros(30)}, r"^embeddings: expected shape \[nodes, width\], got \[30\]$"),
        ({"embeddings": torch.full((30, 2), torch.nan)}, r"^embeddings: expected finite values, got NaN or infinity$"),
        ({"embeddings": torch.full((30, 2), torch.inf)}, r"^embeddings: expected finite values, got NaN or infinity$"),
        ({"labels": torch.arange(29)}, r"^labels: expected shape \[30\], one class for each embedding, got \[29\]$"),
        ({"labels": torch.zeros(30, 4)}, r"^labels: expected shape \[30\], one class .* got \[30, 4\]$"),
        ({"labels": torch.zeros(30)}, r"^labels: expected at least 2 classes among the training nodes, got 1$"),
        ({"labels": HALF}, r"^labels: expected at least 2 classes among the training nodes, got 1$"),
        ({"train": torch.arange(15)}, r"^train: expected a mask of the nodes, bool \[30\], got int64 \[15\]$"),
        ({"test": torch.ones(29, dtype=torch.bool)}, r"^test: expected a mask .* bool \[30\], got bool \[29\]$"),
        ({"train": HALF[:, None].repeat(1, 20)}, r"^train: .* got bool \[30, 20\]; .* data\.train_mask\[:, 0\]$"),
        ({"val": HALF.float()}, r"^val: expected a mask of the nodes, bool \[30\], got float64 \[30\]$"),
        ({"test": torch.zeros(30, dtype=torch.bool)}, r"^test: expected a mask of at least one node, got none$"),
        ({"val": torch.zeros(30, dtype=torch.bool)}, r"^val: expected a mask of at least one node, got none$"),
        ({"test": torch.arange(30) >= 13}, r"^test: expected no node of train, got 2$"),
        ({"val": torch.arange(30) == 3}, r"^val: expected no node of train, got 1$"),
        ({"val": ~HALF}, r"^test: expected no node of val, got 15$"),
        (
            {"labels": torch.arange(30) > 10},
            r"^train: expected at least 5 nodes of each class, .* got 4 of class True;",
        ),
    ],
)
def test_bad_input(bad: dict[str, Any], message: str) -> None:
    assert 0 <= evaluate_nodes(**GOOD) <= 1
    with pytest.raises(ValueError, match=message):
        evaluate_nodes(**(GOOD | bad))
