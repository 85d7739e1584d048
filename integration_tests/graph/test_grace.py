"""GRACE's model on real graphs of people: Zachary's karate club, and Les Misérables, whose edges have weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import elu
from torch_geometric import EdgeIndex
from torch_geometric.data.batch import Batch
from torch_geometric.data.data import Data
from torch_geometric.data.hetero_data import HeteroData
from torch_geometric.datasets import KarateClub
from torch_geometric.nn import GAT, GCN, GIN
from torch_geometric.transforms import OneHotDegree
from torch_geometric.utils import from_networkx

from undimix_pyg import GRACE

RATES = {"drop_edge_rate_1": 0.1, "drop_edge_rate_2": 0.3, "drop_feature_rate_1": 0.5, "drop_feature_rate_2": 0.7}


def karate() -> Data:
    return KarateClub()[0]


def les_miserables() -> Data:
    """Who meets whom, and how often."""
    data = from_networkx(nx.les_miserables_graph())
    data.edge_weight = data.pop("weight").float()
    return OneHotDegree(max_degree=40)(data)


class Recording:
    """An encoder that keeps what it is given, and gives the features back."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def __call__(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        self.calls.append((x, edge_index, edge_weight))
        return x


@pytest.mark.parametrize("make", [karate, les_miserables])
@pytest.mark.parametrize("encoder", [GIN, GCN, GAT])
def test_shapes_and_gradients(encoder: Callable[..., nn.Module], make: Callable[[], Data]) -> None:
    data = make()
    model = GRACE(encoder(data.num_features, 16, num_layers=2), 16)
    z1, z2 = model(data)
    assert z1.shape == z2.shape == model.embed(data).shape == (data.num_nodes, 16)
    (z1 * z2).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_head_is_linear_elu_linear() -> None:
    data, model = karate(), GRACE(GCN(34, 8, num_layers=2), 8, 0, 0, 0, 0)
    weight1, bias1, weight2, bias2 = model.head.parameters()
    expected = elu(model.embed(data) @ weight1.T + bias1) @ weight2.T + bias2
    for z in model(data):
        torch.testing.assert_close(z, expected)


def test_embed_has_no_corruption_and_no_head() -> None:
    data, gcn = les_miserables(), GCN(41, 8, num_layers=2)
    weighted = gcn(data.x, data.edge_index, edge_weight=data.edge_weight)
    torch.testing.assert_close(GRACE(gcn, 8).embed(data), weighted)
    assert not torch.allclose(gcn(data.x, data.edge_index), weighted)


def test_a_view_lacks_edges_and_features_at_its_rates() -> None:
    """Edges one by one, features for all nodes alike; the data stays as it was."""
    data, encoder = karate(), Recording()
    model, before = GRACE(encoder, 34, **RATES), data.clone()
    torch.manual_seed(0)
    for _ in range(300):
        model(data)
    every = [tuple(edge) for edge in data.edge_index.T.tolist()]
    for view, (edge_rate, feature_rate) in enumerate([(0.1, 0.5), (0.3, 0.7)]):
        kept, shown, torn = 0, 0, 0
        for x, edge_index, _ in encoder.calls[view::2]:
            edges = [tuple(edge) for edge in edge_index.T.tolist()]
            assert edges == [edge for edge in every if edge in set(edges)]
            torn += sum((j, i) not in edges for i, j in edges)
            columns = (x == data.x).all(dim=0)
            assert not x[:, ~columns].any()
            kept, shown = kept + len(edges), shown + int(columns.sum())
        assert torn > 0  # the two directions of an edge do not go together
        for count, number, rate in ((kept, len(every), edge_rate), (shown, 34, feature_rate)):
            total, deviation = 300 * number, (300 * number * rate * (1 - rate)) ** 0.5
            assert abs(count - total * (1 - rate)) < 5 * deviation
    for key in ("x", "edge_index"):
        assert torch.equal(data[key], before[key])


