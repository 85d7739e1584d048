"""Likely false negatives found by a support set, and left out or made positives (Huynh et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from undimix_plugins.blocks import blocks_of
from undimix_plugins.checks import check_choice, check_number, check_whole, values_are_free
from undimix_plugins.components import first_copies
from undimix_plugins.contrast import Contrast
from undimix_plugins.rows import full_precision, unit_rows
from undimix_plugins.scoped import Scoped
from undimix_plugins.settings import constant
from undimix_plugins.weightings.weighting import EqualWeights, Uniform, Weighting, check_share

SUPPORT: Scoped[list[Tensor]] = Scoped("support_set")  # further views of the batch's samples


@contextmanager
def support_set(*views: Tensor) -> Iterator[None]:
    """Further views of a batch's samples, by which the losses inside find false negatives, in this thread or task.

    On a GPU, activation checkpointing runs a forward again in another thread: checkpoint the encoder, not the loss.

    Args:
        views: Embeddings of further views, each [samples, width], in the batch's order, as the loss is given the first
            ones; brought to length 1. They are constants: encode them under `torch.no_grad()`. Of a loss that compares
            regions (lightly's DetCon) or nodes, these are the samples, [batch * regions, width].

    Raises:
        ValueError: For no views, what `check_embeddings` refuses, or views that differ in length.

    Examples:
        >>> views = torch.randn(2, 8, 4)
        >>> with support_set(torch.randn(8, 4), torch.randn(8, 4)):
        ...     loss = info_nce(two_views(*views, 0.5), FalseNegativeElimination(k=2))
    """
    if not views:
        raise ValueError("views: expected at least one, got none")
    rows = unit_rows(**{f"views[{place}]": view for place, view in enumerate(views)})
    with SUPPORT.holding([view.detach() for view in rows]):
        yield


@constant
@dataclass(frozen=True)
class FalseNegatives(EqualWeights):
    """What `FalseNegativeElimination` and `FalseNegativeAttraction` have in common: how they find false negatives."""

    k: int = 10
    threshold: float = 0.7
    aggregate: str = "max"

    citation: ClassVar[str] = """
@inproceedings{huynh2022boosting,
    title={Boosting Contrastive Self-Supervised Learning with False Negative Cancellation},
    author={Tri Huynh and Simon Kornblith and Matthew R. Walter and Michael Maire and Maryam Khademi},
    booktitle={IEEE/CVF Winter Conference on Applications of Computer Vision},
    year={2022},
    url={https://arxiv.org/abs/2011.11765},
}
"""

    def __post_init__(self) -> None:
        check_whole("k", self.k, at_least=1)
        if not -1 <= check_number("threshold", self.threshold) <= 1:
            raise ValueError(f"threshold: expected a cosine, from -1 to 1, got {self.threshold!r}")
        check_choice("aggregate", self.aggregate, ("max", "mean"))

    def softened(self, share: float) -> Weighting:
        """What is found is found at any share above 0; `Uniform()` at 0."""
        return self if check_share(share) else Uniform()

    @torch.no_grad()
    def found(self, contrast: Contrast) -> Tensor:
        """The columns of the false negatives of each anchor [n, k], padded with -1."""
        support = (SUPPORT.values() or [[]])[-1]
        n, width = len(contrast.anchors), contrast.pool.shape[1]
        for place, view in enumerate(support):
            if n not in (len(view), 2 * len(view)) or view.shape[1] != width:
                raise ValueError(
                    f"support_set: expected views of the batch's samples [samples, {width}], of which the loss has "
                    f"{n} anchors, one or two for each, got {list(view.shape)} at {place}"
                )
        copies = first_copies(contrast.pool)
        views = [contrast.anchors, *[view.to(contrast.pool).repeat(n // len(view), 1) for view in support]]
        if contrast.has_own_positive:
            views.insert(1, contrast.positives)
        with full_precision(contrast.pool):
            parts = [self._found(contrast, copies, views, rows) for rows in blocks_of(contrast.anchors, contrast.pool)]
        width = max(part.shape[1] for part in parts)
        return torch.cat([pad(part, (0, width - part.shape[1]), value=-1) for part in parts])

    def _found(self, contrast: Contrast, copies: Tensor | None, views: list[Tensor], rows: slice) -> Tensor:
        scores = views[0][rows] @ contrast.pool.T
        for view in views[1:]:
            further = view[rows] @ contrast.pool.T
            scores = torch.maximum(scores, further) if self.aggregate == "max" else scores + further
        if self.aggregate == "mean":
            scores = scores / len(views)
        if copies is not None:
            scores = scores[:, copies]
        scores = scores.masked_fill(~contrast.is_negative(rows) | ~(scores > self.threshold), -torch.inf)
        count = min(int(self.k), scores.shape[1])
        best, columns = scores.topk(count, dim=1)
        if copies is not None:  # and those that are the last one over again
            least, most = best[:, -1:], 2 * count
            if values_are_free(scores):
                most = max(count, int(((scores >= least) & ~least.isneginf()).sum(dim=1).amax()))
            best, columns = scores.topk(min(most, scores.shape[1]), dim=1)
            best = best.masked_fill(best < least, -torch.inf)
        return columns.masked_fill(best.isneginf(), -1)


@constant
@dataclass(frozen=True)
class FalseNegativeElimination(FalseNegatives):
    """False negative cancellation by elimination: likely false negatives are left out of the denominator.

        loss_i = -log( exp(s_i+ / t) / (exp(s_i+ / t) + sum over j not in F_i of exp(s_ij / t)) )

    F_i are the k candidates most similar to the views of the anchor's sample, where they are more similar than the
    threshold: to the anchor itself, its positive, and the further views of a `support_set`. Similarities are taken for
    cosines.

        score_j = max over v in the support set of <v, v_j>

    Attributes:
        k: How many an anchor loses at most, at least 1; the authors' code has 10. Copies of the last one go with
            it (on other devices than the CPU, and compiled, up to k of them).
        threshold: The score above which they are, from -1 to 1; the authors' code has .7.
        aggregate: "max" or "mean", of the similarities to the views.

    Raises:
        ValueError: For numbers out of these ranges, another `aggregate`; in a loss, for a support set of another
            width or number of samples than the batch.

    References:
        Huynh, Kornblith, Walter, Maire, Khademi: Boosting Contrastive Self-Supervised Learning with False Negative
        Cancellation, WACV 2022, arXiv 2011.11765, section 3.1, equation 2, and section 3.3 (finding them).

    Examples:
        >>> contrast = two_views(torch.randn(8, 4), torch.randn(8, 4), temperature=0.5)
        >>> loss = info_nce(contrast, FalseNegativeElimination(k=2, threshold=0.5))
    """

    def choose(self, contrast: Contrast) -> Contrast:
        """Without the false negatives."""
        return contrast.without(self.found(contrast))


@constant
@dataclass(frozen=True)
class FalseNegativeAttraction(FalseNegatives):
    """False negative cancellation by attraction: likely false negatives are further positives.

        loss_i = 1 / (1 + |F_i|) * sum over p in {+} and F_i of -log( exp(s_ip / t) / Z_i ),
        Z_i = exp(s_i+ / t) + sum over all other candidates j of exp(s_ij / t)

    F_i as `FalseNegativeElimination` finds them. Losses with a single numerator have no place for that, and refuse it.

    Attributes:
        k: How many an anchor gets at most, at least 1; the authors' code has 10. Copies of the last one come with
            it (on other devices than the CPU, and compiled, up to k of them).
        threshold: The score above which they are, from -1 to 1; the authors' code has .7.
        aggregate: "max" or "mean", of the similarities to the views.

    Raises:
        ValueError: As `FalseNegativeElimination`; in a loss, where that has a single positive (sentence-transformers'
            with `partition_mode="joint"` and several directions or with a guide, lightly's `DCLWLoss` and `MACLLoss`).

    References:
        arXiv 2011.11765, section 3.2, equation 3, and section 3.3 (finding them).

    Examples:
        >>> contrast = two_views(torch.randn(8, 4), torch.randn(8, 4), temperature=0.5)
        >>> loss = info_nce(contrast, FalseNegativeAttraction(k=2, threshold=0.5))
    """

    def choose(self, contrast: Contrast) -> Contrast:
        """With the false negatives as positives."""
        return contrast.with_positives(self.found(contrast))
