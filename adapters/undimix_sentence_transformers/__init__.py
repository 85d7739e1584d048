"""UnDiMix weights for sentence-transformers' losses: use `undimix(loss)`, or a class of this package."""

from importlib.metadata import version
from typing import Any

from undimix_plugins.toolkit import require

require("sentence_transformers", extra="sentence-transformers")

from undimix_sentence_transformers.adapter import weighted  # noqa: E402
from undimix_sentence_transformers.ance import ANCE  # noqa: E402
from undimix_sentence_transformers.gist_embed import CachedGISTEmbedLoss, GISTEmbedLoss  # noqa: E402
from undimix_sentence_transformers.host import RELEASE  # noqa: E402
from undimix_sentence_transformers.multiple_negatives_ranking import (  # noqa: E402
    CachedMultipleNegativesRankingLoss,
    CachedMultipleNegativesSymmetricRankingLoss,
    MultipleNegativesRankingLoss,
    MultipleNegativesSymmetricRankingLoss,
    SparseMultipleNegativesRankingLoss,
)
from undimix_transformers.callbacks import HardnessWarmup, NegativeStatistics, TemperatureSchedule  # noqa: E402

__all__ = [
    "ANCE",
    "CachedGISTEmbedLoss",
    "CachedMultiVectorMultipleNegativesRankingLoss",
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "GISTEmbedLoss",
    "HardnessWarmup",
    "MultiVectorMultipleNegativesRankingLoss",
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
    "NegativeStatistics",
    "SparseMultipleNegativesRankingLoss",
    "TemperatureSchedule",
    "weighted",
]
LATE_INTERACTION = ("CachedMultiVectorMultipleNegativesRankingLoss", "MultiVectorMultipleNegativesRankingLoss")
if RELEASE >= (6, 0):
    from undimix_sentence_transformers.multi_vector import (
        CachedMultiVectorMultipleNegativesRankingLoss,
        MultiVectorMultipleNegativesRankingLoss,
    )
else:
    __all__ = [name for name in __all__ if name not in LATE_INTERACTION]


def __getattr__(name: str) -> Any:
    if name in LATE_INTERACTION:
        came = version("sentence-transformers")
        raise ImportError(f"{name}: expected sentence-transformers 6.0 or newer, which has it, got {came}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
