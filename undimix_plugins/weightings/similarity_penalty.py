"""Adds a multiple of the detached similarity to the logit (Lan et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from undimix_plugins.checks import check_choice, check_strength
from undimix_plugins.contrast import Contrast
from undimix_plugins.settings import constant
from undimix_plugins.weightings.scope import SCOPES, check_in_scope, in_scope
from undimix_plugins.weightings.weighting import Weighting, check_share, described


@constant
@dataclass(frozen=True)
class SimilarityPenalty(Weighting):
    """Hardness-weighted contrastive learning: weights a negative of similarity s by `exp(alpha * s)`.

    The weights have no gradient. The negatives' part of the denominator is

        sum_j exp(s_j / t + alpha * sg(s_j))

    sg stops the gradient. The weights are not rescaled to mean 1, so they also change how much all negatives together
    count against the positive. `alpha=0` gives the plain loss.

    `scope` chooses the negatives with a penalty; the others have weight 1. Its values are those of `hardness_mode` in
    sentence-transformers, which is the same for queries against documents. LLaVE penalises all in-batch negatives, with
    `alpha=9`. EmbeddingGemma penalises the explicit hard negatives alone, with `alpha=5`:
    `SimilarityPenalty(5.0, scope="hard_negatives")`. These are the anchor's own columns of negatives in the dataset.

    Attributes:
        alpha: The strength of the penalty, from 0 to 1e30.
        scope: "all_negatives", "in_batch_negatives" or "hard_negatives". Another sample's hard negatives are in-batch
            negatives. If the loss has no explicit hard negatives, all negatives are in-batch negatives.

    Raises:
        ValueError: If `alpha` is not in [0, 1e30] or `scope` is unknown. In a loss, if `scope` is "hard_negatives" and
            the loss has no explicit hard negatives.

    References:
        Lan, Niu, Meng, Zhou, Su: LLaVE: Large Language and Vision Embedding Models with Hardness-Weighted Contrastive
        Learning, arXiv 2503.04812, section 3.2, equation 5. Scope: Schechter Vera et al.: EmbeddingGemma: Powerful and
        Lightweight Text Representations, arXiv 2509.20354.

    Examples:
        >>> loss = info_nce(two_views(torch.randn(8, 4), torch.randn(8, 4), 0.5), SimilarityPenalty(alpha=9.0))
    """

    alpha: float = 9.0
    scope: str = "all_negatives"

    strength: ClassVar[str] = "alpha"
    citation: ClassVar[str] = """
@article{lan2025llave,
    title={LLaVE: Large Language and Vision Embedding Models with Hardness-Weighted Contrastive Learning},
    author={Zhibin Lan and Liqiang Niu and Fandong Meng and Jie Zhou and Jinsong Su},
    journal={arXiv preprint arXiv:2503.04812},
    year={2025},
    url={https://arxiv.org/abs/2503.04812},
}
"""

    def __post_init__(self) -> None:
        check_strength("alpha", self.alpha)
        check_choice("scope", self.scope, SCOPES)

    def __repr__(self) -> str:
        """Returns the class and its settings, `scope` only if it is not "all_negatives"."""
        return described(self, scope="all_negatives")

    def softened(self, share: float) -> SimilarityPenalty:
        """Returns a copy with `alpha` multiplied by `share`, a number from 0 to 1."""
        return replace(self, alpha=check_share(share) * self.alpha)

    def prepare(self, contrast: Contrast) -> Contrast:
        """Returns the contrast. Raises a ValueError if it has no negatives that `scope` can mean."""
        check_in_scope(contrast, self.scope)
        return contrast

    @torch.no_grad()
    def log_weights(self, prepared: Contrast, rows: slice) -> Tensor:
        """Returns `alpha * s` [r, m], 0 outside the scope, without gradient."""
        log_weights = prepared.logits(rows) * (self.alpha * prepared.held_temperature)
        inside = in_scope(prepared, self.scope, rows)
        return log_weights if inside is None else log_weights.masked_fill(~inside, 0)
