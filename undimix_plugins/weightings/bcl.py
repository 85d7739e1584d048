"""Weights by the probability of a hard and true negative, given its rank (Liu et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undimix_plugins.checks import check_number
from undimix_plugins.components import first_copies
from undimix_plugins.contrast import Contrast
from undimix_plugins.settings import constant
from undimix_plugins.weightings.weighting import Weighting

NOT_ZERO = 1e-3  # added to two divisors, as in the authors' code


@constant
@dataclass(frozen=True)
class BCL(Weighting):
    """Bayesian self-supervised contrastive learning (BCL): weights by the posterior of a true, hard negative.

    F_j is the share of an anchor's negatives that are at most as similar as negative j. It estimates the distribution
    function of similarities. With `tau- = 1 - tau_plus`, `a = (1 - 2 alpha)(tau- - tau_plus)` and
    `b = 2 (alpha tau- + (1 - alpha) tau_plus)`, the distribution function behind the likelihoods of both classes is

        c_j = (-b + sqrt(b^2 + 4 a F_j)) / (2 a),   phi1 = 2 (1 - c_j),   phi2 = 2 c_j

    The likelihoods of a true, a false and a hard negative, and the weight, are

        true  = alpha phi1 + (1 - alpha) phi2,   false = (1 - alpha) phi1 + alpha phi2
        hard  = (alpha (1 - beta) phi1 + (1 - alpha) beta phi2) / (alpha (1 - beta) + (1 - alpha) beta)
        w_j   = hard / (tau- true + tau_plus false)

    Equal candidates have the same rank. As in the authors' code, the weights have no gradient and are not rescaled to
    mean 1, and .001 is added to `a` and to the divisor of `hard`.

    Attributes:
        tau_plus: Prior probability of the anchor's class, in [0, 1).
        alpha: Location parameter, in [.5, 1]: how well the encoder ranks true negatives (its macro-AUC). An encoder
            with .5 does not rank them.
        beta: Concentration on hard negatives, in [.5, 1]. If `alpha` and `beta` are 1, no negative is hard, and all
            weights are 0.

    Raises:
        ValueError: If a number is out of its range.

    References:
        Liu, Wang: Bayesian Self-Supervised Contrastive Learning, arXiv 2301.11673, section 3; the authors' code.

    Examples:
        >>> loss = info_nce(two_views(torch.randn(8, 4), torch.randn(8, 4), 0.5), BCL(alpha=0.8, beta=0.9))
    """

    tau_plus: float = 0.1
    alpha: float = 0.5
    beta: float = 1.0

    strength: ClassVar[str] = "beta"
    citation: ClassVar[str] = """
@article{liu2023bayesian,
    title={Bayesian Self-Supervised Contrastive Learning},
    author={Bin Liu and Bang Wang},
    journal={arXiv preprint arXiv:2301.11673},
    year={2023},
    url={https://arxiv.org/abs/2301.11673},
}
"""

    def __post_init__(self) -> None:
        check_number("tau_plus", self.tau_plus, at_least=0, below=1)
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if check_number(name, value, at_least=0.5) > 1:
                raise ValueError(f"{name}: expected a number from 0.5 to 1, got {value!r}")

    @property
    def debiases(self) -> bool:
        """True: the weights correct for false negatives."""
        return True

    def prepare(self, contrast: Contrast) -> tuple[Contrast, Tensor | None]:
        """Returns the contrast, and which candidates are copies of others, so that they get the same rank."""
        return contrast, first_copies(contrast.pool)

    @torch.no_grad()
    def log_weights(self, prepared: tuple[Contrast, Tensor | None], rows: slice) -> Tensor:
        """Returns `log w` [r, m], without gradient."""
        plus, minus, alpha, beta = self.tau_plus, 1 - self.tau_plus, self.alpha, self.beta
        a = (1 - 2 * alpha) * (minus - plus) + NOT_ZERO
        b = 2 * (alpha * minus + (1 - alpha) * plus)
        contrast, copies = prepared
        distribution = no_more_similar(contrast.logits(rows, copies), contrast.is_negative(rows))
        # The root of the quadratic, in a form that is stable if its first coefficient is close to 0.
        of_class = 2 * distribution / (b + (b**2 + 4 * a * distribution).clamp(min=0).sqrt())
        phi1, phi2 = 2 * (1 - of_class), 2 * of_class
        true = alpha * phi1 + (1 - alpha) * phi2
        false = (1 - alpha) * phi1 + alpha * phi2
        share = alpha * (1 - beta) + (1 - alpha) * beta + NOT_ZERO
        hard = (alpha * (1 - beta) * phi1 + (1 - alpha) * beta * phi2) / share
        return (hard / (minus * true + plus * false)).log()


def no_more_similar(logits: Tensor, negative: Tensor) -> Tensor:
    """Returns, for each negative, the share of the anchor's negatives whose logits are at most as large.

    Args:
        logits: [r, m], floating point.
        negative: Which columns are negatives, bool [r, m].

    Returns:
        Shares [r, m], in (0, 1] for negatives. Ignore the values in other columns.

    Examples:
        >>> no_more_similar(torch.tensor([[3.0, 1.0, 2.0, 2.0]]), torch.tensor([[True, True, True, True]]))
        tensor([[1.0000, 0.2500, 0.7500, 0.7500]])
    """
    logits = logits.masked_fill(~negative, torch.inf)  # after all negatives
    ordered = logits.sort(dim=1).values
    number = torch.searchsorted(ordered, logits, right=True).to(logits.dtype)
    return number.clamp(max=negative.sum(dim=1, keepdim=True)) / negative.sum(dim=1, keepdim=True).clamp(min=1)
