"""What edges have, weights, features or types, reaches encoders that take it, in every view of all three models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data.batch import Batch
from torch_geometric.data.data import Data
from torch_geometric.nn import GAT, GCN, GIN, PNA, GATv2Conv, GINConv, GINEConv, GPSConv, RGCNConv

from undimix_pyg import GRACE, AttributeMasking, EdgePerturbation, GraphCL, InfoGraph, NodeDropping, RandomWalkSubgraph

MODELS: list[Callable[..., Any]] = [GraphCL, InfoGraph, GRACE]
each_model = pytest.mark.parametrize("model", MODELS)


def batch() -> Any:
    """Graphs whose edges' weight and features say between which of the batch's nodes they are; `pos` numbers these."""
    torch.manual_seed(0)
    path = torch.tensor([[0, 1, 1, 2, 2, 3, 3, 4], [1, 0, 2, 1, 3, 2, 4, 3]])
    graphs = [Data(x=torch.randn(5, 7), edge_index=path, edge_type=torch.randint(3, (8,))) for _ in range(6)]
    data: Any = Batch.from_data_list(graphs)
    data.pos = torch.arange(30)
    low, high = data.edge_index.sort(dim=0).values
    data.edge_weight = (low * 100 + high) / 1000
    data.edge_attr = torch.stack([low, high], dim=1) / 10
    return data


class OfFeatures(nn.Module):
    """An encoder of one's own; GINE's layer cannot do without features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = GINEConv(nn.Linear(7, 8), edge_dim=2)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor | None = None, **_: Any) -> Tensor:
        return self.conv(x, edge_index, edge_attr)


class OfTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = RGCNConv(7, 8, num_relations=3)

    def forward(self, x: Tensor, edge_index: Tensor, edge_type: Tensor, batch: Tensor | None = None) -> Tensor:
        return self.conv(x, edge_index, edge_type)


class OfNone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(7, 8)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None) -> Tensor:
        return self.lin(x)


def pna(**settings: Any) -> PNA:
    return PNA(7, 8, 2, aggregators=["sum"], scalers=["identity"], deg=torch.tensor([0, 2, 3]), **settings)


def outputs(model: nn.Module, data: Any) -> list[Tensor]:
    """Of two views where the model makes some, and of the data as they are; the same views at each call."""
    torch.manual_seed(1)
    return [*model(data.clone())[:2], model.embed(data.clone())]


@each_model
@pytest.mark.parametrize(
    ("encoder", "name"),
    [
        (GCN(7, 8, 2), "edge_weight"),
        (GAT(7, 8, 2, edge_dim=2), "edge_attr"),
        (pna(edge_dim=2), "edge_attr"),
        (OfFeatures(), "edge_attr"),
        (torch.compile(OfFeatures(), backend="eager"), "edge_attr"),
        (OfTypes(), "edge_type"),
    ],
    ids=["GCN", "GAT", "PNA", "GINE", "compiled", "RGCN"],
)
def test_it_reaches_the_encoder(model: Callable[..., Any], encoder: nn.Module, name: str) -> None:
    """What it is makes a difference, as that to the encoder itself; and all gradients are there."""
    graphs, made, before = model(encoder, 8), batch(), batch()
    if name != "edge_weight":
        del made.edge_weight, before.edge_weight
    made[name] = made[name] * 100 if name != "edge_type" else 2 - made[name]
    for one, other in zip(outputs(graphs, made), outputs(graphs, before), strict=True):
        assert not torch.allclose(one, other)
    h = encoder(before.x, before.edge_index, **{name: before[name]})
    if model is not GRACE:
        h = h.view(6, 5, 8).sum(dim=1)
    torch.testing.assert_close(graphs.embed(before), h)


@each_model
@pytest.mark.parametrize(
    "encoder", [GIN(7, 8, 2), GAT(7, 8, 2, v2=True), pna(), OfNone()], ids=["GIN", "GATv2", "PNA", "own"]
)
def test_features_that_an_encoder_does_not_take(model: Callable[..., Any], encoder: nn.Module) -> None:
    """Data sets have them, and many encoders do without: PyG's own say by their layers whether they do."""
    graphs, data, without = model(encoder, 8), batch(), batch()
    del data.edge_weight, without.edge_weight, without.edge_attr, without.edge_type
    for one, other in zip(outputs(graphs, data), outputs(graphs, without), strict=True):
        assert torch.equal(one, other)


@each_model
def test_weights_that_an_encoder_does_not_take_are_told(model: Callable[..., Any]) -> None:
    with pytest.warns(UserWarning, match=r"data.edge_weight: the encoder takes no weights of edges"):
        model(GIN(7, 8, 2), 8).embed(batch())


@each_model
@pytest.mark.parametrize(
    ("encoder", "name"),
    [(OfFeatures(), "edge_attr"), (OfTypes(), "edge_type"), (pna(edge_dim=2), "edge_attr")],
    ids=["GINE", "RGCN", "PNA"],
)
def test_an_encoder_that_needs_what_there_is_not(model: Callable[..., Any], encoder: nn.Module, name: str) -> None:
    graphs, data = model(encoder, 8), batch()
    del data.edge_weight, data[name]
    for call in (graphs, graphs.embed):
        with pytest.raises(ValueError, match=rf"^data.*{name}: expected a row for each edge, which the encoder \("):
            call(data.clone())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # another fault is not put down to that
        model(GCN(9, 8, 2), 8)(data)


class Faulty(nn.Module):
    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None, **_: Any) -> Tensor:
        return None.foo  # type: ignore[attr-defined,no-any-return]


