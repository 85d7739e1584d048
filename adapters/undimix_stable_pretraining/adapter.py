"""stable-pretraining's adapter: our class for each loss that has negatives to weight."""

from __future__ import annotations

from typing import Any

from stable_pretraining.losses import joint_embedding, multimodal
from torch import nn

from undimix_plugins.toolkit import WeightedLoss, Weighting, reweight
from undimix_stable_pretraining.info_nce_loss import CLIPLoss, InfoNCELoss, NTXEntLoss

CLASSES: dict[type[nn.Module], type[WeightedLoss]] = {
    joint_embedding.NTXEntLoss: NTXEntLoss,
    multimodal.CLIPLoss: CLIPLoss,
    joint_embedding.InfoNCELoss: InfoNCELoss,
}


def weighted(loss: nn.Module, weighting: Weighting | None, **settings: Any) -> nn.Module:
    """stable-pretraining's adapter for `undimix()`."""
    return reweight(loss, weighting, CLASSES, **settings)
