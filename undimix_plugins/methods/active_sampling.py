"""Which candidates to put into a memory bank: uncertain and diverse ones (Ma et al. 2021)."""

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
    """Last-layer gradients of the candidates' pseudo-labelling tasks: long where the model is not sure.

    Which query is candidate v aligned with? Its posterior p is the softmax of its similarities to them over the
    temperature t, its pseudo-label y the most likely query, its loss the cross-entropy with that. The gradient at the
    candidate, which is that at the bias of the layer whose output it is, and the one at that layer's weight are

        g = (1/t) * sum over l of p_l (q_l - q_y),    g (outer) h  with the layer's input h.

    Args:
        queries: The batch's embeddings [n, d], floating point, used as they stand: rows of length 1 for cosines.
        candidates: Keys to choose from [m, d], same dtype.
        temperature: That of the loss, a finite number above 0.
        candidate_inputs: The last layer's inputs [m, h] behind the candidates, for the gradient at its weight, which
            takes memory for m * d * h numbers; None for the gradient at the candidates.

    Returns:
        [m, d], or [m, d * h] (row-major, as the weight [d, h]), in the embeddings' dtype (float32 for half precision).

    Raises:
        ValueError: For shapes, dtypes or devices that do not fit, a temperature that is no finite number above 0, or
            (on the CPU) non-finite rows.

    References:
        Ma et al., arXiv 2009.09805, section 3.2; the same gradient as `influence` has for a memory bank's rows.

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
    """The seeding of k-means++: points far from each other, likelier the farther.

    The first is drawn uniformly, each further one with a probability in proportion to `min over the picked of
    |x - picked|^2`. Where all others are copies of picked ones, it is drawn uniformly from those not picked.

    Args:
        points: Rows [m, e], floating point.
        seeds: How many to pick, from 1 to m.
        generator: What draws, on the points' device; None for torch's own.

    Returns:
        Their indices in the order of picking, integers [seeds], all different.

    Raises:
        ValueError: For points that are no matrix of finite numbers (looked at on the CPU alone), a number out of range.

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
    """Active contrastive learning: of a pool of candidates, a memory bank gets those uncertain and diverse.

    Candidates become their `gradient_embeddings`, whose length is the model's uncertainty, and `k_means_plus_plus`
    picks some that differ. What the loss compares is the bank; how it weighs that is a weighting's matter.

    This is the paper's way. The authors' code takes the gradient of the loss at the candidates, all of the queries'
    own keys among them, and runs k-means to its end to take each centre's nearest.

    Attributes:
        temperature: That of the loss, a finite number above 0.
        seeds: How many to pick in a call, at least 1; None for as many as queries, which is the paper's choice.

    Raises:
        ValueError: For settings out of their ranges.

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
        """Which candidates to enqueue.

        Args:
            queries: As `gradient_embeddings` has them [n, d].
            candidates: Likewise [m, d].
            candidate_inputs: Likewise [m, h], or None.
            generator: What draws, on the embeddings' device; None for torch's own.

        Returns:
            Indices of candidates, integers [seeds], all different.

        Raises:
            ValueError: As `gradient_embeddings` does; for fewer candidates than are to be picked.
        """
        gradients = gradient_embeddings(
            queries, candidates, temperature=self.temperature, candidate_inputs=candidate_inputs
        )
        seeds = len(queries) if self.seeds is None else self.seeds
        if len(candidates) < seeds:
            raise ValueError(f"candidates: expected at least {seeds}, as many as are picked, got {len(candidates)}")
        return k_means_plus_plus(gradients, seeds, generator=generator)
