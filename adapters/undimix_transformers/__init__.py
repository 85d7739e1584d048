"""SimCSE with UnDiMix weights for the plain `transformers.Trainer`: `compute_loss_func=SimCSELoss()`."""

from undimix_plugins import require

require("transformers", extra="transformers")

from undimix_transformers.simcse import SimCSELoss, TwoViews, weighted  # noqa: E402

__all__ = ["SimCSELoss", "TwoViews", "weighted"]
