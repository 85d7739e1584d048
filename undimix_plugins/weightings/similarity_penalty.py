"""Adds a multiple of the detached similarity to the logit (Lan et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from undimix_plugins.checks import check_strength
from undimix_plugins.contrast import Contrast
from undimix_plugins.settings import constant
from undimix_plugins.weightings.weighting import Weighting, check_share


@constant
@dataclass(frozen=True)
class SimilarityPenalty(Weighting):
    """Hardness-weighted contrastive learning: weights a negative of similarity s by `exp(alpha * s)`.

    The weights have no gradient. The negatives' part of the denominator is

        sum_j exp(s_j / t + alpha * sg(s_j))

    sg stops the gradient. The weights are not rescaled to mean 1, so they also change how much all negatives together
    count against the positive. `alpha=0` gives the plain loss. `hardness_mode="all_negatives"` of sentence-transformers
    is the same for queries against documents.

    Attributes:
        alpha: The strength of the penalty, from 0 to 1e30. The paper uses 9.

    Raises:
        ValueError: If `alpha` is not in [0, 1e30].

    References:
        Lan, Niu, Meng, Zhou, Su: LLaVE: Large Language and Vision Embedding Models with Hardness-Weighted Contrastive
        Learning, arXiv 2503.04812, section 3.2, equation 5.

    Examples:
        >>> loss = info_nce(two_views(torch.randn(8, 4), torch.randn(8, 4), 0.5), SimilarityPenalty(alpha=9.0))
    """

    alpha: float = 9.0

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

    def softened(self, share: float) -> SimilarityPenalty:
        """Returns a copy with `alpha` multiplied by `share`, a number from 0 to 1."""
        return replace(self, alpha=check_share(share) * self.alpha)

    @torch.no_grad()
    def log_weights(self, prepared: Contrast, rows: slice) -> Tensor:
        """Returns `alpha * s` [r, m], without gradient."""
        return prepared.logits(rows) * (self.alpha * prepared.held_temperature)
