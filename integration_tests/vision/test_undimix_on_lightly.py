"""`undimix()` on lightly's loss objects: what it takes, shares, keeps and refuses."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from lightly.loss import BarlowTwinsLoss, DetConSLoss, NTXentLoss
from torch import nn

import undimix_lightly
from undimix_plugins import HCL, UnDiMix, Uniform, undimix


class LoggingNTXentLoss(NTXentLoss):
    """A user's subclass that inherits `forward` unchanged."""

    logged = "kept"


@pytest.mark.parametrize("cls", [NTXentLoss, LoggingNTXentLoss])
def test_same_class_shared_bank_untouched_host(cls: type[NTXentLoss]) -> None:
    host = cls(temperature=0.2, memory_bank_size=(16, 8))
    host.register_forward_hook(lambda module, inputs, output: output * 1)
    attributes = set(vars(host)) | set(host._modules) | set(host._buffers)
    criterion = undimix(host)
    assert isinstance(criterion, cls)
    assert isinstance(criterion, undimix_lightly.NTXentLoss)
    assert type(criterion).__name__ == cls.__name__
    assert (criterion.temperature, criterion.weighting) == (0.2, UnDiMix())
    assert criterion.memory_bank is host.memory_bank
    assert type(host) is cls
    assert set(vars(host)) | set(host._modules) | set(host._buffers) == attributes
    criterion.new_buffer = torch.nn.Parameter(torch.zeros(1))
    assert not hasattr(host, "new_buffer")
    assert "UnDiMix(" in repr(criterion)
    if cls is LoggingNTXentLoss:
        assert criterion.logged == "kept"


@pytest.mark.parametrize("cls", [NTXentLoss, LoggingNTXentLoss])
def test_pickle_and_deepcopy(cls: type[NTXentLoss]) -> None:
    criterion = undimix(cls(temperature=0.2, memory_bank_size=(16, 8)), HCL())
    inputs = torch.randn(4, 8), torch.randn(4, 8)
    for again in (pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion)):
        assert type(again) is type(criterion)
        assert again.weighting == HCL()
        assert torch.equal(again(*inputs), criterion(*inputs))
        assert again.memory_bank is not criterion.memory_bank


def test_weighted_again() -> None:
    criterion = undimix(NTXentLoss())
    assert undimix(criterion) is criterion
    other = undimix(criterion, HCL())
    assert other is not criterion
    assert (other.weighting, criterion.weighting) == (HCL(), UnDiMix())
    assert undimix(criterion, hardness=3.0).weighting == UnDiMix(hardness=3.0)
    assert undimix_lightly.NTXentLoss().weighting == UnDiMix()


def test_refused() -> None:
    with pytest.raises(TypeError, match=r"BarlowTwinsLoss .*supported: lightly: .*NTXentLoss"):
        undimix(BarlowTwinsLoss())
    patched = NTXentLoss()
    patched.forward = lambda out0, out1: out0.sum()  # type: ignore[method-assign]
    with pytest.raises(TypeError, match=r"replaces NTXentLoss\.forward"):
        undimix(patched)
    with pytest.raises(TypeError, match="weighting: expected an instance of Weighting"):
        undimix_lightly.NTXentLoss(weighting=UnDiMix)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loss", "how"),
    [
        (NTXentLoss(), r"takes labels in the call, criterion\(z0, z1, labels\)"),
        (NTXentLoss(memory_bank_size=(8, 4)), "compares with a memory bank, whose entries have no labels"),
        (DetConSLoss(), "knows by its masks what belongs together"),
    ],
)
def test_labels_go_into_the_call(loss: nn.Module, how: str) -> None:
    """Before a loss is made, of whose settings it could warn."""
    name = type(loss).__name__
    if isinstance(loss, NTXentLoss):
        loss.temperature = 3.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TypeError, match=f"^exclude_same_class: expected none for {name}, which {how}, got True$"):
            undimix(loss, exclude_same_class=True)
    with pytest.raises(TypeError, match="BarlowTwinsLoss has no negatives to weight"):
        undimix(BarlowTwinsLoss(), exclude_same_class=True)


def test_gathered_negatives_need_no_process_group() -> None:
    """As in lightly, `gather_distributed` on one process is the in-batch loss."""
    inputs = torch.randn(4, 8), torch.randn(4, 8)
    alone = undimix_lightly.NTXentLoss(weighting=Uniform())
    gathering = undimix_lightly.NTXentLoss(gather_distributed=True, weighting=Uniform())
    assert torch.equal(alone(*inputs), gathering(*inputs))
