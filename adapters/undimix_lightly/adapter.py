"""lightly's adapter: which of its losses have negatives that can be weighted, and our class for each."""

from __future__ import annotations

from typing import Any

from lightly import loss as host
from torch import nn

from undimix_lightly.dcl_loss import DCLLoss, DCLWLoss
from undimix_lightly.detcon_loss import DetConBLoss, DetConSLoss
from undimix_lightly.macl_loss import MACLLoss
from undimix_lightly.ntx_ent_loss import DirectCLRLoss, NTXentLoss
from undimix_plugins import Weighting, reweight


def weighted(loss: nn.Module, weighting: Weighting | None, **settings: Any) -> nn.Module:
    """lightly's adapter for `undimix()`."""
    ours = (DCLLoss, DCLWLoss, DetConBLoss, DetConSLoss, DirectCLRLoss, MACLLoss, NTXentLoss)
    return reweight(loss, weighting, {getattr(host, cls.__name__): cls for cls in ours}, **settings)
