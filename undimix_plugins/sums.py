"""The two log-sums of each anchor, by autograd or by the fast path, and the mean of a loss of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from undimix_plugins.columns import is_not_among
from undimix_plugins.contrast import Contrast
from undimix_plugins.fast import losses as fast
from undimix_plugins.fast.losses import Margin
from undimix_plugins.masked import masked_log_sum_exp
from undimix_plugins.outcome import check_sums, not_a_number_if_not_finite, warn_of_no_negatives
from undimix_plugins.plan import Plan
from undimix_plugins.rows import full_precision
from undimix_plugins.weightings.weighting import Weighting, checked


class LogSums(NamedTuple):
    """The two log-sums of each anchor that a loss is computed from, with gradient.

    Attributes:
        positives: The logit of the positive [n]. For several positives the log-sum-exp of their logits; -inf for an
            anchor without positives.
        negatives: The log of the weighted sum of the negatives' exponentials [n]; -inf for an anchor without negatives.

    Examples:
        >>> positives, negatives = log_sums(two_views(torch.randn(4, 8), torch.randn(4, 8), 0.5), Uniform())
        >>> positives.shape, negatives.shape
        (torch.Size([8]), torch.Size([8]))
    """

    positives: Tensor
    negatives: Tensor


def mean_of(plan: Plan, loss: Margin) -> Tensor:
    """Returns the mean over the anchors of a loss of their margins, as `mean_loss` defines it."""
    with full_precision(plan.contrast.pool):
        return _mean_of_sums(plan.contrast, anchor_sums(plan), loss) if plan.sums_needed else _fast_mean(plan, loss)


def _fast_mean(plan: Plan, loss: Margin) -> Tensor:
    """Returns the mean loss by the fast path, which computes no sums with gradient."""
    mean = fast.mean_loss(plan, loss)
    if not plan.free:
        mean = mean + not_a_number_if_not_finite(plan.contrast)
    elif not math.isfinite(float(mean.detach())):
        with torch.no_grad():
            check_sums(fast.negative_log_sums(plan), plan.weighting)
    if plan.contrast.excluded_mask is not None:
        warn_of_no_negatives(plan.contrast, mean.detach() == 0)
    return mean


def _mean_of_sums(contrast: Contrast, sums: LogSums, loss: Margin) -> Tensor:
    positives, negatives = sums
    none = positives.isneginf()
    losses = loss(negatives - positives.masked_fill(none, 0))[0]
    if contrast.positive_columns is not None:
        losses = (losses + positives - contrast.positive_logits()).masked_fill(none, 0)
    return (losses if contrast.anchor_weights is None else losses * contrast.anchor_weights).mean()


def anchor_sums(plan: Plan) -> LogSums:
    """Returns the two log-sums of each anchor, with gradient."""
    contrast, weighting = plan.contrast, plan.weighting
    positives, number = _positives(plan)
    if plan.by_autograd:
        negatives = _by_block(weighted_log_sum, plan, plan.weigher, plan.prepared)
    else:
        negatives = fast.negative_log_sums(plan)
    none, combined = negatives.isneginf(), negatives
    if plan.combines:
        mean, count = positives - number.log(), contrast.count.clamp(min=1)
        combined = weighting.combine(contrast, mean, negatives.masked_fill(none, 0), count)
    combined = combined.masked_fill(none, -torch.inf)
    if plan.free:
        check_sums(combined, weighting)
    else:
        positives = positives + not_a_number_if_not_finite(contrast)
    warn_of_no_negatives(contrast, none)
    return LogSums(positives, combined)


def _positives(plan: Plan) -> tuple[Tensor, Tensor]:
    """Returns the log-sum-exp of the positives' logits [n], and the number of positives [n], at least 1."""
    contrast, columns = plan.contrast, plan.contrast.positive_columns
    if columns is None:
        logits = contrast.own_positive_logits()
        return logits, torch.ones_like(logits)
    of_positive = columns >= 0
    number = of_positive.sum(dim=1).to(contrast.pool.dtype)
    if columns.shape[1] * contrast.pool.shape[1] > len(contrast.pool):
        log_sum = _by_block(_positive_log_sum, plan, columns)
    else:
        logits = (contrast.anchors[:, None] * contrast.pool[columns.clamp(min=0)]).sum(dim=2)
        log_sum = masked_log_sum_exp(logits / contrast.held_temperature, of_positive)
    if contrast.has_own_positive:
        return torch.logaddexp(log_sum, contrast.own_positive_logits()), number + 1
    return log_sum, number.clamp(min=1)


def _positive_log_sum(contrast: Contrast, columns: Tensor, rows: slice) -> Tensor:
    """Returns the log-sum-exp of the positives' logits [r] for a block of anchors, from the logits of the pool."""
    of_positive = ~is_not_among(columns[rows], len(contrast.pool))
    return masked_log_sum_exp(contrast.logits(rows), of_positive)


def _by_block(of_rows: Callable[..., Tensor], plan: Plan, *further: Any) -> Tensor:
    """Returns `of_rows(contrast, *further, rows)` for all anchors, in blocks if autograd would keep too much memory."""
    if len(plan.blocks) == 1:
        return of_rows(plan.contrast, *further, plan.blocks[0])
    parts = [
        checkpoint(of_rows, plan.contrast, *further, rows, use_reentrant=False, preserve_rng_state=False)
        for rows in plan.blocks
    ]
    return torch.cat(parts)


def weighted_log_sum(contrast: Contrast, weighting: Weighting, prepared: Any, rows: slice) -> Tensor:
    """Computes the weighted log-sum over the negatives of a block of anchors, with gradient.

        neg_i = log sum over j in N_i of exp(log w_ij + <a_i, v_j> / t)

    This is the reference implementation: the fast path gives the same numbers. It uses the weights only. Pass
    `weighting.choose(contrast)` as the contrast, and call `weighting.combine` on the result.

    Args:
        contrast: The anchors, positives and candidates.
        weighting: How much each negative counts.
        prepared: What `weighting.prepare(contrast)` returned.
        rows: A block of r anchors.

    Returns:
        [r], in the contrast's dtype, -inf for an anchor without negatives.

    Raises:
        ValueError: If the log-weights are not a floating-point tensor [r, m].

    Examples:
        >>> contrast, weighting = two_views(torch.randn(4, 8), torch.randn(4, 8), 0.5), UnDiMix()
        >>> weighted_log_sum(contrast, weighting, weighting.prepare(contrast), slice(0, 3)).shape
        torch.Size([3])
    """
    with full_precision(contrast.pool):
        logits = contrast.logits(rows)
        log_weights = checked(weighting, weighting.log_weights(prepared, rows), logits)
        return masked_log_sum_exp(logits + log_weights, contrast.is_negative(rows))
