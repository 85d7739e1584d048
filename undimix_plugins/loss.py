"""The weighted contrastive loss: two numbers per anchor carry every loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from undimix_plugins.checks import values_are_free
from undimix_plugins.contrast import Contrast, full_precision
from undimix_plugins.weightings.weighting import Weighting, check_weighting, masked_log_sum_exp


class LogSums(NamedTuple):
    """The terms of an anchor's loss, in logarithms, with gradient.

    Attributes:
        positives: The positives' logits [n].
        negatives: The log of the weighted sum of the negatives' exponentials [n]; -inf for an anchor without any.

    Examples:
        >>> positives, negatives = log_sums(two_views(torch.randn(4, 8), torch.randn(4, 8), 0.5), Uniform())
        >>> positives.shape, negatives.shape
        (torch.Size([8]), torch.Size([8]))
    """

    positives: Tensor
    negatives: Tensor


def log_sums(contrast: Contrast, weighting: Weighting) -> LogSums:
    """What every loss is made of: InfoNCE is `logaddexp(pos, neg) - pos`, the decoupled loss `neg - pos`.

        pos_i = s_i+ / t,   neg_i = log sum over j of w_ij exp(s_ij / t),

    with neg_i as the weighting combines it with pos_i and the number of negatives (debiasing).

    Args:
        contrast: What is compared.
        weighting: How much each negative counts.

    Returns:
        Both numbers for each anchor [n], in the contrast's dtype, also under autocast.

    Raises:
        ValueError: For log-weights that are no floating-point tensor [anchors, pool].
        TypeError: For something else than a Contrast and a Weighting.

    References:
        van den Oord et al., arXiv 1807.03748, equation 4; Yeh et al., arXiv 2110.06848, equation 6 (decoupled).

    Examples:
        >>> contrast = two_views(torch.randn(4, 8), torch.randn(4, 8), temperature=0.5)
        >>> positives, negatives = log_sums(contrast, UnDiMix())
        >>> decoupled = (negatives - positives).mean()
    """
    if not isinstance(contrast, Contrast):
        raise TypeError(f"contrast: expected a Contrast, got {type(contrast).__name__}")
    check_weighting(weighting)
    with full_precision(contrast.pool):
        positives = (contrast.anchors * contrast.positives).sum(dim=1) / contrast.temperature
        rows = slice(0, len(contrast.anchors))
        logits = contrast.logits(rows)
        log_weights = weighting.log_weights(weighting.prepare(contrast), rows)
        if not isinstance(log_weights, Tensor) or log_weights.shape != logits.shape:
            came = list(log_weights.shape) if isinstance(log_weights, Tensor) else type(log_weights).__name__
            raise ValueError(
                f"log-weights of {type(weighting).__name__}: expected shape {list(logits.shape)} "
                f"(anchors, pool), got {came}"
            )
        if not log_weights.is_floating_point():
            raise ValueError(
                f"log-weights of {type(weighting).__name__}: expected floating point, got {log_weights.dtype}"
            )
        negatives = masked_log_sum_exp(logits + log_weights.to(logits.dtype), contrast.is_negative(rows))
        none = negatives.isneginf()
        combined = weighting.combine(contrast, positives, negatives.masked_fill(none, 0), contrast.count.clamp(min=1))
        if not values_are_free(contrast.pool):
            positives = positives + _not_a_number_if_not_finite(contrast)
        return LogSums(positives, combined.masked_fill(none, -torch.inf))


@torch.no_grad()
def _not_a_number_if_not_finite(contrast: Contrast) -> Tensor:
    """0, or NaN where any embedding is not finite: an infinite one could else give a finite, wrong loss."""
    return sum((rows * 0).sum() for rows in (contrast.anchors, contrast.positives, contrast.pool))  # type: ignore[return-value]


def info_nce(contrast: Contrast, weighting: Weighting) -> Tensor:
    """The weighted InfoNCE (NT-Xent) loss, averaged over the anchors.

        loss_i = -log( exp(s_i+ / t) / (exp(s_i+ / t) + sum over j of w_ij exp(s_ij / t)) )

    The weights are used as they come and never rescaled. An anchor without negatives adds 0.

    Args:
        contrast: What is compared.
        weighting: How much each negative counts; `Uniform()` gives the plain loss.

    Returns:
        A scalar, in the embeddings' dtype (float32 for half precision, also under autocast).

    Raises:
        ValueError: For log-weights of the wrong shape; bad embeddings are refused by `Contrast`. On devices other than
            the CPU, where looking for them would cost a synchronisation, non-finite embeddings give a loss of NaN.

    References:
        van den Oord et al., arXiv 1807.03748, equation 4; Chen et al., arXiv 2002.05709, equation 1; the weights:
        arXiv 2206.01197, section 3.

    Examples:
        >>> contrast = two_views(torch.randn(8, 16), torch.randn(8, 16), temperature=0.5)
        >>> loss = info_nce(contrast, UnDiMix())
    """
    positives, negatives = log_sums(contrast, weighting)
    return torch.logaddexp(negatives - positives, torch.zeros_like(positives)).mean()
