"""GraphCL, InfoGraph and GRACE in PyG training loops on real graphs, plain beside weighted: they train, they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_geometric.typing
from torch import Tensor, nn
from torch_geometric import seed_everything
from torch_geometric.data.data import Data
from torch_geometric.datasets import KarateClub
from torch_geometric.loader import DataLoader, NeighborLoader, RandomNodeLoader
from torch_geometric.nn import GAT, GCN, GIN
from torch_geometric.transforms import OneHotDegree

from integration_tests.molecules import mutag
from undimix_plugins import UnDiMix, Uniform, Weighting, undimix
from undimix_pyg import GRACE, GRACELoss, GraphCL, GraphCLLoss, InfoGraph, InfoGraphLoss

WIDTH = 16
ENCODERS: dict[str, Callable[..., nn.Module]] = {"GIN": GIN, "GCN": GCN, "GAT": GAT}
MODELS = {"GraphCL": GraphCL, "InfoGraph": InfoGraph, "GRACE": GRACE}
LOSSES: dict[str, type[Any]] = {"GraphCL": GraphCLLoss, "InfoGraph": InfoGraphLoss, "GRACE": GRACELoss}
each_method = pytest.mark.parametrize("method", MODELS)

Loss = Callable[[Any], Tensor]
Epoch = Callable[[], Iterable[Any]]


def epoch_of(method: str) -> Epoch:
    """MUTAG for what learns graphs (the last batch has 62), all of the karate club for what learns nodes."""
    if method == "GRACE":
        return lambda: 8 * [KarateClub()[0]]
    return lambda: DataLoader(mutag(), batch_size=63, shuffle=True)


def make(method: str, encoder: str = "GIN", channels: int | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    seed_everything(0)
    channels = channels or (34 if method == "GRACE" else 7)
    model = MODELS[method](ENCODERS[encoder](channels, WIDTH, num_layers=2, norm="batch_norm"), WIDTH)
    return model, torch.optim.Adam(model.parameters(), lr=0.005)


def loss_of(model: nn.Module, criterion: nn.Module) -> Loss:
    return lambda batch: criterion(*model(batch))


def train(loss: Loss, optimizer: torch.optim.Optimizer, epoch: Epoch, epochs: range) -> Tensor:
    losses = []
    for number in epochs:
        seed_everything(number)
        for batch in epoch():
            optimizer.zero_grad()
            value = loss(batch)
            value.backward()
            optimizer.step()
            losses.append(value.detach())
    return torch.stack(losses)


@torch.no_grad()
def mean_loss(loss: Loss, epoch: Epoch) -> Tensor:
    """Of two epochs, always the same batches and views."""
    seed_everything(99)
    return torch.stack([loss(batch) for _ in range(2) for batch in epoch()]).mean()


def vector_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("encoder", ENCODERS)
@each_method
def test_trains_plain_and_weighted(method: str, encoder: str) -> None:
    epoch, firsts, trained = epoch_of(method), [], []
    for weighting in (Uniform(), UnDiMix()):
        model, optimizer = make(method, encoder)
        # At GraphCL's .2, MUTAG's graphs, many of them alike, weigh so much that a weighted loss falls more slowly.
        loss = loss_of(model, LOSSES[method](0.5, weighting))
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        untrained = mean_loss(loss, epoch)
        losses = train(loss, optimizer, epoch, range(4))
        assert losses.isfinite().all()
        assert mean_loss(loss, epoch) < untrained - 0.05
        assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
        firsts.append(losses[0])
        trained.append(vector_of(model))
    assert firsts[0] != firsts[1]  # of one batch and one model
    assert not torch.allclose(*trained)


@pytest.mark.parametrize("method", ["InfoGraph", "GRACE"])
def test_save_load_resume(method: str, tmp_path: Path) -> None:
    epoch, criterion = epoch_of(method), LOSSES[method]()
    model, optimizer = make(method)
    train(loss_of(model, criterion), optimizer, epoch, range(1))
    torch.save([part.state_dict() for part in (model, optimizer, criterion)], tmp_path / "checkpoint.pt")
    rest = train(loss_of(model, criterion), optimizer, epoch, range(1, 3))

    resumed, its_optimizer = make(method)
    again = LOSSES[method]()
    of_model, of_optimizer, of_loss = torch.load(tmp_path / "checkpoint.pt")
    resumed.load_state_dict(of_model, strict=True)
    its_optimizer.load_state_dict(of_optimizer)
    again.load_state_dict(of_loss, strict=True)
    torch.testing.assert_close(train(loss_of(resumed, again), its_optimizer, epoch, range(1, 3)), rest)


@each_method
def test_trains_with_labels(method: str) -> None:
    """What a loader's batch has as `y` is what the loss takes."""
    epoch, criterion = epoch_of(method), LOSSES[method]()
    model, optimizer = make(method)

    def loss(batch: Any) -> Tensor:
        return criterion(*model(batch), batch.y)

    untrained = mean_loss(loss, epoch)
    assert train(loss, optimizer, epoch, range(4)).isfinite().all()
    assert mean_loss(loss, epoch) < untrained - 0.05
    batch = next(iter(epoch()))
    given, plain = model(batch), LOSSES[method](weighting=Uniform())
    assert plain(*given, batch.y) < plain(*given) - 0.1  # fewer terms in the denominator


