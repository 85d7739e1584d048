"""With `Uniform()`, our NTXentLoss is lightly's own: value and gradients, in-batch and with a memory bank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightly import loss as lightly_losses
from lightly.loss import NTXentLoss
from torch import Tensor
from torch.nn.functional import normalize

import undimix_lightly
from undimix_plugins import (
    HCL,
    Contrast,
    FalseNegativeElimination,
    UnDiMix,
    Uniform,
    Weighting,
    info_nce,
    support_set,
    undimix,
)

WIDTH = 16
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def views(batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    first, second = (torch.randn(batch, WIDTH, generator=generator, dtype=dtype) for _ in range(2))
    return first.requires_grad_(), (first.detach() + 0.5 * second).requires_grad_()


def value_and_gradients(criterion: NTXentLoss, inputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    loss = criterion(*inputs)
    return [loss, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bank", [0, (40, WIDTH)], ids=["in-batch", "bank"])
@pytest.mark.parametrize("batch", [1, 2, 3, 7, 32, 128])
@pytest.mark.parametrize("form", ["verb", "class"])
def test_uniform_is_lightly(form: str, batch: int, bank: int | tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    host = NTXentLoss(memory_bank_size=bank).to(dtype)
    if form == "verb":
        ours = undimix(host, Uniform())
    else:
        torch.manual_seed(0)  # for the same memory bank
        ours = undimix_lightly.NTXentLoss(memory_bank_size=bank, weighting=Uniform()).to(dtype)
    for step in range(3):  # the bank's first batches are its random rows, the next are embeddings
        inputs = views(batch + step, dtype)
        expected = [host.memory_bank.bank.clone(), host.memory_bank.bank_ptr.clone()]
        wanted = value_and_gradients(host, inputs)
        if form == "verb":  # it shares the host's bank: turn back what the host has put in
            after = host.memory_bank.bank.clone()
            host.memory_bank.bank.copy_(expected[0])
            host.memory_bank.bank_ptr.copy_(expected[1])
        got = value_and_gradients(ours, inputs)
        if form == "verb":
            torch.testing.assert_close(host.memory_bank.bank, after, rtol=0, atol=TOLERANCE[dtype])
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(ours.memory_bank.bank, host.memory_bank.bank, rtol=0, atol=TOLERANCE[dtype])
    if bank:  # without one, lightly leaves the pointer uninitialised
        assert torch.equal(ours.memory_bank.bank_ptr, host.memory_bank.bank_ptr)


def test_evaluation_leaves_the_bank_alone() -> None:
    criterion = undimix(NTXentLoss(memory_bank_size=(8, WIDTH)))
    before = criterion.memory_bank.bank.clone()
    with torch.no_grad():
        criterion(torch.randn(4, WIDTH), torch.randn(4, WIDTH))
    assert torch.equal(criterion.memory_bank.bank, before)


@pytest.mark.parametrize("bank", [0, (8, WIDTH)], ids=["in-batch", "bank"])
def test_bad_batches_are_refused_before_the_bank_takes_them(bank: int | tuple[int, int]) -> None:
    criterion = undimix(NTXentLoss(memory_bank_size=bank))
    before = criterion.memory_bank.bank.clone()
    good, bad = torch.randn(4, WIDTH, requires_grad=True), torch.randn(4, WIDTH)
    bad[2, 3] = torch.nan
    for second, message in [
        (bad, r"out1: expected finite embeddings, got a non-finite value in row 2"),
        (torch.randn(4, WIDTH + 1), r"out1: expected width 16, as out0 has, got shape \[4, 17\]"),
        (torch.randn(3, WIDTH), r"out1: expected 4 rows, as out0 has, got 3"),
        (torch.randint(3, (4, WIDTH)), r"out1: expected floating-point embeddings, got torch.int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            criterion(good, second)
    with pytest.raises(ValueError, match=r"out0: expected at least one row"):
        criterion(torch.randn(0, WIDTH), torch.randn(0, WIDTH))
    if bank:
        with pytest.raises(ValueError, match=r"out0: expected width 16, as the memory bank has, got shape \[4, 9\]"):
            criterion(torch.randn(4, 9, requires_grad=True), torch.randn(4, 9))
    assert torch.equal(criterion.memory_bank.bank, before)


class Broken(Weighting):
    """Of another shape than weights have, which shows only in the loss."""

    def log_weights(self, prepared: Any, rows: slice) -> Tensor:
        return torch.zeros(1, 1)


@pytest.mark.parametrize("name", ["NTXentLoss", "DirectCLRLoss"])
def test_a_step_that_fails_leaves_the_bank_as_it_was(name: str) -> None:
    dims = (WIDTH,) if name == "DirectCLRLoss" else ()
    loss = getattr(lightly_losses, name)(*dims, memory_bank_size=(8, WIDTH))
    first, second = torch.randn(3, WIDTH, requires_grad=True), torch.randn(3, WIDTH)
    undimix(loss)(first, second)
    before = loss.memory_bank.bank.clone()
    with pytest.raises(ValueError, match="Broken"):
        undimix(loss, Broken())(first, second)
    with support_set(torch.randn(4, before.shape[1])), pytest.raises(ValueError, match="support_set"):
        undimix(loss, FalseNegativeElimination(k=2))(first, second)
    assert torch.equal(loss.memory_bank.bank, before)
    assert loss.memory_bank.bank_ptr.item() == 3
    undimix(loss)(first, second)
    assert loss.memory_bank.bank_ptr.item() == 6


@pytest.mark.parametrize("weighting", [UnDiMix(), UnDiMix(detached=True), HCL()], ids=repr)
def test_the_backward_pass_has_the_bank_of_the_loss(weighting: Weighting) -> None:
    """Although keys have been put in by then."""
    criterion = undimix(NTXentLoss(temperature=0.2, memory_bank_size=(40, WIDTH)).double(), weighting)
    first, second = views(7, torch.float64)
    rows = normalize(first, dim=1), normalize(second, dim=1), criterion.memory_bank.bank.clone()
    expected = torch.autograd.grad(info_nce(Contrast.of(*rows, None, 0.2), weighting), (first, second))
    for one, other in zip(value_and_gradients(criterion, (first, second))[1:], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.0, -0.5, float("nan"), float("inf")])
def test_temperature_is_checked_when_made(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        undimix_lightly.NTXentLoss(temperature=temperature)
    if temperature:  # lightly lets it pass
        with pytest.raises(ValueError, match="temperature: expected a finite number above 0"):
            undimix(NTXentLoss(temperature=temperature))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bank", [0, (8, WIDTH)], ids=["in-batch", "bank"])
def test_zero_and_tiny_rows_in_half_precision(dtype: torch.dtype, bank: int | tuple[int, int]) -> None:
    """lightly's own gives NaN for a row of zeros in float16 (its issue 1259)."""
    out = torch.randn(4, WIDTH, dtype=dtype)
    out[0], out[1] = 0, 1e-6
    assert undimix(NTXentLoss(memory_bank_size=bank))(out, out.flip(0)).isfinite()


def test_autocast_with_a_float32_bank() -> None:
    criterion = undimix(NTXentLoss(temperature=0.1, memory_bank_size=(64, WIDTH)))
    layer = torch.nn.Linear(WIDTH, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(layer(torch.randn(8, WIDTH)), layer(torch.randn(8, WIDTH)))
    loss.backward()
    assert loss.dtype == torch.float32
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()
