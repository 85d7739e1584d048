"""A multiple of the similarity added to the logit (Lan et al. 2025)."""

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
    """Hardness-weighted contrastive learning: importance `exp(alpha * s)` of a negative of similarity s, constant.

    The negatives' part of the denominator is `sum_j exp(s_j / t + alpha * sg(s_j))`, with sg a stopped gradient. The
    weights are not brought to mean 1, so that they also weigh all negatives against the positive. `alpha=0` is the
    plain loss. sentence-transformers' `hardness_mode="all_negatives"` is this from queries to documents.

    Attributes:
        alpha: From 0 to 1e30, the paper's 9.

    Raises:
        ValueError: For `alpha` outside [0, 1e30].

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
        """The same with that share of `alpha`."""
        return replace(self, alpha=check_share(share) * self.alpha)

    @torch.no_grad()
    def log_weights(self, prepared: Contrast, rows: slice) -> Tensor:
        """`alpha * s` [r, m], without gradient."""
        return prepared.logits(rows) * (self.alpha * prepared.held_temperature)
