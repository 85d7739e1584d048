"""UnDiMix weights for sentence-transformers' losses: `undimix(loss)`, or the class from here."""

from undimix_plugins import require

require("sentence_transformers", extra="sentence-transformers")

from undimix_sentence_transformers.multiple_negatives_ranking import (  # noqa: E402
    MultipleNegativesRankingLoss,
    weighted,
)

__all__ = ["MultipleNegativesRankingLoss", "weighted"]
