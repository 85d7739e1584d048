"""torch.compile takes the in-batch loss whole, without a graph break, and gives the same numbers."""

from __future__ import annotations

import pytest
import torch
from lightly import loss as lightly_losses
from lightly.loss import NTXentLoss
from torch import Tensor

from undimix_plugins import HCL, UnDiMix, Uniform, Weighting, undimix


@pytest.mark.parametrize("weighting", [Uniform(), UnDiMix(), UnDiMix(mixing="linear"), HCL()], ids=repr)
def test_compiled_is_eager(weighting: Weighting) -> None:
    criterion = undimix(NTXentLoss(temperature=0.1), weighting)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    views = [torch.randn(16, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    values = compiled(*views), criterion(*views)
    torch.testing.assert_close(*values, rtol=0, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(value, views) for value in values), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


LOSSES: dict[str, tuple[list[Tensor], list[Tensor]]] = {
    **{name: ([rows(8, 4), rows(8, 4)], []) for name in ("DCLLoss", "MACLLoss", "DirectCLRLoss")},
    "NTXentLoss": ([rows(8, 4), rows(8, 4)], [torch.tensor([0, 1, 2, 3, 0, 1, 2, 4])]),  # with labels
    "DetConSLoss": ([rows(4, 5, 6) for _ in range(2)], list(torch.randint(3, (2, 4, 5)))),
    "DetConBLoss": ([rows(4, 5, 6) for _ in range(4)], list(torch.randint(3, (2, 4, 5)))),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_compiles_whole(name: str) -> None:
    inputs, further = LOSSES[name]
    settings = {"loss_dim": 3} if name == "DirectCLRLoss" else {}
    criterion = undimix(getattr(lightly_losses, name)(**settings))
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    values = compiled(*inputs, *further), criterion(*inputs, *further)
    torch.testing.assert_close(*values, rtol=0, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(value, inputs) for value in values), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_memory_bank_is_updated_outside() -> None:
    """Numbers and bank are those of an eager run, with Inductor's choice of what to keep for the backward pass."""
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        criterion = undimix(NTXentLoss(memory_bank_size=(32, 8)).double())
        call = torch.compile(criterion, backend="aot_eager_decomp_partition") if compiled else criterion
        values = []
        for _ in range(3):
            first, second = rows(4, 8), rows(4, 8).detach()
            loss = call(first, second)
            loss.backward()
            values += [loss.detach(), first.grad]
        runs.append([*values, criterion.memory_bank.bank, criterion.memory_bank.bank_ptr])
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_host_that_was_compiled_is_weighted_all_the_same() -> None:
    views = torch.randn(16, 8), torch.randn(16, 8)
    host = NTXentLoss(temperature=0.1)
    host.compile(backend="eager")
    weighted = undimix(host)
    torch.testing.assert_close(weighted(*views), undimix(NTXentLoss(temperature=0.1))(*views))
    weighted.compile(backend="eager")
    torch.testing.assert_close(undimix(weighted, HCL())(*views), undimix(NTXentLoss(temperature=0.1), HCL())(*views))
