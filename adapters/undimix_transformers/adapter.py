"""The adapter of `undimix()` for this package's own losses: the Trainer has none."""

from __future__ import annotations

from typing import Any

from torch import nn

from undimix_plugins.toolkit import Weighting, reweight
from undimix_transformers.image_text import ImageTextLoss
from undimix_transformers.simcse import SimCSELoss


def weighted(loss: nn.Module, weighting: Weighting | None, **settings: Any) -> nn.Module:
    """The adapter of `undimix()` for this package's own losses."""
    return reweight(loss, weighting, {SimCSELoss: SimCSELoss, ImageTextLoss: ImageTextLoss}, **settings)
