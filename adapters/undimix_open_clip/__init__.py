"""UnDiMix weights for open_clip's losses: use `undimix(create_loss(args))`, or a class of this package."""

from __future__ import annotations

from undimix_plugins.toolkit import require

require("open_clip", extra="open-clip")

from undimix_open_clip.adapter import weighted  # noqa: E402
from undimix_open_clip.clip_loss import ClipLoss, CoCaLoss  # noqa: E402

__all__ = ["ClipLoss", "CoCaLoss", "weighted"]
