"""UnDiMix weights for stable-pretraining's losses: use `undimix(loss)`, or a class of this package."""

from __future__ import annotations

from undimix_plugins.toolkit import require

require("stable_pretraining", extra="stable-pretraining")

from undimix_stable_pretraining.adapter import weighted  # noqa: E402
from undimix_stable_pretraining.info_nce_loss import CLIPLoss, InfoNCELoss, NTXEntLoss  # noqa: E402

__all__ = ["CLIPLoss", "InfoNCELoss", "NTXEntLoss", "weighted"]
