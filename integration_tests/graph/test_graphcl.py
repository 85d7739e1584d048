"""GraphCL's model and evaluation with PyG's own encoders, loaders and the real MUTAG."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import SVC
from torch import Tensor, nn
from torch_geometric.data.batch import Batch
from torch_geometric.data.data import Data
from torch_geometric.loader.dataloader import DataLoader
from torch_geometric.nn import GCN, GIN, global_add_pool, global_max_pool, global_mean_pool
from torch_geometric.transforms import Constant

from integration_tests.molecules import mutag
from undimix_pyg import (
    AttributeMasking,
    EdgePerturbation,
    Evaluation,
    GraphCL,
    NodeDropping,
    RandomWalkSubgraph,
    evaluate_embedding,
)


def identity(data: Data) -> Data:
    return data


def molecules(count: int = 16) -> Any:
    return next(iter(DataLoader(mutag(), batch_size=count)))


def pooled_gin(gin: GIN) -> Callable[..., Tensor]:
    """An encoder that pools by itself."""

    def encode(x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        return global_add_pool(gin(x, edge_index), batch)

    return encode


@pytest.mark.parametrize("encoder", [GIN(7, 24, num_layers=3, norm="batch_norm"), GCN(7, 24, num_layers=2)])
@pytest.mark.parametrize("projection", [None, 8])
def test_shapes_and_gradients(encoder: nn.Module, projection: int | None) -> None:
    model = GraphCL(encoder, 24, projection)
    batch = molecules()
    z1, z2 = model(batch)
    assert z1.shape == z2.shape == (16, projection or 24)
    assert model.embed(batch).shape == (16, 24)
    model.zero_grad()
    (z1 * z2).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("pooling", [global_add_pool, global_mean_pool, global_max_pool])
def test_a_batch_is_its_graphs_one_by_one(pooling: Any) -> None:
    model = GraphCL(GIN(7, 24, num_layers=3), 24, 8, augmentations=[identity], pooling=pooling)
    batch = molecules()
    alone = [model.embed(data) for data in batch.to_data_list()]
    torch.testing.assert_close(model.embed(batch), torch.cat(alone))
    z1, z2 = model(batch)
    assert torch.equal(z1, z2)
    torch.testing.assert_close(z1, model.head(torch.cat(alone)))


def test_encoders_that_pool_themselves() -> None:
    gin = GIN(7, 24, num_layers=3)
    batch = molecules()
    torch.testing.assert_close(GraphCL(pooled_gin(gin), 24).embed(batch), GraphCL(gin, 24).embed(batch))


def test_as_many_nodes_as_graphs() -> None:
    gin = GIN(7, 24, num_layers=3)
    atoms = Batch.from_data_list([Data(x=torch.randn(1, 7), edge_index=torch.empty(2, 0, dtype=torch.long))] * 5)
    torch.testing.assert_close(GraphCL(pooled_gin(gin), 24).embed(atoms), GraphCL(gin, 24).embed(atoms))


def test_a_row_for_every_graph_whatever_its_place_and_size() -> None:
    bond = Data(x=torch.randn(2, 7), edge_index=torch.tensor([[0, 1], [1, 0]]))
    atom = Data(x=torch.randn(1, 7), edge_index=torch.empty(2, 0, dtype=torch.long))
    nothing = Data(x=torch.empty(0, 7), edge_index=torch.empty(2, 0, dtype=torch.long))
    model = GraphCL(GIN(7, 24, num_layers=3), 24, 8)
    for graphs in ([bond, atom], [atom, bond, atom], [bond, bond, nothing]):
        batch = Batch.from_data_list(graphs)
        assert model.embed(batch).shape == (len(graphs), 24)
        for augmentation in (NodeDropping(0.9), EdgePerturbation(0.9), AttributeMasking(0.9), RandomWalkSubgraph(0.9)):
            model.augmentations = (augmentation,)
            assert [z.shape for z in model(batch)] == [(len(graphs), 8)] * 2
    assert model.embed(bond).shape == (1, 24)
    assert [z.shape for z in model(bond)] == [(1, 8)] * 2


def test_views_are_drawn_independently_and_uniformly() -> None:
    drawn = []

    def recording(number: int) -> Callable[[Data], Data]:
        def augment(data: Data) -> Data:
            drawn.append(number)
            return data

        return augment

    model = GraphCL(GIN(7, 4, num_layers=1), 4, augmentations=[recording(i) for i in range(3)])
    batch = molecules(2)
    torch.manual_seed(0)
    for _ in range(900):
        model(batch)
    pairs = torch.bincount(torch.tensor(drawn[::2]) * 3 + torch.tensor(drawn[1::2]), minlength=9)
    # Each of 9 pairs is expected 100 times of 900, give or take five standard deviations of 9.4.
    assert pairs.sum() == 900
    assert ((pairs - 100).abs() < 47).all()


def test_views_differ_and_the_seed_reproduces_them() -> None:
    model = GraphCL(GIN(7, 24, num_layers=3), 24)
    batch = molecules()
    torch.manual_seed(3)
    z1, z2 = model(batch)
    torch.manual_seed(3)
    again1, again2 = model(batch)
    assert torch.equal(z1, again1)
    assert torch.equal(z2, again2)
    assert not torch.equal(z1, z2)


def test_embed_has_no_augmentation_and_no_head() -> None:
    gin = GIN(7, 24, num_layers=3)
    batch = molecules()
    expected = global_add_pool(gin(batch.x, batch.edge_index), batch.batch)
    torch.testing.assert_close(GraphCL(gin, 24).embed(batch), expected)


def test_graphs_without_features() -> None:
    edges = torch.tensor([[0, 1], [1, 0]])
    model = GraphCL(GIN(1, 8, num_layers=2), 8)
    for method in (model, model.embed):
        with pytest.raises(ValueError, match=r"^data\.x: expected node features, got None; .*Constant\(\) or OneHot"):
            method(Data(edge_index=edges, num_nodes=2))
    assert model.embed(Constant()(Data(edge_index=edges, num_nodes=2))).shape == (1, 8)


@pytest.mark.parametrize("rows", [1, 15, 17])
def test_encoders_with_the_wrong_number_of_rows(rows: int) -> None:
    model = GraphCL(lambda x, edge_index, batch: torch.zeros(rows, 24), 24)
    with pytest.raises(ValueError, match=rf"^encoder: .*16 graphs, 24 hidden_channels\], got \[{rows}, 24\]$"):
        model.embed(molecules())


def test_encoders_of_another_width_or_rank() -> None:
    batch = molecules()
    with pytest.raises(ValueError, match=r"^encoder: .*16 hidden_channels\], got \[\d+, 24\]$"):
        GraphCL(GIN(7, 24, num_layers=3), 16).embed(batch)
    with pytest.raises(ValueError, match=r"^encoder: .*24 hidden_channels\], got \[16\]$"):
        GraphCL(lambda x, edge_index, batch: torch.zeros(16), 24).embed(batch)


def test_bad_settings() -> None:
    gin = GIN(7, 24, num_layers=3)
    with pytest.raises(ValueError, match=r"^hidden_channels: expected an integer of at least 1, got 0$"):
        GraphCL(gin, 0)
    with pytest.raises(ValueError, match=r"^projection_channels: expected an integer of at least 1, got -1$"):
        GraphCL(gin, 24, -1)
    with pytest.raises(ValueError, match=r"^augmentations: expected at least one, got none$"):
        GraphCL(gin, 24, augmentations=())


def contrast(model: GraphCL, batch: Any) -> Tensor:
    """The cross-entropy of finding each graph's second view among those of the batch: ln(num_graphs) by guessing."""
    z1, z2 = (nn.functional.normalize(z, dim=1) for z in model(batch))
    return nn.functional.cross_entropy(z1 @ z2.T / 0.2, torch.arange(len(z1)))


