"""SimCSE and CLIP with UnDiMix weights for the plain `transformers.Trainer`: `compute_loss_func=SimCSELoss()`."""

from undimix_plugins.toolkit import require

require("transformers", extra="transformers")

from undimix_transformers.adapter import weighted  # noqa: E402
from undimix_transformers.callbacks import HardnessWarmup, NegativeStatistics, TemperatureSchedule  # noqa: E402
from undimix_transformers.image_text import ImageTextLoss  # noqa: E402
from undimix_transformers.simcse import SentenceTuples, SimCSELoss, TwoViews  # noqa: E402

__all__ = [
    "HardnessWarmup",
    "ImageTextLoss",
    "NegativeStatistics",
    "SentenceTuples",
    "SimCSELoss",
    "TemperatureSchedule",
    "TwoViews",
    "weighted",
]
