"""lightly's adapter: the losses whose negatives can be weighted, and our class for each."""

from __future__ import annotations

from typing import Any

from lightly import loss as host
from lightly.loss.detcon_loss import DetConBLoss as HostDetConBLoss
from lightly.loss.detcon_loss import DetConSLoss as HostDetConSLoss
from lightly.loss.ntx_ent_loss import NTXentLoss as HostNTXentLoss
from torch import nn

from undimix_lightly.dcl_loss import DCLLoss, DCLWLoss
from undimix_lightly.detcon_loss import DetConBLoss, DetConSLoss
from undimix_lightly.macl_loss import MACLLoss
from undimix_lightly.ntx_ent_loss import NTXentLoss
from undimix_plugins.toolkit import WeightedLoss, Weighting, reweight

OURS: list[type[WeightedLoss]] = [DCLLoss, DCLWLoss, DetConBLoss, DetConSLoss, MACLLoss, NTXentLoss]
if hasattr(host, "DirectCLRLoss"):  # from 1.5.23 on
    from undimix_lightly.directclr_loss import DirectCLRLoss

    OURS.append(DirectCLRLoss)
CLASSES: dict[type[nn.Module], type[WeightedLoss]] = {getattr(host, cls.__name__): cls for cls in OURS}


def weighted(loss: nn.Module, weighting: Weighting | None, **settings: Any) -> nn.Module:
    """lightly's adapter for `undimix()`; a TypeError for settings that its losses do not have."""
    by_labels = settings.pop("exclude_same_class", None)
    if by_labels is not None and isinstance(loss, tuple(CLASSES)):
        how = "takes labels in the call, criterion(z0, z1, labels)"
        if isinstance(loss, (HostDetConBLoss, HostDetConSLoss)):
            how = "knows by its masks what belongs together"
        elif isinstance(loss, HostNTXentLoss) and loss.memory_bank.size[0]:
            how = "compares with a memory bank, whose entries have no labels"
        raise TypeError(f"exclude_same_class: expected none for {type(loss).__name__}, which {how}, got {by_labels!r}")
    return reweight(loss, weighting, CLASSES, **settings)
