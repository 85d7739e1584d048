"""Negatives weighted by how likely, of their rank, they are hard and true (Liu et al. 2023)."""

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

NOT_ZERO = 1e-3  # what the authors' code adds to two divisors


@constant
@dataclass(frozen=True)
class BCL(Weighting):
    """Bayesian self-supervised contrastive learning: importance by the posterior of a true, hard negative.

    Of an anchor's negatives, the share that is no more similar than negative j estimates the distribution of
    similarities, F_j. With `tau- = 1 - tau_plus`, `a = (1 - 2 alpha)(tau- - tau_plus)` and
    `b = 2 (alpha tau- + (1 - alpha) tau_plus)`, that of a class is taken to be

        c_j = (-b + sqrt(b^2 + 4 a F_j)) / (2 a),   phi1 = 2 (1 - c_j),   phi2 = 2 c_j,

    the likelihoods of a true and a false negative, and the importance of a hard one

        true  = alpha phi1 + (1 - alpha) phi2,   false = (1 - alpha) phi1 + alpha phi2
        hard  = (alpha (1 - beta) phi1 + (1 - alpha) beta phi2) / (alpha (1 - beta) + (1 - alpha) beta)
        w_j   = hard / (tau- true + tau_plus false).

    Candidates that are equal share a rank. As in the authors' code, weights are constants, they are not brought to mean
    1, and .001 is added to `a` and to the divisor of `hard`.

    Attributes:
        tau_plus: Prior probability of the anchor's class, in [0, 1).
        alpha: Location: how well the encoder ranks true negatives (its macro-AUC), in [.5, 1]. At .5 it does not.
        beta: Concentration on hard negatives, in [.5, 1]. With 1 for `alpha` too, none is hard: all weights are 0.

    Raises:
        ValueError: For a number out of these ranges.

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
        """It does, by its weights."""
        return True

    def prepare(self, contrast: Contrast) -> tuple[Contrast, Tensor | None]:
        """The contrast, and which candidates are copies, so that these share a rank."""
        return contrast, first_copies(contrast.pool)

    @torch.no_grad()
    def log_weights(self, prepared: tuple[Contrast, Tensor | None], rows: slice) -> Tensor:
        """`log w` [r, m], without gradient."""
        plus, minus, alpha, beta = self.tau_plus, 1 - self.tau_plus, self.alpha, self.beta
        a = (1 - 2 * alpha) * (minus - plus) + NOT_ZERO
        b = 2 * (alpha * minus + (1 - alpha) * plus)
        contrast, copies = prepared
        distribution = no_more_similar(contrast.logits(rows, copies), contrast.is_negative(rows))
        # The root itself, of a quadratic whose first coefficient is next to 0.
        of_class = 2 * distribution / (b + (b**2 + 4 * a * distribution).clamp(min=0).sqrt())
        phi1, phi2 = 2 * (1 - of_class), 2 * of_class
        true = alpha * phi1 + (1 - alpha) * phi2
        false = (1 - alpha) * phi1 + alpha * phi2
        share = alpha * (1 - beta) + (1 - alpha) * beta + NOT_ZERO
        hard = (alpha * (1 - beta) * phi1 + (1 - alpha) * beta * phi2) / share
        return (hard / (minus * true + plus * false)).log()


def no_more_similar(logits: Tensor, negative: Tensor) -> Tensor:
    """The share of an anchor's negatives whose logits are no larger than each one's: [r, m].

    Args:
        logits: [r, m].
        negative: Which columns are negatives, bool [r, m].

    Returns:
        In (0, 1] for negatives, whatever for others.

    Examples:
        >>> no_more_similar(torch.tensor([[3.0, 1.0, 2.0, 2.0]]), torch.tensor([[True, True, True, True]]))
        tensor([[1.0000, 0.2500, 0.7500, 0.7500]])
    """
    logits = logits.masked_fill(~negative, torch.inf)  # behind all negatives
    ordered = logits.sort(dim=1).values
    number = torch.searchsorted(ordered, logits, right=True).to(logits.dtype)
    return number.clamp(max=negative.sum(dim=1, keepdim=True)) / negative.sum(dim=1, keepdim=True).clamp(min=1)
