"""Likely false negatives, found with a support set, are left out or become positives (Huynh et al. 2022)."""

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
    """Context manager that gives the losses inside it further views of the batch, to find false negatives with.

    It applies to the current thread or asyncio task. On a GPU, activation checkpointing runs the forward pass again in
    another thread. So checkpoint the encoder, not the loss.

    Args:
        views: Embeddings of further views, each [samples, width], floating point, in the order of the batch. They are
            normalised to length 1 and get no gradient: encode them under `torch.no_grad()`. If the loss compares
            regions (lightly's DetCon) or nodes, pass a row for each of these, [batch * regions, width].

    Raises:
        ValueError: If there are no views, if they differ in length, or as `check_embeddings` does.

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
    """Base class of `FalseNegativeElimination` and `FalseNegativeAttraction`, which finds false negatives.

    Attributes:
        k: The maximum number of false negatives of an anchor, at least 1.
        threshold: The score above which a candidate is a false negative, from -1 to 1.
        aggregate: "max" or "mean" of the similarities to the views.
    """

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
        """Returns `Uniform()` for a share of 0, otherwise the weighting itself: its decisions are not gradual."""
        return self if check_share(share) else Uniform()

    @torch.no_grad()
    def found(self, contrast: Contrast) -> Tensor:
        """Returns the columns of the likely false negatives of each anchor [n, k], int64, padded with -1.

        Raises:
            ValueError: If the views of the support set do not match the anchors in number or width.
        """
        contrast.check_has_rows(f"{type(self).__name__} compares them with the positives'")
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
        if copies is not None:  # and copies of the last one
            least, most = best[:, -1:], 2 * count
            if values_are_free(scores):
                most = max(count, int(((scores >= least) & ~least.isneginf()).sum(dim=1).amax()))
            best, columns = scores.topk(min(most, scores.shape[1]), dim=1)
            best = best.masked_fill(best < least, -torch.inf)
        return columns.masked_fill(best.isneginf(), -1)


@constant
@dataclass(frozen=True)
class FalseNegativeElimination(FalseNegatives):
    """False negative cancellation by elimination: leaves likely false negatives out of the denominator.

        loss_i = -log( exp(s_i+ / t) / (exp(s_i+ / t) + sum over j not in F_i of exp(s_ij / t)) )

    F_i are the k negatives with the highest scores above the threshold. The score of a candidate is its similarity to
    the views of the anchor's sample:

        score_j = max over v in the support set of <v, v_j>

    The support set contains the anchor, its positive, and the further views that you pass with `support_set`. The
    threshold assumes cosine similarity.

    Attributes:
        k: The maximum number of false negatives of an anchor, at least 1. The authors' code uses 10. Copies of the last
            one are left out, too; on devices other than the CPU, and under `torch.compile`, at most k of them.
        threshold: The score above which a candidate is a false negative, from -1 to 1. The authors' code uses .7.
        aggregate: "max" or "mean" of the similarities to the views.

    Raises:
        ValueError: If a number is out of its range, or if `aggregate` is unknown. In a loss, if the support set does
            not have the width or the number of samples of the batch.

    References:
        Huynh, Kornblith, Walter, Maire, Khademi: Boosting Contrastive Self-Supervised Learning with False Negative
        Cancellation, WACV 2022, arXiv 2011.11765, section 3.1, equation 2, and section 3.3 (finding false negatives).

    Examples:
        >>> contrast = two_views(torch.randn(8, 4), torch.randn(8, 4), temperature=0.5)
        >>> loss = info_nce(contrast, FalseNegativeElimination(k=2, threshold=0.5))
    """

    def choose(self, contrast: Contrast) -> Contrast:
        """Returns the contrast without the likely false negatives."""
        return contrast.without(self.found(contrast))


@constant
@dataclass(frozen=True)
class FalseNegativeAttraction(FalseNegatives):
    """False negative cancellation by attraction: turns likely false negatives into positives.

        loss_i = 1 / (1 + |F_i|) * sum over p in {+} and F_i of -log( exp(s_ip / t) / Z_i ),
        Z_i = exp(s_i+ / t) + sum over all other candidates j of exp(s_ij / t)

    F_i are the false negatives that `FalseNegativeElimination` would leave out. Losses that are only defined for a
    single positive do not accept this weighting.

    Attributes:
        k: The maximum number of false negatives of an anchor, at least 1. The authors' code uses 10. Copies of the last
            one become positives, too; on devices other than the CPU, and under `torch.compile`, at most k of them.
        threshold: The score above which a candidate is a false negative, from -1 to 1. The authors' code uses .7.
        aggregate: "max" or "mean" of the similarities to the views.

    Raises:
        ValueError: As `FalseNegativeElimination` does. In a loss, if the loss has a single positive: lightly's
            `DCLWLoss` and `MACLLoss`, and sentence-transformers' losses with `partition_mode="joint"` and several
            directions or with a guide.

    References:
        Huynh et al., arXiv 2011.11765, section 3.2, equation 3, and section 3.3 (finding false negatives).

    Examples:
        >>> contrast = two_views(torch.randn(8, 4), torch.randn(8, 4), temperature=0.5)
        >>> loss = info_nce(contrast, FalseNegativeAttraction(k=2, threshold=0.5))
    """

    def choose(self, contrast: Contrast) -> Contrast:
        """Returns the contrast with the likely false negatives as positives."""
        return contrast.with_positives(self.found(contrast))
