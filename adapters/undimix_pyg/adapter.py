"""This package's adapter for `undimix()`: PyG has no contrastive loss, so the losses are our own."""

from __future__ import annotations

from typing import Any

from torch import nn

from undimix_plugins.toolkit import Weighting, reweight
from undimix_pyg.grace_loss import GRACELoss
from undimix_pyg.graphcl_loss import GraphCLLoss
from undimix_pyg.infograph_loss import InfoGraphLoss


def weighted(loss: nn.Module, weighting: Weighting | None, **settings: Any) -> nn.Module:
    """The adapter of `undimix()` for this package's losses. Settings that they do not have are a TypeError."""
    ours = (GraphCLLoss, GRACELoss, InfoGraphLoss)
    by_labels = settings.pop("exclude_same_class", None)
    if by_labels is not None and isinstance(loss, ours):
        raise TypeError(
            f"exclude_same_class: expected none for {type(loss).__name__}, which takes labels last in the call, as in "
            f"criterion(z1, z2, labels), got {by_labels!r}"
        )
    return reweight(loss, weighting, {cls: cls for cls in ours}, **settings)
