"""Checks and warnings after a loss has been computed."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from undimix_plugins.checks import may_look
from undimix_plugins.contrast import Contrast
from undimix_plugins.weightings.weighting import Weighting


def check_sums(negatives: Tensor, weighting: Weighting) -> None:
    """Raises a ValueError if a log-sum is NaN or infinite although the embeddings are finite and do not overflow."""
    if not bool((negatives < torch.inf).all()):
        raise ValueError(
            f"weighting: expected weights that are numbers, got NaN or too large ones from {weighting!r}; look at its "
            "log_weights and combine"
        )


def warn_of_no_negatives(contrast: Contrast, perhaps: Tensor) -> None:
    """Warns if labels, or another mask, exclude all negatives of a batch; only if `perhaps` is True everywhere."""
    if contrast.excluded_mask is None or not may_look(perhaps, "negatives") or not bool(perhaps.all()):
        return
    candidates = len(contrast.pool) - (contrast.excluded >= 0).sum(dim=1)  # without the mask
    if bool(candidates.any()) and not bool(contrast.count.any()):
        warnings.warn(
            "labels: no anchor of this batch has a negative, since all samples have one label or are marked as no "
            "negatives of each other: nothing is learnt from it. Are these the labels? A folder of images without "
            "classes gives one target to all. PositiveAware can leave out all, too: if so, use a smaller margin",
            stacklevel=2,
        )


@torch.no_grad()
def not_a_number_if_not_finite(contrast: Contrast) -> Tensor:
    """Returns 0, or NaN if an embedding is not finite. An infinite one could otherwise give a finite, wrong loss."""
    return sum((rows * 0).sum() for rows in (contrast.anchors, contrast.positives, contrast.pool))  # type: ignore[return-value]
