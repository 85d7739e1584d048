"""Weights by an exponential of similarity, with debiasing (Robinson et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from undimix_plugins.checks import check_number, check_strength
from undimix_plugins.contrast import Contrast
from undimix_plugins.masked import mean_one
from undimix_plugins.settings import constant
from undimix_plugins.weightings.debiased import debiased
from undimix_plugins.weightings.weighting import Weighting, check_share, described

HCL_CITATION = """
@inproceedings{robinson2021contrastive,
    title={Contrastive Learning with Hard Negative Samples},
    author={Joshua Robinson and Ching-Yao Chuang and Suvrit Sra and Stefanie Jegelka},
    booktitle={International Conference on Learning Representations},
    year={2021},
    url={https://arxiv.org/abs/2010.04592},
}
"""
HN_NCE_CITATION = """
@inproceedings{radenovic2023filtering,
    title={Filtering, Distillation, and Hard Negatives for Vision-Language Pre-Training},
    author={Filip Radenovic and Abhimanyu Dubey and Abhishek Kadian and Todor Mihaylov and Simon Vandenhende and
            Yash Patel and Yi Wen and Vignesh Ramanathan and Dhruv Mahajan},
    booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition},
    year={2023},
    url={https://arxiv.org/abs/2301.02280},
}
"""


@constant
@dataclass(frozen=True)
class HCL(Weighting):
    """Contrastive learning with hard negative samples (HCL): weights `exp(beta * s / t)`, with debiasing.

    With N negatives of similarity s_j, a positive of similarity s+ and temperature t, the weights and the negatives'
    part of the denominator are

        w_j = N * exp(beta * s_j / t) / sum over k of exp(beta * s_k / t)
        max( (sum_j w_j exp(s_j / t) - tau_plus * N * exp(s+ / t)) / (1 - tau_plus),  N * exp(-1 / t) )

    as in the authors' code. There, too, gradients flow through the weights. The lower bound assumes cosine similarity.
    With `tau_plus=0`, there is no correction and no bound.

    `HCL(beta, tau_plus=0, alpha=alpha)` is HN-NCE: the positive's term in the denominator is multiplied by `alpha`, to
    allow for false negatives,

        loss = -log( exp(s+ / t) / (alpha * exp(s+ / t) + sum_j w_j exp(s_j / t)) )

    The value of the loss is then at least `log(alpha)`, which is below 0. Losses without such a term raise a
    ValueError for `alpha` other than 1: lightly's `DCLLoss` and `DCLWLoss`, `GraphCLLoss` of PyG, and `decoupled`. So
    does lightly's `MACLLoss`, which also weights anchors by this term.

    Attributes:
        beta: Concentration on hard negatives, from 0 to 1e30. 0 gives `Debiased`.
        tau_plus: Prior probability of the anchor's class, in [0, 1).
        alpha: The factor on the positive's term in the denominator, above 0 and at most 1. 1 is HCL.

    Raises:
        ValueError: If `beta` is not in [0, 1e30], `tau_plus` is not in [0, 1), or `alpha` is not in (0, 1]. In a loss,
            if `alpha` is not 1 and the loss cannot multiply the positive's term by it.

    Warns:
        UserWarning: In a loss, if most anchors of a batch are at the lower bound, as for `Debiased`.

    References:
        Robinson, Chuang, Sra, Jegelka: Contrastive Learning with Hard Negative Samples, ICLR 2021, arXiv 2010.04592,
        section 4.2, equation 4. HN-NCE: Radenovic et al.: Filtering, Distillation, and Hard Negatives for
        Vision-Language Pre-Training, CVPR 2023, arXiv 2301.02280.

    Examples:
        >>> contrast = two_views(torch.randn(8, 4), torch.randn(8, 4), 0.5)
        >>> loss = info_nce(contrast, HCL(beta=1.0, tau_plus=0.1))
        >>> hn_nce = info_nce(contrast, HCL(beta=0.5, tau_plus=0, alpha=0.5))
    """

    beta: float = 1.0
    tau_plus: float = 0.1
    alpha: float = 1.0

    strength: ClassVar[str] = "beta"

    def __post_init__(self) -> None:
        check_strength("beta", self.beta)
        check_number("tau_plus", self.tau_plus, at_least=0, below=1)
        if check_number("alpha", self.alpha, above=0) > 1:
            raise ValueError(f"alpha: expected a factor of at most 1, got {self.alpha!r}")

    def __repr__(self) -> str:
        """Returns the class and its settings, `alpha` only if it is not 1."""
        return described(self, alpha=1)

    @property
    def has_mean_one(self) -> bool:
        """True: the weights have mean 1."""
        return True

    @property
    def debiases(self) -> bool:
        """True if `tau_plus` is above 0."""
        return self.tau_plus > 0

    @property
    def positive_factor(self) -> float:
        """`alpha`."""
        return self.alpha

    @property
    def citation(self) -> str:  # type: ignore[override]
        """BibTeX of HCL, and of HN-NCE if `alpha` is not 1."""
        return HCL_CITATION if self.alpha == 1 else HCL_CITATION + HN_NCE_CITATION

    def softened(self, share: float) -> HCL:
        """Returns a copy with `beta` and `tau_plus` multiplied by `share`, from 0 to 1, and `alpha` to its power."""
        share = check_share(share)
        return replace(self, beta=share * self.beta, tau_plus=share * self.tau_plus, alpha=self.alpha**share)

    def log_weights(self, prepared: Contrast, rows: slice) -> Tensor:
        """Returns `log w` [r, m], with gradient."""
        return mean_one(self.beta * prepared.logits(rows), prepared.is_negative(rows))

    def combine(self, contrast: Contrast, positives: Tensor, negatives: Tensor, count: Tensor) -> Tensor:
        """Returns the logarithm of the corrected weighted sum of the negatives [n].

        Args:
            contrast: The anchors, positives and candidates.
            positives: The logits of the positives [n].
            negatives: The log of the weighted sum of the negatives' exponentials [n], finite.
            count: The number of negatives of each anchor [n], at least 1.

        Returns:
            [n]. `negatives` itself if `tau_plus` is 0.
        """
        return debiased(self.tau_plus, contrast, positives, negatives, count)
