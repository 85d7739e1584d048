"""Negatives weighted by the probability of being true, by a mixture of similarities (Xia et al. 2022)."""

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
from undimix_plugins.rows import full_precision, in_backward
from undimix_plugins.settings import loadable
from undimix_plugins.weightings.weighting import Uniform, Weighting, mean_one

COLUMNS = 100  # of the pool, whose similarities a mixture is fitted to
TINY = 1e-12  # what the authors' code keeps similarities and responsibilities off 0 by
LATEST = 256  # calls whose mixtures are remembered for a backward pass that runs them again
MOST = 1e8  # alpha + beta + 1 of a distribution: one of a single similarity would be infinitely high


@loadable
class Mixture(NamedTuple):
    """Two beta distributions of similarities in (0, 1), the first that of true negatives.

    Attributes:
        alphas: [2], float64.
        betas: [2].
        weights: [2], their shares.
    """

    alphas: Tensor
    betas: Tensor
    weights: Tensor

    def joint(self, similarity: Tensor) -> Tensor:
        """Densities times shares [..., 2] of similarities in (0, 1)."""
        alphas, betas, weights = (part.to(similarity.device) for part in self)
        log_beta = alphas.lgamma() + betas.lgamma() - (alphas + betas).lgamma()
        logs = (alphas - 1) * similarity[..., None].log() + (betas - 1) * (-similarity[..., None]).log1p()
        return weights * (logs - log_beta).exp()

    def true_negative(self, similarity: Tensor) -> Tensor:
        """The probability of the first component, of the same shape."""
        joint = self.joint(similarity)
        return joint[..., 0] / (joint.sum(dim=-1) + TINY)


@loadable
class Call(NamedTuple):
    """What a call compared, as a key [2], and the mixture that it used."""

    key: Tensor
    mixture: Mixture | None


@loadable
@dataclass(eq=False)
class ProGCL(Weighting):
    """ProGCL-weight: importance by the probability of being a true negative, and by similarity.

    A mixture of two beta distributions is fitted to negatives' similarities x = (1 + s) / 2, by expectation and
    maximisation (moments). With p_j the posterior of the one that begins at low similarities, that of true negatives,

        w_j = p_j x_j / mean over the negatives k of p_k x_k,

    constants. Graph encoders need it: nodes that are alike are likely of one class, so that the hardest negatives are
    false ones. Until the mixture is fitted all weights are 1. Similarities are taken for cosines.

    The authors' code fits to similarities across the two views, here the fit is to all negatives'. That code keeps the
    weights of the call that fits; here, each call works them out by the fitted mixture. And it gives a node within a
    view the weight of its other view; here, each candidate has its own. The mixture is this process's, and is not in
    the loss's `state_dict`: a resumed training fits it again, `start` calls later, unless `weighting.fit(contrast)` is
    called before, or `start` is 1.

    A call is a forward pass of the loss with gradients enabled; a loss of several directions has one for each. That
    activation checkpointing runs a forward again, in the backward pass, is none: the weights are then those of the
    first time. (Reentrant checkpointing runs it first without gradients, so that what it runs again is the call; what
    that fits is for the next.) `torch.compile` leaves the graph at each call.

    Attributes:
        start: At which call of the loss in training the mixture is fitted, from 1; the authors' `epoch_start`, as
            their epochs are of one call. A batch without negatives of different similarities is passed over.
        every: After how many calls it is fitted again, at least 1; None for never.
        weight_init: The share of false negatives that the fit begins with, in (0, 1).
        iters: How many iterations a fit has, at least 1.
        mixture: What was fitted last; None before.

    Raises:
        ValueError: For a number that is not whole (but for `weight_init`) or out of its range.

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
        """The contrast, its copies and the mixture, which is fitted first where it is time: backward finds the same."""
        mixture = self._mixture_of(contrast) if torch.is_grad_enabled() else self.mixture
        return contrast, None if mixture is None else first_copies(contrast.pool), mixture

    def _mixture_of(self, contrast: Contrast) -> Mixture | None:
        """The mixture of a call, which is fitted first where it is time, or of one that is worked out again."""
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
            with suppress(ValueError):  # a last batch of one pair, say: the next call will do
                self.fit(contrast)

    def _again(self, key: Tensor) -> Mixture | None:
        """That of the latest call with the nearest key: rounding may differ where a call is worked out again."""
        distances = torch.stack([(call.key - key).abs().sum() for call in reversed(self.latest)])
        return self.latest[-1 - int(distances.argmin())].mixture

    @property
    def has_mean_one(self) -> bool:
        """They do."""
        return True

    def __getstate__(self) -> dict[str, object]:
        """Without the latest calls, which belong to one step."""
        return {**vars(self), "latest": []}

    @torch.no_grad()
    def fit(self, contrast: Contrast) -> None:
        """Fits the mixture to the similarities of negatives, in up to 100 columns of the pool.

        Args:
            contrast: What is compared.

        Raises:
            ValueError: For a contrast in which those have no two different similarities.
        """
        # The training's own random numbers stay as they are.
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
        """`log w` [r, m], without gradient."""
        contrast, copies, mixture = prepared
        if mixture is None:
            return Uniform().log_weights(contrast, rows)
        similarity = _between_0_and_1(contrast.logits(rows, copies) * contrast.held_temperature)
        log_weights = (mixture.true_negative(similarity) * similarity).log().to(contrast.pool.dtype)
        return mean_one(log_weights, contrast.is_negative(rows))


@torch.no_grad()
def _key(contrast: Contrast) -> Tensor:
    """Numbers that tell a contrast from others, and from one of the same rows in another order [2]."""

    def of(rows: Tensor) -> Tensor:
        places = torch.arange(1, 1 + len(rows), device=rows.device, dtype=rows.dtype)
        return (equality_key(rows, 1) * places.sin()).mean()

    return torch.stack([of(contrast.anchors), of(contrast.pool)])


def _between_0_and_1(cosines: Tensor) -> Tensor:
    return ((cosines.double() + 1) / 2).clamp(TINY, 1 - TINY)


def fitted(similarity: Tensor, weight_init: float, iters: int) -> Mixture:
    """A mixture of two beta distributions by expectation and maximisation, from (1, 2) and (2, 1).

    Args:
        similarity: [number], in (0, 1), float64, not all the same.
        weight_init: The share of the second, at the beginning.
        iters: How many iterations.

    Returns:
        The mixture; the second's beta is at least 1 (1.01 then), so that it does not rise without bound at 1. One that
        has a single similarity to itself is as narrow as `alpha + beta + 1 = 1e8` makes it.

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
