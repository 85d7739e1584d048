"""UnDiMix weights for pytorch-metric-learning's losses: use `undimix(NTXentLoss())`, or a class of this package."""

from __future__ import annotations

from undimix_plugins.toolkit import require

require("pytorch_metric_learning", extra="pytorch-metric-learning")

from undimix_pytorch_metric_learning.adapter import weighted  # noqa: E402
from undimix_pytorch_metric_learning.ntxent_loss import NTXentLoss  # noqa: E402
from undimix_pytorch_metric_learning.supcon_loss import SupConLoss  # noqa: E402

__all__ = ["NTXentLoss", "SupConLoss", "weighted"]