def test_training_on_mutag_brings_views_of_a_graph_together() -> None:
    torch.manual_seed(0)
    dataset = mutag()
    everything = Batch.from_data_list(list(dataset))
    model = GraphCL(GIN(7, 32, num_layers=3, norm="batch_norm"), 32)

    def contrast_of_everything() -> float:
        torch.manual_seed(1)
        with torch.no_grad():
            return float(torch.stack([contrast(model, everything) for _ in range(20)]).mean())

    before = contrast_of_everything()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(8):
        for batch in DataLoader(dataset, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            contrast(model, batch).backward()
            optimizer.step()
    after = contrast_of_everything()
    assert after + 0.2 < before < np.log(len(dataset))

    model.eval()
    with torch.no_grad():
        embeddings = model.embed(everything)
    # Guessing the larger class, two thirds of MUTAG, is right for 0.665.
    assert evaluate_embedding(embeddings, dataset.y).accuracy > 0.75


def nested_by_hand(x: Any, y: Any, folds: int, seed: int) -> list[float]:
    """The protocol in plain loops: C is chosen without the held-out fold."""
    scores = []
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, y):
        inner = []
        for c in (1e-3, 1e-2, 1e-1, 1e0, 1e1, 1e2, 1e3):
            parts = StratifiedKFold(5).split(x[train], y[train])
            inner.append(
                np.mean([SVC(C=c).fit(x[train[a]], y[train[a]]).score(x[train[b]], y[train[b]]) for a, b in parts])
            )
        best = SVC(C=10.0 ** (int(np.argmax(inner)) - 3)).fit(x[train], y[train])
        scores.append(accuracy_score(y[test], best.predict(x[test])))
    return scores


