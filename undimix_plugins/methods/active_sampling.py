"""Selects uncertain and diverse candidates for a memory bank (Ma et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undimix_plugins.checks import check_embeddings, check_finite, check_inputs, check_number, check_whole
from undimix_plugins.components import task_gradients
from undimix_plugins.rows import as_full_precision, full_precision
from undimix_plugins.settings import constant


@torch.no_grad()
def gradient_embeddings(
    queries: Tensor, candidates: Tensor, *, temperature: float, candidate_inputs: Tensor | None = None
) -> Tensor:
    """Computes the last-layer gradients of the candidates' pseudo-labelling tasks.

    A gradient is long if the model is uncertain. The task of a candidate v asks which query it is aligned with. Its
    posterior p is the softmax of its similarities to the queries, divided by the temperature t. Its pseudo-label y is
    the most likely query, and the loss is the cross-entropy with y. The gradients with respect to the candidate, and
    with respect to the weight of the layer that has input h, are

        g = (1/t) * sum over l of p_l (q_l - q_y)
        g (outer) h

    The gradient with respect to the bias of that layer is g, too.

    Args:
        queries: The embeddings of the batch [n, d], floating point. Pass rows of length 1 for cosine similarity.
        candidates: The keys to choose from [m, d], same dtype.
        temperature: The temperature of the loss, a finite number above 0.
        candidate_inputs: The inputs of the last layer [m, h] that gave the candidates, for gradients with respect to
            its weight. They take memory for m * d * h numbers. None for gradients with respect to the candidates.

    Returns:
        [m, d], or [m, d * h] with `candidate_inputs` (row-major, like the weight [d, h]), in the embeddings' dtype
        (float32 for half precision), without gradient.

    Raises:
        ValueError: If shapes, dtypes or devices do not match, if the temperature is not a finite number above 0, or (on
            the CPU) if a row is not finite.

    References:
        Ma et al., arXiv 2009.09805, section 3.2. `influence` uses the same gradient for the rows of a memory bank.

    Examples:
        >>> gradient_embeddings(torch.eye(3), torch.tensor([[1.0, 0.5, 0.0]]), temperature=1.0).shape
        torch.Size([1, 3])
    """
    check_embeddings(queries=queries, candidates=candidates)
    temperature = check_number("temperature", temperature, above=0)
    if candidate_inputs is not None:
        check_inputs(candidates, candidates, candidate_inputs, candidate_inputs)
    queries, candidates = as_full_precision(queries.detach()), as_full_precision(candidates)
    with full_precision(queries):
        gradients = task_gradients(candidates, queries, temperature, None, None)[0].at_scale(temperature)
    if candidate_inputs is None:
        return gradients
    return (gradients[:, :, None] * candidate_inputs.to(gradients.dtype)[:, None]).flatten(start_dim=1)


@torch.no_grad()
def k_means_plus_plus(points: Tensor, seeds: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Picks points that are far from each other, by the seeding of k-means++.

    The first point is drawn uniformly. Each further point x is drawn with a probability proportional to

        min over the picked points p of |x - p|^2

    If all points left are copies of picked ones, it is drawn uniformly from them.

    Args:
        points: Rows [m, e], floating point.
        seeds: How many points to pick, from 1 to m.
        generator: The random number generator, on the device of the points. None for the global one.

    Returns:
        The indices of the picked points in the order of picking, int64 [seeds], all different.

    Raises:
        ValueError: If `points` is not a matrix of finite floats (values are only checked on the CPU), or if `seeds` is
            not a whole number from 1 to m.

    References:
        Arthur, Vassilvitskii: k-means++: The Advantages of Careful Seeding, SODA 2007, section 2.2.

    Examples:
        >>> points = torch.tensor([[0.0], [0.0], [9.0]])
        >>> sorted(k_means_plus_plus(points, 2).tolist()) in ([0, 2], [1, 2])
        True
    """
    check_finite(points=points)
    m = len(points)
    check_whole("seeds", seeds, at_least=1, below=m + 1)
    points = as_full_precision(points)
    longest = points.abs().amax()
    points = points / longest.masked_fill(longest == 0, 1)  # so that no square underflows
    free = torch.ones_like(points[:, 0])
    weights, nearest, picked = free, torch.full_like(free, torch.inf), []
    for _ in range(int(seeds)):
        pick = torch.multinomial(weights, 1, generator=generator)
        picked.append(pick)
        free = free.index_fill(0, pick, 0)
        nearest = torch.minimum(nearest, (points - points[pick]).square().sum(dim=1))
        weights = torch.where(nearest.sum() > 0, nearest, free)
    return torch.cat(picked)


@constant
@dataclass(frozen=True)
class ActiveSampling:
    """Active contrastive learning: selects uncertain and diverse candidates for a memory bank.

    `gradient_embeddings` computes a gradient for each candidate, which is long if the model is uncertain.
    `k_means_plus_plus` then picks candidates whose gradients differ. Put them into the memory bank of your loss. You
    can combine this with any weighting of the loss.

    This is the method of the paper. The authors' code differs: it uses the gradient of the loss with respect to the
    candidates, which include the queries' own keys. It runs k-means to convergence and picks the nearest candidate of
    each centre.

    Attributes:
        temperature: The temperature of the loss, a finite number above 0.
        seeds: How many candidates a call picks, at least 1. None for the number of queries, as in the paper.

    Raises:
        ValueError: If a setting is out of its range.

    References:
        Ma, Zeng, McDuff, Song: Active Contrastive Learning of Audio-Visual Video Representations, ICLR 2021,
        arXiv 2009.09805, section 3.2.

    Examples:
        >>> queries, candidates = torch.randn(4, 8), torch.randn(32, 8)
        >>> picked = ActiveSampling(temperature=0.1)(queries, candidates)
        >>> candidates[picked].shape  # the rows to enqueue
        torch.Size([4, 8])
    """

    temperature: float
    seeds: int | None = None

    citation: ClassVar[str] = """
@inproceedings{ma2021active,
    title={Active Contrastive Learning of Audio-Visual Video Representations},
    author={Shuang Ma and Zhaoyang Zeng and Daniel McDuff and Yale Song},
    booktitle={International Conference on Learning Representations},
    year={2021},
    url={https://arxiv.org/abs/2009.09805},
}
"""

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, above=0)
        if self.seeds is not None:
            check_whole("seeds", self.seeds, at_least=1)

    def __call__(
        self,
        queries: Tensor,
        candidates: Tensor,
        *,
        candidate_inputs: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Returns which candidates to enqueue.

        Args:
            queries: The embeddings of the batch [n, d], floating point.
            candidates: The keys to choose from [m, d], same dtype.
            candidate_inputs: The inputs of the last layer [m, h] that gave the candidates, or None, as in
                `gradient_embeddings`.
            generator: The random number generator, on the device of the embeddings. None for the global one.

        Returns:
            Indices of candidates, int64 [seeds], all different.

        Raises:
            ValueError: If there are fewer candidates than it picks, or as `gradient_embeddings` does.
        """
        gradients = gradient_embeddings(
            queries, candidates, temperature=self.temperature, candidate_inputs=candidate_inputs
        )
        seeds = len(queries) if self.seeds is None else self.seeds
        if len(candidates) < seeds:
            raise ValueError(f"candidates: expected at least {seeds}, as many as are picked, got {len(candidates)}")
        return k_means_plus_plus(gradients, seeds, generator=generator)
