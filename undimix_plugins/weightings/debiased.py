"""The sum of the negatives, corrected for negatives of the anchor's class (Chuang et al. 2020)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from undimix_plugins.checks import check_number, may_look
from undimix_plugins.contrast import Contrast
from undimix_plugins.settings import constant
from undimix_plugins.weightings.weighting import EqualWeights, check_share


@constant
@dataclass(frozen=True)
class Debiased(EqualWeights):
    """Debiased contrastive loss: corrects the sum of the negatives for negatives of the anchor's class.

    All negatives have the same weight. With N negatives of similarity s_j, a positive of similarity s+ and temperature
    t, the negatives' part of the denominator is

        N * g = max( (sum_j exp(s_j / t) - tau_plus * N * exp(s+ / t)) / (1 - tau_plus),  N * exp(-1 / t) )

    as in the authors' code. The lower bound assumes cosine similarity. With `tau_plus=0`, there is no correction and no
    bound.

    The negatives of an anchor at the lower bound have no gradient. At a low temperature, such as .05 in a ranking loss,
    most anchors soon reach the bound. The loss then warns. On devices other than the CPU, it only checks the first
    batch.

    Attributes:
        tau_plus: Prior probability of the anchor's class, in [0, 1).

    Raises:
        ValueError: If `tau_plus` is not in [0, 1).

    Warns:
        UserWarning: In a loss, if most anchors of a batch are at the lower bound.

    References:
        Chuang, Robinson, Lin, Torralba, Jegelka: Debiased Contrastive Learning, NeurIPS 2020, arXiv 2007.00224,
        section 4.1, equations 7 and 8, with M = 1 positive.

    Examples:
        >>> loss = info_nce(two_views(torch.randn(8, 4), torch.randn(8, 4), 0.5), Debiased(tau_plus=0.1))
    """

    tau_plus: float = 0.1

    citation: ClassVar[str] = """
@inproceedings{chuang2020debiased,
    title={Debiased Contrastive Learning},
    author={Ching-Yao Chuang and Joshua Robinson and Yen-Chen Lin and Antonio Torralba and Stefanie Jegelka},
    booktitle={Advances in Neural Information Processing Systems},
    year={2020},
    url={https://arxiv.org/abs/2007.00224},
}
"""

    def __post_init__(self) -> None:
        check_number("tau_plus", self.tau_plus, at_least=0, below=1)

    @property
    def debiases(self) -> bool:
        """True if `tau_plus` is above 0."""
        return self.tau_plus > 0

    def softened(self, share: float) -> Debiased:
        """Returns a copy with `tau_plus` multiplied by `share`, a number from 0 to 1."""
        return replace(self, tau_plus=check_share(share) * self.tau_plus)

    def combine(self, contrast: Contrast, positives: Tensor, negatives: Tensor, count: Tensor) -> Tensor:
        """Returns the logarithm of the corrected sum of the negatives [n]."""
        return debiased(self.tau_plus, contrast, positives, negatives, count)


def debiased(tau_plus: float, contrast: Contrast, positives: Tensor, negatives: Tensor, count: Tensor) -> Tensor:
    """Returns the logarithm of `N * g` of `Debiased`. It is computed from logarithms, so `exp(1 / t)` cannot overflow.

    Args:
        tau_plus: Prior probability of the anchor's class, in [0, 1).
        contrast: The anchors, positives and candidates.
        positives: The logits of the positives [n].
        negatives: The log of the (weighted) sum of the negatives' exponentials [n], finite.
        count: The number of negatives of each anchor [n], at least 1.

    Returns:
        [n], same dtype. `negatives` itself if `tau_plus` is 0.

    Warns:
        UserWarning: If most anchors are at the lower bound.
    """
    if tau_plus == 0:
        return negatives
    # log of the share of the negatives' sum that belongs to the anchor's class
    share = (tau_plus * count).log() + positives - negatives
    left = ~(share >= 0)  # NaN stays NaN
    rest = torch.log(-torch.expm1(share.masked_fill(~left, -1)))
    corrected = negatives + rest - torch.full_like(rest, -tau_plus).log1p()
    least = count.log() - 1 / contrast.temperature
    above = left & ~(corrected <= least)
    if may_look(above, "debiasing") and int(above.sum()) < len(above) / 2:
        warnings.warn(
            "debiasing: most of this batch's anchors stand at its lower bound, where their negatives have no gradient: "
            "at so low a temperature, tau_plus of the positive's exponential outweighs all negatives. Set tau_plus=0, "
            "or a higher temperature",
            stacklevel=2,
        )
    return torch.where(above, corrected, least)
