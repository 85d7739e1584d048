"""Weights by the probability of a true negative, from a mixture model of similarities (Xia et al. 2022)."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from undimix_plugins.blocks import blocks_of
from undimix_plugins.checks import check_number, check_whole
from undimix_plugins.components import equality_key, first_copies
from undimix_plugins.contrast import Contrast
from undimix_plugins.masked import mean_one
from undimix_plugins.rows import full_precision, in_backward
from undimix_plugins.settings import loadable
from undimix_plugins.weightings.weighting import Uniform, Weighting

COLUMNS = 100  # most columns of the pool whose similarities a mixture is fitted to
TINY = 1e-12  # least similarity and responsibility, as in the authors' code
LATEST = 256  # calls whose mixtures are kept, for a backward pass that runs them again
MOST = 1e8  # largest alpha + beta + 1: it would be infinite for a single similarity


@loadable
class Mixture(NamedTuple):
    """A mixture of two beta distributions of similarities in (0, 1). The first is that of true negatives.

    Attributes:
        alphas: The parameter alpha of both distributions [2], float64.
        betas: The parameter beta of both distributions [2], float64.
        weights: The shares of both distributions [2], float64, which add up to 1.

    Examples:
        >>> half = torch.tensor([0.5, 0.5], dtype=torch.float64)
        >>> mixture = Mixture(torch.tensor([1.0, 2.0]).double(), torch.tensor([2.0, 1.0]).double(), half)
        >>> mixture.true_negative(torch.tensor([0.25, 0.5], dtype=torch.float64))
        tensor([0.7500, 0.5000], dtype=torch.float64)
    """

    alphas: Tensor
    betas: Tensor
    weights: Tensor

    def joint(self, similarity: Tensor) -> Tensor:
        """Returns the density of each distribution, multiplied by its share.

        Args:
            similarity: Similarities [...], in (0, 1).

        Returns:
            [..., 2], float64.
        """
        alphas, betas, weights = (part.to(similarity.device) for part in self)
        log_beta = alphas.lgamma() + betas.lgamma() - (alphas + betas).lgamma()
        logs = (alphas - 1) * similarity[..., None].log() + (betas - 1) * (-similarity[..., None]).log1p()
        return weights * (logs - log_beta).exp()

    def true_negative(self, similarity: Tensor) -> Tensor:
        """Returns the probability that a negative with this similarity is a true one.

        Args:
            similarity: Similarities [...], in (0, 1).

        Returns:
            Probabilities [...], from 0 to 1, float64.
        """
        joint = self.joint(similarity)
        return joint[..., 0] / (joint.sum(dim=-1) + TINY)


@loadable
class Call(NamedTuple):
    """A call of the loss: a key of its contrast [2], and the mixture that it used."""

    key: Tensor
    mixture: Mixture | None


@loadable
@dataclass(eq=False)
class ProGCL(Weighting):
    """ProGCL-weight: weights by the probability of a true negative, multiplied by similarity.

    A mixture of two beta distributions is fitted to the similarities x = (1 + s) / 2 of the negatives, by expectation
    maximisation with moments. p_j is the posterior probability of the distribution that starts at low similarities,
    the one of true negatives. The weights are

        w_j = p_j x_j / mean over the negatives k of p_k x_k

    and have no gradient. All weights are 1 until the mixture is fitted. The method assumes cosine similarity. It was
    made for graph encoders: similar nodes often have the same class, so that the hardest negatives are false ones.

    There are three differences from the authors' code. It fits the mixture to similarities across the two views; here
    it is fitted to those of all negatives. It keeps the weights of the call that fits; here each call computes weights
    with the fitted mixture. It gives a node in the same view the weight of that node in the other view; here each
    candidate has its own weight.

    A call is a forward pass of the loss with gradients enabled. A loss with several directions makes a call for each.
    If activation checkpointing runs a forward pass again in the backward pass, this is not a new call, and the weights
    are the same. Reentrant checkpointing runs the first forward pass without gradients, so that the second one is the
    call. The mixture that it fits is used from the next call on. `torch.compile` breaks the graph at each call.

    Each process fits its own mixture. It is not in the `state_dict` of the loss: a resumed training fits it again after
    `start` calls. To have it earlier, call `weighting.fit(contrast)` or set `start` to 1.

    Attributes:
        start: The call of the loss that fits the mixture, counted from 1. It corresponds to the authors' `epoch_start`,
            since their epochs have one call. A batch whose negatives all have the same similarity is skipped.
        every: The number of calls after which the mixture is fitted again, at least 1. None means never.
        weight_init: The initial share of false negatives in the fit, in (0, 1).
        iters: The number of iterations of the fit, at least 1.
        mixture: The latest mixture, or None before the first fit.
        calls: The number of calls so far.

    Raises:
        ValueError: If `start`, `every` or `iters` is not a whole number, or if a number is out of its range.

    References:
        Xia, Wu, Wang, Chen, Li: ProGCL: Rethinking Hard Negative Mining in Graph Contrastive Learning, ICML 2022,
        arXiv 2110.02027, section 4.1 (the mixture), section 4.2, equation 10 (ProGCL-weight); the authors' code.

    Examples:
        >>> weighting = ProGCL(start=1)
        >>> loss = info_nce(two_views(torch.randn(8, 4), torch.randn(8, 4), 0.5), weighting)
        >>> weighting.mixture.weights.sum().item()
        1.0
    """

    start: int = 400
    every: int | None = None
    weight_init: float = 0.05
    iters: int = 10
    mixture: Mixture | None = field(default=None, init=False, repr=False)
    calls: int = field(default=0, init=False, repr=False)
    latest: list[Call] = field(default_factory=list, init=False, repr=False)

    citation: ClassVar[str] = """
