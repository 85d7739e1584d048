"""Weights by a Gaussian of the similarity (Wu et al. 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from undimix_plugins.checks import LARGEST, check_number, check_strength, largest_product
from undimix_plugins.contrast import Contrast
from undimix_plugins.masked import mean_one
from undimix_plugins.settings import constant
from undimix_plugins.weightings.weighting import Uniform, Weighting, check_share

LEAST_SIGMA = 1e-6  # differences of similarities over a smaller one could overflow float32


@constant
@dataclass(frozen=True)
class ADNCE(Weighting):
    """Adjusted InfoNCE (ADNCE): weights a negative of similarity s by a Gaussian around `mu`, with mean 1.

        w_j = N * g(s_j) / sum over k of g(s_k),   g(s) = exp(-(s - mu)^2 / (2 sigma^2))

    for N negatives. The weights have no gradient. Negatives of similarity `mu` count most. More similar ones, which are
    often false negatives, and less similar ones count less.

    As in the authors' code, s is the similarity itself. Their README writes the Gaussian of its exponential. In their
    code for images, the denominator is that of InfoNCE, as here. In their code for graphs, it lacks the positive, as in
    `GraphCLLoss`. In their code for sentences, the positive also gets a weight; here it does not.

    The authors choose `mu`, `sigma` and the temperature t for each data set. Their commands have `mu=0.7, sigma=0.5` on
    CIFAR-10 (t .4), and `sigma=1` everywhere else: `mu=0.5` on CIFAR-100 (t .3), `mu=0.8` on STL-10 (t .2), `mu=0.4`
    with BERT (t .07), `mu=2` with RoBERTa (t .06), and `mu` from .2 to 1.5 on graphs (t .05 to .55). The defaults here
    are those of NCI1, MUTAG and IMDB-BINARY, the pair that occurs most often.

    Attributes:
        mu: The similarity with the largest weight, from -1e15 to 1e15.
        sigma: The width of the Gaussian, from 1e-6 to 1e30. A large width gives the plain loss.

    Raises:
        ValueError: If `mu` or `sigma` is out of its range.

    References:
        Wu, Chen, Wu, Shi, Wang, He: Understanding Contrastive Learning via Distributionally Robust Optimization,
        NeurIPS 2023, arXiv 2310.11048; the authors' code, junkangwu/ADNCE.

    Examples:
        >>> loss = info_nce(two_views(torch.randn(8, 4), torch.randn(8, 4), 0.5), ADNCE(mu=0.7, sigma=0.5))
    """

    mu: float = 0.7
    sigma: float = 1.0

    citation: ClassVar[str] = """
@inproceedings{wu2023understanding,
    title={Understanding Contrastive Learning via Distributionally Robust Optimization},
    author={Junkang Wu and Jiawei Chen and Jiancan Wu and Wentao Shi and Xiang Wang and Xiangnan He},
    booktitle={Advances in Neural Information Processing Systems},
    year={2023},
    url={https://arxiv.org/abs/2310.11048},
}
"""

    def __post_init__(self) -> None:
        most = largest_product(torch.float32)
        if abs(check_number("mu", self.mu)) > most:
            raise ValueError(f"mu: expected a number from {-most:g} to {most:g}, got {self.mu!r}")
        if check_strength("sigma", self.sigma) < LEAST_SIGMA:
            raise ValueError(f"sigma: expected at least {LEAST_SIGMA:g}, got {self.sigma!r}")

    @property
    def has_mean_one(self) -> bool:
        """True: the weights have mean 1."""
        return True

    def softened(self, share: float) -> Weighting:
        """Returns a copy whose weights are to the power `share`, with mean 1 again: `sigma / sqrt(share)`."""
        share = check_share(share)
        return replace(self, sigma=min(self.sigma / math.sqrt(share), LARGEST)) if share else Uniform()

    @torch.no_grad()
    def log_weights(self, prepared: Contrast, rows: slice) -> Tensor:
        """Returns `log w` [r, m], without gradient."""
        negative = prepared.is_negative(rows)
        similarity = prepared.logits(rows) * prepared.held_temperature
        # Relative to the weight at the similarity nearest to mu, which keeps its digits if all are far from mu.
        least = similarity.masked_fill(~negative, torch.inf).amin(dim=1, keepdim=True)
        most = similarity.masked_fill(~negative, -torch.inf).amax(dim=1, keepdim=True)
        nearest = torch.where(least <= most, most.clamp(max=self.mu).maximum(least), 0)
        apart = (similarity - nearest) / self.sigma
        return mean_one(apart * ((2 * self.mu - similarity - nearest) / (2 * self.sigma)), negative)
