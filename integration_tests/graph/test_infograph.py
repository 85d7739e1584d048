"""InfoGraph's model with PyG's own encoders, loaders and the real MUTAG."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data.batch import Batch
from torch_geometric.data.data import Data
from torch_geometric.loader.dataloader import DataLoader
from torch_geometric.nn import GAT, GCN, GIN, global_add_pool, global_max_pool, global_mean_pool
from torch_geometric.transforms import OneHotDegree

from integration_tests.molecules import mutag
from undimix_pyg import InfoGraph


def molecules(count: int = 16) -> Any:
    return next(iter(DataLoader(mutag(), batch_size=count)))


@pytest.mark.parametrize(
    "encoder", [GIN(7, 24, num_layers=3, jk="cat"), GCN(7, 24, num_layers=2), GAT(7, 24, num_layers=2)]
)
def test_shapes_and_gradients(encoder: nn.Module) -> None:
    model, data = InfoGraph(encoder, 24), molecules()
    graphs, nodes, batch = model(data)
    assert graphs.shape == model.embed(data).shape == (16, 24)
    assert nodes.shape == (data.num_nodes, 24)
    assert torch.equal(batch, data.batch)
    (graphs[batch] * nodes).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("pooling", [global_add_pool, global_mean_pool, global_max_pool])
def test_a_batch_is_its_graphs_one_by_one(pooling: Any) -> None:
    model, data = InfoGraph(GIN(7, 24, num_layers=3), 24, pooling), molecules()
    graphs, nodes, _ = model(data)
    alone = [model(one) for one in data.to_data_list()]
    torch.testing.assert_close(graphs, torch.cat([each[0] for each in alone]))
    torch.testing.assert_close(nodes, torch.cat([each[1] for each in alone]))
    torch.testing.assert_close(model.embed(data), torch.cat([model.embed(one) for one in data.to_data_list()]))


def authors_net(head: nn.Module, h: Tensor) -> Tensor:
    """Three layers, each with a ReLU after it, beside a linear shortcut."""
    *block, weight, bias = head.parameters()
    out = h
    for its_weight, its_bias in zip(block[::2], block[1::2], strict=True):
        out = (out @ its_weight.T + its_bias).relu()
    assert len(block) == 6
    return out + h @ weight.T + bias


def test_graphs_and_nodes_have_heads_of_their_own() -> None:
    gin, data = GIN(7, 24, num_layers=3), molecules()
    model = InfoGraph(gin, 24)
    h = gin(data.x, data.edge_index)
    pooled = global_add_pool(h, data.batch)
    torch.testing.assert_close(model.embed(data), pooled)
    graphs, nodes, _ = model(data)
    torch.testing.assert_close(graphs, authors_net(model.global_head, pooled))
    torch.testing.assert_close(nodes, authors_net(model.local_head, h))
    assert not torch.allclose(authors_net(model.local_head, pooled), graphs)


def test_a_row_for_every_graph_whatever_its_place_and_size() -> None:
    bond = Data(x=torch.randn(2, 7), edge_index=torch.tensor([[0, 1], [1, 0]]))
    atom = Data(x=torch.randn(1, 7), edge_index=torch.empty(2, 0, dtype=torch.long))
    nothing = Data(x=torch.empty(0, 7), edge_index=torch.empty(2, 0, dtype=torch.long))
    model = InfoGraph(GIN(7, 24, num_layers=3), 24)
    for graphs in ([bond, atom], [atom, bond, atom], [bond, bond, nothing], [atom], [Data(x=torch.randn(3, 7))]):
        data = Batch.from_data_list(graphs)
        sizes = [graph.num_nodes for graph in graphs]
        projected, nodes, batch = model(data)
        assert projected.shape == (len(graphs), 24)
        assert nodes.shape == (sum(sizes), 24)
        assert batch.bincount(minlength=len(graphs)).tolist() == sizes
    assert model.embed(bond).shape == (1, 24)


def test_the_encoder_gets_the_batch() -> None:
    given = []

    def encode(x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        given.append((x, edge_index, batch))
        return x

    data = molecules()
    InfoGraph(encode, 7).embed(data)
    assert all(torch.equal(one, data[key]) for one, key in zip(given[0], ("x", "edge_index", "batch"), strict=True))


def test_graphs_without_features() -> None:
    model = InfoGraph(GIN(5, 8, num_layers=2), 8)
    bare = [Data(edge_index=graph.edge_index, num_nodes=graph.num_nodes) for graph in mutag()[:4]]
    for method in (model, model.embed):
        with pytest.raises(ValueError, match=r"^data\.x: expected node features, got None; .*Constant\(\) or OneHot"):
            method(Batch.from_data_list(bare))
    degrees = Batch.from_data_list([OneHotDegree(max_degree=4)(graph) for graph in bare])
    assert model(degrees)[0].shape == (4, 8)


@pytest.mark.parametrize("shape", [(16, 24), (1, 24), (270, 23), (270,)])
def test_encoders_with_another_shape(shape: tuple[int, ...]) -> None:
    data = molecules()
    model = InfoGraph(lambda x, edge_index, batch: torch.zeros(shape), 24)
    with pytest.raises(ValueError, match=rf"^encoder: .* \[{data.num_nodes} nodes, 24 hidden_channels\], got \["):
        model(data)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match=r"^hidden_channels: expected an integer of at least 1, got 0$"):
        InfoGraph(GIN(7, 8, num_layers=2), 0)
    data = molecules(2)
    data.batch = data.batch.flip(0)
    plain = Data(x=data.x, edge_index=data.edge_index, batch=data.batch)
    with pytest.raises(ValueError, match=r"^data\.batch: expected graph numbers in ascending order, got \[1, 0\]"):
        InfoGraph(GIN(7, 8, num_layers=2), 8)(plain)
