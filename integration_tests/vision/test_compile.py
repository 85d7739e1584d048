"""torch.compile takes the in-batch loss whole, without a graph break, and gives the same numbers."""

from __future__ import annotations

import pytest
import torch
from lightly.loss import NTXentLoss

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


def test_a_host_that_was_compiled_is_weighted_all_the_same() -> None:
    views = torch.randn(16, 8), torch.randn(16, 8)
    host = NTXentLoss(temperature=0.1)
    host.compile(backend="eager")
    weighted = undimix(host)
    torch.testing.assert_close(weighted(*views), undimix(NTXentLoss(temperature=0.1))(*views))
    weighted.compile(backend="eager")
    torch.testing.assert_close(undimix(weighted, HCL())(*views), undimix(NTXentLoss(temperature=0.1), HCL())(*views))
