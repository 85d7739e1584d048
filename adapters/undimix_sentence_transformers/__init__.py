"""UnDiMix weights for sentence-transformers' losses: use `undimix(loss)`, or a class of this package."""

from undimix_plugins.toolkit import require

require("sentence_transformers", extra="sentence-transformers")

from undimix_sentence_transformers.adapter import weighted  # noqa: E402
from undimix_sentence_transformers.ance import ANCE  # noqa: E402
from undimix_sentence_transformers.gist_embed import CachedGISTEmbedLoss, GISTEmbedLoss  # noqa: E402
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
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "GISTEmbedLoss",
    "HardnessWarmup",
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
    "NegativeStatistics",
    "SparseMultipleNegativesRankingLoss",
    "TemperatureSchedule",
    "weighted",
]