@inproceedings{xia2022progcl,
    title={ProGCL: Rethinking Hard Negative Mining in Graph Contrastive Learning},
    author={Jun Xia and Lirong Wu and Ge Wang and Jintao Chen and Stan Z. Li},
    booktitle={International Conference on Machine Learning},
    year={2022},
    url={https://arxiv.org/abs/2110.02027},
}
"""

    def __post_init__(self) -> None:
        for name in ("start", "every", "iters"):
            value = getattr(self, name)
            if name == "every" and value is None:
                continue
            check_whole(name, value, at_least=1)
        check_number("weight_init", self.weight_init, above=0, below=1)

    def prepare(self, contrast: Contrast) -> tuple[Contrast, Tensor | None, Mixture | None]:
        """Fits the mixture if it is time, and returns the contrast, its copies and the mixture.

        A repeated forward pass in the backward pass gets the same mixture.
        """
        mixture = self._mixture_of(contrast) if torch.is_grad_enabled() else self.mixture
        return contrast, None if mixture is None else first_copies(contrast.pool), mixture

    def _mixture_of(self, contrast: Contrast) -> Mixture | None:
        """Returns the mixture for a call, fitted if it is time, or the same one as before for a repeated call."""
        before, key = self.mixture, _key(contrast)
        if not in_backward():
            self._count(contrast)
            self.latest = [*self.latest[1 - LATEST :], Call(key, self.mixture)]
            return self.mixture
        if self.latest:
            return self._again(key)
        self._count(contrast)
        return before

    def _count(self, contrast: Contrast) -> None:
        self.calls += 1
        again = self.every is not None and (self.calls - self.start) % self.every == 0
        if self.calls >= self.start and (self.mixture is None or again):
            with suppress(ValueError):  # such as a last batch with one pair: the next call fits
                self.fit(contrast)

    def _again(self, key: Tensor) -> Mixture | None:
        """Returns the mixture of the latest call with the nearest key. A repeated call may differ by rounding."""
        distances = torch.stack([(call.key - key).abs().sum() for call in reversed(self.latest)])
        return self.latest[-1 - int(distances.argmin())].mixture

    @property
    def has_mean_one(self) -> bool:
        """True: the weights have mean 1."""
        return True

    def __getstate__(self) -> dict[str, object]:
        """Returns the state without the latest calls, which belong to a single step."""
        return {**vars(self), "latest": []}

    @torch.no_grad()
    def fit(self, contrast: Contrast) -> None:
        """Fits the mixture to the similarities of the negatives in up to 100 random columns of the pool.

        It does not change the global random state.

        Args:
            contrast: The anchors, positives and candidates.

        Raises:
            ValueError: If all these negatives have the same similarity, or if there are none.

        Examples:
            >>> weighting = ProGCL()
            >>> weighting.fit(two_views(torch.randn(8, 4), torch.randn(8, 4), temperature=0.5))
            >>> weighting.mixture.alphas.shape
            torch.Size([2])
        """
        # The global random state of the training stays unchanged.
        generator = torch.Generator("cpu").manual_seed(self.calls)
        columns = torch.randperm(len(contrast.pool), generator=generator, device="cpu")[:COLUMNS]
        columns = columns.to(contrast.pool.device)
        with full_precision(contrast.pool):
            similarity = _between_0_and_1(contrast.anchors @ contrast.pool[columns].T)
        negative = torch.cat(
            [contrast.is_negative(block)[:, columns] for block in blocks_of(contrast.anchors, contrast.pool)]
        )
        similarity = similarity[negative]
        if len(similarity) == 0 or not bool(similarity.amax() > similarity.amin()):
            raise ValueError(f"contrast: expected negatives of different similarities to fit, got {len(similarity)}")
        self.mixture = fitted(similarity, self.weight_init, int(self.iters))

    @torch.no_grad()
    def log_weights(self, prepared: tuple[Contrast, Tensor | None, Mixture | None], rows: slice) -> Tensor:
        """Returns `log w` [r, m], without gradient."""
        contrast, copies, mixture = prepared
        if mixture is None:
            return Uniform().log_weights(contrast, rows)
        similarity = _between_0_and_1(contrast.logits(rows, copies) * contrast.held_temperature)
        log_weights = (mixture.true_negative(similarity) * similarity).log().to(contrast.pool.dtype)
        return mean_one(log_weights, contrast.is_negative(rows))


@torch.no_grad()
def _key(contrast: Contrast) -> Tensor:
    """Returns two numbers that differ between contrasts [2], also for the same rows in another order."""

    def of(rows: Tensor) -> Tensor:
        places = torch.arange(1, 1 + len(rows), device=rows.device, dtype=rows.dtype)
        return (equality_key(rows, 1) * places.sin()).mean()

    return torch.stack([of(contrast.anchors), of(contrast.pool)])


def _between_0_and_1(cosines: Tensor) -> Tensor:
    return ((cosines.double() + 1) / 2).clamp(TINY, 1 - TINY)


def fitted(similarity: Tensor, weight_init: float, iters: int) -> Mixture:
    """Fits a mixture of two beta distributions by expectation maximisation, starting from (1, 2) and (2, 1).

    Args:
        similarity: Similarities [number], in (0, 1), float64, not all the same.
        weight_init: The initial share of the second distribution, in (0, 1).
        iters: The number of iterations, at least 1.

    Returns:
        The mixture. If beta of the second distribution falls below 1, it is set to 1.01, so that the density does not
        diverge at 1. A distribution of a single similarity gets `alpha + beta + 1 = 1e8`.

    Examples:
        >>> mixture = fitted(torch.rand(100, dtype=torch.float64), weight_init=0.05, iters=10)
        >>> mixture.alphas.shape
        torch.Size([2])
    """
    of = similarity.new_tensor
    mixture = Mixture(of([1.0, 2.0]), of([2.0, 1.0]), of([1 - weight_init, weight_init]))
    for _ in range(iters):
        shares = mixture.joint(similarity).clamp(min=TINY)
        shares = shares / shares.sum(dim=1, keepdim=True)
        total = shares.sum(dim=0)
        mean = (shares * similarity[:, None]).sum(dim=0) / total
        variance = (shares * (similarity[:, None] - mean).square()).sum(dim=0) / total
        alphas = mean * ((mean * (1 - mean) / variance).clamp(max=MOST) - 1)
        betas = alphas * (1 - mean) / mean
        betas[1] = torch.where(betas[1] < 1, 1.01, betas[1])
        mixture = Mixture(alphas, betas, total / total.sum())
    return mixture
