"""open_clip's adapter: our class for each loss that has negatives to weight, and why the others have none."""

from __future__ import annotations

from typing import Any

from open_clip import loss as host
from torch import nn

from undimix_open_clip.clip_loss import ClipLoss, CoCaLoss
from undimix_plugins.toolkit import WeightedLoss, Weighting, reweight

CLASSES: dict[type[nn.Module], type[WeightedLoss]] = {host.ClipLoss: ClipLoss, host.CoCaLoss: CoCaLoss}
REFUSED: dict[type[nn.Module], str] = {
    host.SigLipLoss: (
        "its loss is a sigmoid for each pair on its own: there is no sum over an anchor's negatives to weight"
    ),
    host.DistillClipLoss: (
        "it also compares whole distributions with a teacher's, in which all candidates count as they do there"
    ),
}


def weighted(loss: nn.Module, weighting: Weighting | None, **settings: Any) -> nn.Module:
    """open_clip's adapter for `undimix()`; a TypeError with the reason for losses without negatives to weight."""
    for refused, why in REFUSED.items():
        if isinstance(loss, refused):
            raise TypeError(f"loss: {type(loss).__name__} can't be weighted: {why}")
    return reweight(loss, weighting, CLASSES, **settings)