@pytest.mark.parametrize("method", ["GraphCL", "GRACE"])
def test_trains_with_a_last_layer(method: str) -> None:
    epoch, trained = epoch_of(method), []
    for at_weight in (True, False):
        model, optimizer = make(method)
        plain = LOSSES[method](weighting=Uniform())
        loss = loss_of(model, undimix(plain, last_layer=model.head[-1]) if at_weight else undimix(plain))
        untrained = mean_loss(loss, epoch)
        assert train(loss, optimizer, epoch, range(3)).isfinite().all()
        assert mean_loss(loss, epoch) < untrained - 0.05
        trained.append(vector_of(model))
    assert not torch.allclose(*trained)


@each_method
def test_trains_on_degrees_where_there_are_no_features(method: str) -> None:
    bare = [Data(edge_index=graph.edge_index, num_nodes=graph.num_nodes) for graph in mutag()[:64]]
    degrees = [OneHotDegree(max_degree=4)(graph.clone()) for graph in bare]
    model, optimizer = make(method, channels=5)
    loss = loss_of(model, LOSSES[method]())
    with pytest.raises(ValueError, match=r"^data\.x: expected node features, got None; .* OneHotDegree"):
        mean_loss(loss, lambda: DataLoader(bare, batch_size=16))
    untrained = mean_loss(loss, lambda: DataLoader(degrees, batch_size=16))
    train(loss, optimizer, lambda: DataLoader(degrees, batch_size=16, shuffle=True), range(3))
    assert mean_loss(loss, lambda: DataLoader(degrees, batch_size=16)) < untrained


@pytest.mark.parametrize("weighting", [Uniform(), UnDiMix()], ids=repr)
def test_trains_on_parts_of_a_graph(weighting: Weighting) -> None:
    model, optimizer = make("GRACE")
    criterion, sizes = GRACELoss(weighting=weighting), set()

    def loss(batch: Any) -> Tensor:
        sizes.add(batch.num_nodes)
        return criterion(*model(batch))

    def epoch() -> RandomNodeLoader:
        return RandomNodeLoader(KarateClub()[0], num_parts=3, shuffle=True)

    untrained = mean_loss(loss, epoch)
    assert train(loss, optimizer, epoch, range(20)).isfinite().all()
    assert mean_loss(loss, epoch) < untrained
    assert sizes == {12, 10}  # 12, 12 and 10 of 34


@pytest.mark.skipif(
    not torch_geometric.typing.WITH_PYG_LIB and not torch_geometric.typing.WITH_TORCH_SPARSE,
    reason="NeighborLoader samples by pyg-lib or torch-sparse",
)
def test_trains_on_sampled_neighbours() -> None:
    """The seed nodes, which come first, are the anchors and the pool; their neighbours only help to encode them."""
    model, optimizer = make("GRACE")
    criterion = GRACELoss()

    def loss(batch: Any) -> Tensor:
        z1, z2 = model(batch)
        return criterion(z1[: batch.batch_size], z2[: batch.batch_size])

    def epoch() -> NeighborLoader:
        return NeighborLoader(KarateClub()[0], num_neighbors=[4, 4], batch_size=12, shuffle=True)

    untrained = mean_loss(loss, epoch)
    assert train(loss, optimizer, epoch, range(20)).isfinite().all()
    assert mean_loss(loss, epoch) < untrained
