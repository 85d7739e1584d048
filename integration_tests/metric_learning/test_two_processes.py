"""pytorch-metric-learning's wrapper for several processes around our losses, or under the line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import Tensor, nn

from integration_tests.ranks import on_ranks
from undimix_plugins import UnDiMix, Uniform, undimix

BATCH, WIDTH, RANKS = 9, 5, 2
INNER: dict[str, Callable[[], nn.Module]] = {
    "NTXentLoss": lambda: losses.NTXentLoss(temperature=0.3),
    "SupConLoss": lambda: losses.SupConLoss(temperature=0.3),
    "CrossBatchMemory": lambda: losses.CrossBatchMemory(losses.NTXentLoss(temperature=0.3), WIDTH, 4 * BATCH),
}
HOSTS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda make=make: DistributedLossWrapper(make()) for name, make in INNER.items()},  # type: ignore[misc]
    **{
        f"{name}, efficient": lambda name=name: DistributedLossWrapper(INNER[name](), efficient=True)  # type: ignore[misc]
        for name in ("NTXentLoss", "SupConLoss")
    },
}


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(RANKS * BATCH, WIDTH, dtype=torch.float64, generator=draw)
    return rows, torch.randint(4, (len(rows),), generator=draw)


def outcome(loss: nn.Module, rank: int, ranks: int) -> list[Tensor]:
    """The value and the gradient at a layer of a step of a rank, or of one process for all."""
    rows, labels = (part[rank::ranks] for part in data())
    torch.manual_seed(1)
    layer = nn.Linear(WIDTH, WIDTH).double()
    value = loss(layer(rows), labels)
    return [value.detach(), *torch.autograd.grad(value, list(layer.parameters()))]


def on_a_rank(rank: int, ranks: int) -> dict[str, dict[str, list[Tensor]]]:
    return {
        name: {
            "host": outcome(make(), rank, ranks),
            "uniform": outcome(undimix(make(), Uniform()), rank, ranks),
            "undimix": outcome(undimix(make()), rank, ranks),
        }
        for name, make in HOSTS.items()
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, list[Tensor]]]]:
    return on_ranks(on_a_rank, RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", HOSTS)
def test_uniform_is_the_host_on_every_rank(name: str, ranks: list[dict[str, dict[str, list[Tensor]]]]) -> None:
    for results in ranks:
        for one, other in zip(results[name]["uniform"], results[name]["host"], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        assert not torch.isclose(results[name]["undimix"][0], results[name]["host"][0], rtol=1e-3)


@pytest.mark.parametrize("name", INNER)
def test_the_ranks_together_are_one_process(name: str, ranks: list[dict[str, dict[str, list[Tensor]]]]) -> None:
    """The wrapper multiplies a rank's loss by their number; their mean gradient is then the whole batch's."""
    want = outcome(undimix(INNER[name](), UnDiMix()), 0, 1)
    for place, of_one in enumerate(want):
        parts = torch.stack([results[name]["undimix"][place] for results in ranks])
        torch.testing.assert_close(parts.mean(dim=0) / (1 if place else RANKS), of_one, rtol=0, atol=1e-10)