@pytest.mark.parametrize(("folds", "seed"), [(10, 0), (10, 1), (4, 0)])
def test_evaluation_is_nested_cross_validation(folds: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, 120)
    x = rng.normal(size=(120, 4)) + 0.8 * np.eye(3, 4)[y]
    scores = nested_by_hand(x, y, folds, seed)
    evaluation = evaluate_embedding(x, y, folds=folds, seed=seed)
    assert evaluation == pytest.approx((np.mean(scores), np.std(scores)), abs=1e-12)
    assert 0 < evaluation.std < evaluation.accuracy < 1  # neither trivial nor hopeless


def test_the_grid_reaches_a_thousand() -> None:
    # A checkerboard without noise needs a large C.
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(150, 2))
    y = np.floor(3 * x).sum(axis=1).astype(int) % 2
    assert evaluate_embedding(x, y).accuracy == pytest.approx(np.mean(nested_by_hand(x, y, 10, 0)), abs=1e-12)


def test_tensors_arrays_and_any_labels_are_equally_good() -> None:
    torch.manual_seed(0)
    labels = torch.arange(60) % 2
    rows = (labels[:, None] + torch.randn(60, 3)).bfloat16().requires_grad_()
    expected = evaluate_embedding(rows.detach().double().numpy(), labels.numpy())
    assert isinstance(expected, Evaluation)
    assert evaluate_embedding(rows, labels) == expected
    assert evaluate_embedding(rows.detach().double().tolist(), np.where(labels == 1, "yes", "no")) == expected


@pytest.mark.parametrize(
    ("embeddings", "labels", "settings", "message"),
    [
        (torch.zeros(30), torch.arange(30) % 2, {}, r"^embeddings: expected shape \[graphs, width\], got \[30\]$"),
        (torch.zeros(30, 2), torch.arange(29) % 2, {}, r"^labels: expected shape \[30\], .* got \[29\]$"),
        (torch.zeros(30, 2), torch.zeros(30, 1), {}, r"^labels: expected shape \[30\], .* got \[30, 1\]$"),
        (torch.full((30, 2), torch.nan), torch.arange(30) % 2, {}, r"^embeddings: expected finite values"),
        (torch.full((30, 2), torch.inf), torch.arange(30) % 2, {}, r"^embeddings: expected finite values"),
        (torch.zeros(30, 2), torch.arange(30) % 2, {"folds": 1}, r"^folds: expected at least 2, got 1$"),
        (torch.zeros(30, 2), torch.zeros(30), {}, r"^labels: expected at least 2 classes, got 1$"),
        (torch.zeros(30, 2), torch.arange(30) > 20, {}, r"^labels: .* at least 10 members, .* got 9 of class True$"),
        (
            torch.zeros(30, 2),
            torch.arange(30) > 22,
            {"folds": 2},
            r"^labels: .* and 5 in every .* got 7 of class True$",
        ),
    ],
)
def test_bad_evaluations(embeddings: Tensor, labels: Tensor, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_embedding(embeddings, labels, **settings)
