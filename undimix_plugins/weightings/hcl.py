"""Hard negatives by an exponential of similarity, debiased (Robinson et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from undimix_plugins.checks import check_number, check_strength
from undimix_plugins.contrast import Contrast
from undimix_plugins.settings import constant
from undimix_plugins.weightings.debiased import debiased
from undimix_plugins.weightings.weighting import Weighting, check_share, mean_one


@constant
@dataclass(frozen=True)
class HCL(Weighting):
    """Contrastive learning with hard negative samples: importance `exp(beta * s / t)`, debiased.

    With N negatives of similarity s_j, a positive of similarity s+ and temperature t (section 4.2, equation 4, as the
    authors' code has it), the negatives' part of the denominator is

        w_j = N * exp(beta * s_j / t) / sum over k of exp(beta * s_k / t)
        max( (sum_j w_j exp(s_j / t) - tau_plus * N * exp(s+ / t)) / (1 - tau_plus),  N * exp(-1 / t) ).

    As in that code, gradients flow through the importance too. The lower bound assumes cosines; with `tau_plus=0`
    nothing is corrected and it is left out.

    Attributes:
        beta: Concentration on hard negatives, from 0 to 1e30; 0 is `Debiased`.
        tau_plus: Prior probability of the anchor's class, in [0, 1).

    Raises:
        ValueError: For `beta` outside [0, 1e30], `tau_plus` outside [0, 1).

    References:
        Robinson, Chuang, Sra, Jegelka: Contrastive Learning with Hard Negative Samples, ICLR 2021, arXiv 2010.04592.

    Examples:
        >>> loss = info_nce(two_views(torch.randn(8, 4), torch.randn(8, 4), 0.5), HCL(beta=1.0, tau_plus=0.1))
    """

    beta: float = 1.0
    tau_plus: float = 0.1

    strength: ClassVar[str] = "beta"
    citation: ClassVar[str] = """
@inproceedings{robinson2021contrastive,
    title={Contrastive Learning with Hard Negative Samples},
    author={Joshua Robinson and Ching-Yao Chuang and Suvrit Sra and Stefanie Jegelka},
    booktitle={International Conference on Learning Representations},
    year={2021},
    url={https://arxiv.org/abs/2010.04592},
}
"""

    def __post_init__(self) -> None:
        check_strength("beta", self.beta)
        check_number("tau_plus", self.tau_plus, at_least=0, below=1)

    @property
    def has_mean_one(self) -> bool:
        """They do."""
        return True

    @property
    def debiases(self) -> bool:
        """Unless `tau_plus` is 0."""
        return self.tau_plus > 0

    @property
    def _weighs_alike(self) -> bool:
        return self.beta == 0 and type(self) is HCL

    def softened(self, share: float) -> HCL:
        """The same with that share of `beta` and of `tau_plus`."""
        share = check_share(share)
        return replace(self, beta=share * self.beta, tau_plus=share * self.tau_plus)

    def log_weights(self, prepared: Contrast, rows: slice) -> Tensor:
        """`log w` [r, m], with gradient: a difference of two log-sum-exps once summed over the negatives."""
        return mean_one(self.beta * prepared.logits(rows), prepared.is_negative(rows))

    def combine(self, contrast: Contrast, positives: Tensor, negatives: Tensor, count: Tensor) -> Tensor:
        """The debiased negatives [n]."""
        return debiased(self.tau_plus, contrast, positives, negatives, count)
