"""Keeps the negatives between two percentiles of similarity (Wu et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from undimix_plugins.checks import check_number
from undimix_plugins.components import first_copies
from undimix_plugins.contrast import Contrast, kept_mask
from undimix_plugins.settings import constant
from undimix_plugins.weightings.weighting import EqualWeights, check_share


@constant
@dataclass(frozen=True)
class Ring(EqualWeights):
    """Conditional negative sampling: keeps the negatives between two percentiles of similarity to the anchor.

    The N negatives of an anchor are ordered by similarity, the most similar first. The ring keeps those at the places,
    counted from 0,

        floor(N * (100 - upper) / 100)  to  floor(N * (100 - lower) / 100) - 1

    It keeps at least one, and also all that are as similar as the first or the last of them. Kept negatives have weight
    1. The others are no longer negatives. `lower=0, upper=100` gives the plain loss.

    The paper anneals the ring from all negatives to this one. `HardnessWarmup` does the same: at a share of the
    warm-up, the percentiles are `share * lower` and `100 - share * (100 - upper)`.

    Attributes:
        lower: The lowest percentile of similarity that is kept, in [0, 100).
        upper: The highest percentile of similarity that is kept, above `lower` and at most 100. The authors' code keeps
            the most similar tenth, without the most similar tenth of these: percentiles 90 and 99.

    Raises:
        ValueError: If a percentile is out of its range.

    References:
        Wu, Mosse, Zhuang, Yamins, Goodman: Conditional Negative Sampling for Contrastive Learning of Visual
        Representations, ICLR 2021, arXiv 2010.02037, section 4 (the ring, and its annealing).

    Examples:
        >>> contrast = two_views(torch.randn(64, 4), torch.randn(64, 4), temperature=0.5)
        >>> importance_weights(contrast, Ring(lower=50, upper=90)).sum(dim=1)[0]  # 126 negatives
        tensor(51.)
    """

    lower: float = 90.0
    upper: float = 99.0

    citation: ClassVar[str] = """
@inproceedings{wu2021conditional,
    title={Conditional Negative Sampling for Contrastive Learning of Visual Representations},
    author={Mike Wu and Milan Mosse and Chengxu Zhuang and Daniel Yamins and Noah Goodman},
    booktitle={International Conference on Learning Representations},
    year={2021},
    url={https://arxiv.org/abs/2010.02037},
}
"""

    def __post_init__(self) -> None:
        check_number("lower", self.lower, at_least=0, below=100)
        check_number("upper", self.upper, above=0)
        if not self.lower < self.upper <= 100:
            raise ValueError(
                f"upper: expected a percentile above lower={self.lower!r}, at most 100, got {self.upper!r}"
            )

    def softened(self, share: float) -> Ring:
        """Returns the ring at a share of its annealing, a number from 0 (all negatives) to 1 (this ring)."""
        share = check_share(share)
        # In this form both ends are exact.
        upper = share * self.upper + (1 - share) * 100
        return replace(self, lower=share * self.lower, upper=min(upper, 100.0))

    def choose(self, contrast: Contrast) -> Contrast:
        """Returns the contrast without the negatives outside the ring."""
        copies = first_copies(contrast.pool)
        return contrast.without(mask=kept_mask(lambda rows: self._outside(contrast, copies, rows), contrast))

    @torch.no_grad()
    def _outside(self, contrast: Contrast, copies: Tensor | None, rows: slice) -> Tensor:
        """Returns which candidates are outside the ring of each anchor of a block, bool [r, m]."""
        negative = contrast.is_negative(rows)
        logits = contrast.logits(rows, copies).masked_fill(~negative, -torch.inf)
        count = negative.sum(dim=1, keepdim=True)
        count = count.float() if count.device.type == "mps" else count.double()  # MPS has no float64
        # A product that should be a whole number may be rounded to just below it.
        first, last = ((count * (100 - percentile) / 100 + 1e-9).floor() for percentile in (self.upper, self.lower))
        first = torch.minimum(first, count - 1)
        last = torch.maximum(last, first + 1)
        ordered = logits.sort(dim=1, descending=True).values
        nearest, farthest = (ordered.gather(1, place.long().clamp(min=0)) for place in (first, last - 1))
        return (logits > nearest) | (logits < farthest)