def test_edge_weights_stay_with_their_edges() -> None:
    data, encoder = les_miserables(), Recording()
    model = GRACE(encoder, 41)
    model(data)
    model.embed(data)
    weights = {tuple(edge): weight for edge, weight in zip(data.edge_index.T.tolist(), data.edge_weight, strict=True)}
    assert len(set(data.edge_weight.tolist())) > 10
    for _, edge_index, edge_weight in encoder.calls:
        assert edge_weight is not None
        assert edge_weight.tolist() == [weights[tuple(edge)] for edge in edge_index.T.tolist()]
    assert encoder.calls[0][1].size(1) < encoder.calls[2][1].size(1) == data.num_edges


def test_views_differ_and_the_seed_reproduces_them() -> None:
    data, model = karate(), GRACE(GCN(34, 8, num_layers=2), 8)
    views = []
    for _ in range(2):
        torch.manual_seed(3)
        views.append(model(data))
    assert torch.equal(views[0][0], views[1][0])
    assert torch.equal(views[0][1], views[1][1])
    assert not torch.equal(*views[0])


def test_graphs_of_any_size_and_batches() -> None:
    gin = GIN(34, 8, num_layers=2)
    one = Data(x=torch.randn(1, 34), edge_index=torch.empty(2, 0, dtype=torch.long))
    two = Data(x=torch.randn(2, 34))
    club = Data(x=karate().x, edge_index=karate().edge_index)
    batch = Batch.from_data_list([club, one, club])
    for data in (one, two, club, batch):
        z1, z2 = GRACE(gin, 8)(data)
        assert z1.shape == z2.shape == (data.num_nodes, 8)
    alone = [GRACE(gin, 8).embed(data) for data in batch.to_data_list()]
    torch.testing.assert_close(GRACE(gin, 8).embed(batch), torch.cat(alone))


def test_edge_index_with_metadata() -> None:
    data, gcn = karate(), GCN(34, 8, num_layers=2)
    expected = GRACE(gcn, 8).embed(data)
    data.edge_index = EdgeIndex(data.edge_index, sparse_size=(34, 34))
    torch.testing.assert_close(GRACE(gcn, 8).embed(data), expected)
    assert GRACE(gcn, 8)(data)[0].shape == (34, 8)


def test_graphs_without_features() -> None:
    data = from_networkx(nx.les_miserables_graph())
    model = GRACE(GCN(41, 8, num_layers=2), 8)
    for method in (model, model.embed):
        with pytest.raises(ValueError, match=r"^data\.x: expected node features, got None; .*Constant\(\) or OneHot"):
            method(data)
    assert model.embed(OneHotDegree(max_degree=40)(data)).shape == (77, 8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Data(x=torch.eye(3), adj_t=torch.eye(3).to_sparse()), r"^data: expected edges as edge_index .* sparse adj_t$"),
        (HeteroData(), r"^data: expected a Data or a Batch of them, got HeteroData$"),
    ],
)
def test_other_data(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRACE(GCN(34, 8, num_layers=2), 8)(data)


@pytest.mark.parametrize("shape", [(33, 8), (34, 9), (34,), (1, 34, 8)])
def test_encoders_with_another_shape(shape: tuple[int, ...]) -> None:
    model = GRACE(lambda x, edge_index: torch.zeros(shape), 8)
    with pytest.raises(ValueError, match=r"^encoder: .* \[34 nodes, 8 hidden_channels\], got \["):
        model(karate())


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match=r"^hidden_channels: expected an integer of at least 1, got 0$"):
        GRACE(GCN(34, 8, num_layers=2), 0)
    for name in RATES:
        for rate in (-0.1, 1.0, float("nan")):
            with pytest.raises(ValueError, match=rf"^{name}: expected a finite number at least 0 and below 1, got"):
                GRACE(GCN(34, 8, num_layers=2), 8, **{name: rate})