class FaultyWithAny(nn.Module):
    def forward(self, x: Tensor, edge_index: Tensor, **_: Any) -> Tensor:
        return None.foo  # type: ignore[attr-defined,no-any-return]


@each_model
@pytest.mark.parametrize(("encoder", "noted"), [(Faulty(), True), (FaultyWithAny(), False)], ids=["weights", "any"])
def test_an_encoders_own_error_is_not_put_down_to_the_data(
    model: Callable[..., Any], encoder: nn.Module, noted: bool
) -> None:
    data = batch()
    del data.edge_weight, data.edge_attr, data.edge_type
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'foo'") as caught:
        model(encoder, 8).embed(data)
    note = "The data have no edge_weight, which the encoder takes: it may need them."
    has_notes = hasattr(caught.value, "add_note")  # not in Python 3.10
    assert getattr(caught.value, "__notes__", []) == ([note] if has_notes and (noted or model is GRACE) else [])


def through(encoder: nn.Module) -> Callable[..., Tensor]:
    return lambda x, edge_index, **further: encoder(x, edge_index, **further)


def around(layer: nn.Module) -> nn.Module:
    return GPSConv(7, layer, heads=1).eval()


@each_model
@pytest.mark.parametrize(
    "encoder",
    [around(GINConv(nn.Linear(7, 7))), through(around(GINConv(nn.Linear(7, 7)))), around(GATv2Conv(7, 7))],
    ids=["GIN", "any keyword", "GATv2"],
)
def test_what_may_know_no_features_is_not_given_them(model: Callable[..., Any], encoder: Callable[..., Tensor]) -> None:
    """A training that works goes on to do so where the data have more."""
    data, without, graphs = batch(), batch(), model(encoder, 7)
    del data.edge_weight, without.edge_weight, without.edge_attr, without.edge_type
    assert torch.equal(graphs.embed(data), graphs.embed(without))


@each_model
def test_what_is_around_a_layer_takes_what_it_takes(model: Callable[..., Any]) -> None:
    data, graphs = batch(), model(around(GINEConv(nn.Linear(7, 7), edge_dim=2)), 7)
    del data.edge_weight
    before = graphs.embed(data)
    data.edge_attr = data.edge_attr * 100
    assert not torch.allclose(graphs.embed(data), before)
    del data.edge_attr
    with pytest.raises(ValueError, match=r"^data.edge_attr: expected a row for each edge, which the encoder \(GPSConv"):
        graphs.embed(data)


def test_grace_gives_weights_by_any_keyword() -> None:
    """As it always has."""
    data, gcn = batch(), GCN(7, 8, 2)
    h = GRACE(through(gcn), 8).embed(data)
    torch.testing.assert_close(h, gcn(data.x, data.edge_index, data.edge_weight))


@each_model
def test_rows_that_are_no_edges_are_refused(model: Callable[..., Any]) -> None:
    data = batch()
    data.edge_weight = data.edge_weight[1:]
    with pytest.raises(ValueError, match=r"data.edge_weight: expected a row for each of 48 edges, got shape \[47\]"):
        model(GCN(7, 8, 2), 8).embed(data)


class Recording(nn.Module):
    """Keeps what it is given by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Tensor]] = []

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_weight: Tensor,
        edge_attr: Tensor,
        edge_type: Tensor,
        batch: Tensor | None = None,
    ) -> Tensor:
        of_edges = {"edge_weight": edge_weight, "edge_attr": edge_attr, "edge_type": edge_type}
        self.calls.append({"edge_index": edge_index, **of_edges})
        return x


@pytest.mark.parametrize(
    "augmentation",
    [NodeDropping(0.4), EdgePerturbation(0.4), AttributeMasking(0.4), RandomWalkSubgraph(0.4), None],
    ids=["NodeDropping", "EdgePerturbation", "AttributeMasking", "RandomWalkSubgraph", "GRACE"],
)
def test_edges_that_stay_keep_what_is_theirs(augmentation: Callable[[Any], Any] | None) -> None:
    data, encoder, views = batch(), Recording(), []

    def view(graphs: Any) -> Any:
        assert augmentation is not None
        views.append(augmentation(graphs.clone()))
        return views[-1]

    model = GRACE(encoder, 7) if augmentation is None else GraphCL(encoder, 7, augmentations=[view])
    model(data)
    model.embed(data)
    pairs = {tuple(pair) for pair in data.edge_index.T.tolist()}
    stayed = []
    for call, seen in zip(encoder.calls, [*views, data] if views else [data] * 3, strict=True):
        ends = seen.pos[call["edge_index"]].T
        old = torch.tensor([tuple(pair) in pairs for pair in ends.tolist()])
        expected = ends[old].sort(dim=1).values
        torch.testing.assert_close(call["edge_attr"][old], expected / 10)
        torch.testing.assert_close(call["edge_weight"][old], (expected[:, 0] * 100 + expected[:, 1]) / 1000)
        assert len(call["edge_type"]) == len(old)
        stayed.append(int(old.sum()))
    assert stayed[2] == 48
    assert max(stayed[:2]) < 48 or isinstance(augmentation, AttributeMasking)


@pytest.mark.parametrize("norm", ["GraphNorm", "BatchNorm"])
def test_norms_of_a_batch_are_those_of_its_graphs(norm: str) -> None:
    """In GRACE, too, where a batch is else one graph of many parts."""
    model, data = GRACE(GCN(7, 8, 2, norm=norm), 8).eval(), batch()
    del data.edge_weight  # which was made for the batch, so that its graphs have none
    alone = torch.cat([model.embed(graph) for graph in data.to_data_list()])
    torch.testing.assert_close(model.embed(data), alone)
