"""The weighted contrastive losses. Every loss is a function of two numbers for each anchor (`log_sums`)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from undimix_plugins.checks import may_look
from undimix_plugins.columns import is_not_among
from undimix_plugins.contrast import Contrast
from undimix_plugins.fast import losses as fast
from undimix_plugins.fast.losses import Margin
from undimix_plugins.plan import Plan, planned
from undimix_plugins.rows import full_precision, in_backward
from undimix_plugins.scoped import Scoped
from undimix_plugins.weightings.weighting import Weighting, check_compared, checked, masked_log_sum_exp

# Functions registered by `undimix_plugins.monitoring.statistics.watch`, called with each contrast before its loss.
OBSERVERS = Scoped[Callable[[Contrast, Weighting], None]]("watch")


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


def info_nce(contrast: Contrast, weighting: Weighting) -> Tensor:
    """Computes the weighted InfoNCE (NT-Xent) loss, averaged over the anchors.

        loss_i = -log( exp(s_i+ / t) / (exp(s_i+ / t) + sum over j of w_ij exp(s_ij / t)) )

    The weights are not rescaled. An anchor without negatives adds 0 to the mean.

    Args:
        contrast: The anchors, positives and candidates.
        weighting: How much each negative counts. `Uniform()` gives the plain loss.

    Returns:
        A scalar, in the embeddings' dtype (float32 for half precision, also under autocast).

    Raises:
        ValueError: If the log-weights do not have the shape [anchors, pool] and a floating-point dtype, or (on the CPU)
            if their sum is NaN or infinite. `Contrast.of` checks the embeddings. Values on other devices are not read,
            since that would cost a synchronisation. There, non-finite embeddings give a loss of NaN.
        TypeError: If `contrast` is not a `Contrast` or `weighting` is not a `Weighting`.

    Warns:
        UserWarning: If no anchor of a batch has a negative because all have the same label. On devices other than the
            CPU, only the first batch is checked.

    References:
        van den Oord et al., arXiv 1807.03748, equation 4; Chen et al., arXiv 2002.05709, equation 1. The weights are
        from arXiv 2206.01197, section 3.

    Examples:
        >>> contrast = two_views(torch.randn(8, 16), torch.randn(8, 16), temperature=0.5)
        >>> loss = info_nce(contrast, UnDiMix())
    """
    return mean_loss(contrast, weighting, _softplus)


def decoupled(contrast: Contrast, weighting: Weighting) -> Tensor:
    """Computes the weighted decoupled contrastive loss, averaged over the anchors.

        loss_i = -log( exp(s_i+ / t) / sum over j of w_ij exp(s_ij / t) )

    The denominator does not contain the positive. Otherwise the loss is computed like `info_nce`. An anchor without
    negatives adds 0 to the mean, or the term of `mean_loss` for several positives.

    Args:
        contrast: The anchors, positives and candidates.
        weighting: How much each negative counts. `Uniform()` gives the plain loss.

    Returns:
        A scalar, in the embeddings' dtype (float32 for half precision, also under autocast).

    Raises:
        ValueError: As `info_nce` does.
        TypeError: As `info_nce` does.

    Warns:
        UserWarning: As `info_nce` does.

    References:
        Yeh et al.: Decoupled Contrastive Learning, arXiv 2110.06848, equation 6.

    Examples:
        >>> loss = decoupled(two_views(torch.randn(8, 16), torch.randn(8, 16), temperature=0.5), UnDiMix())
    """
    return mean_loss(contrast, weighting, _identity)


def _softplus(margin: Tensor) -> tuple[Tensor, Tensor]:
    return torch.logaddexp(margin, torch.zeros_like(margin)), margin.sigmoid()


def _identity(margin: Tensor) -> tuple[Tensor, Tensor]:
    none = margin.isneginf()
    return margin.masked_fill(none, 0), (~none).to(margin.dtype)


def mean_loss(contrast: Contrast, weighting: Weighting, loss: Margin, *, one_positive: bool = False) -> Tensor:
    """Computes the mean over the anchors of a loss that is a function of their margins.

        margin_i = neg_i - pos_i

    pos_i and neg_i are the two numbers of `log_sums`. For an anchor with several positives, the difference between the
    log-sum-exp and the mean of their logits is added to the loss. `info_nce` is then the mean of the negative
    log-probabilities of the positives. An anchor without positives adds 0.

    Args:
        contrast: The anchors, positives and candidates. The losses are multiplied by its `anchor_weights`, if any, and
            their sum is divided by the number of anchors.
        weighting: How much each negative counts.
        loss: A function from margins [r] to losses [r] and their derivatives [r]. The margin of an anchor without
            negatives is -inf. The derivatives must be those that autograd finds for the losses, which may be partly
            detached.
        one_positive: Whether the loss is defined for a single positive only. Weightings that add positives then raise a
            ValueError.

    Returns:
        A scalar, in the embeddings' dtype (float32 for half precision, also under autocast).

    Raises:
        ValueError: As `info_nce` does, or if `one_positive` is True and the weighting adds positives.
        TypeError: As `info_nce` does.

    Warns:
        UserWarning: As `info_nce` does.

    Examples:
        >>> contrast = two_views(torch.randn(8, 16), torch.randn(8, 16), temperature=0.5)
        >>> loss = mean_loss(contrast, UnDiMix(), lambda margin: (margin.relu(), (margin > 0).to(margin.dtype)))
    """
    check_compared(contrast, weighting)
    with full_precision(contrast.pool):
        plan = planned(contrast, weighting, one_positive=one_positive)
        _show(contrast, weighting, plan)
        if plan.sums_needed:
            return _mean_of_margins(plan.contrast, _log_sums(plan), loss)
        return _fast_mean(plan, loss)


def log_sums(contrast: Contrast, weighting: Weighting) -> LogSums:
    """Computes the two log-sums of each anchor that a loss is made of.

        pos_i = s_i+ / t,   neg_i = log sum over j of w_ij exp(s_ij / t)

    The InfoNCE loss is `logaddexp(pos, neg) - pos`, the decoupled loss is `neg - pos`. With several positives, pos_i is
    log sum over p of exp(s_ip / t). If the weighting debiases or adds negatives, neg_i is what `Weighting.combine`
    returns.

    Args:
        contrast: The anchors, positives and candidates.
        weighting: How much each negative counts.

    Returns:
        Both numbers for each anchor, each [n], in the contrast's dtype, also under autocast.

    Raises:
        ValueError: As `info_nce` does, or if the weighting adds positives (`FalseNegativeAttraction`): the two numbers
            do not give the mean over several positives.
        TypeError: If `contrast` is not a `Contrast` or `weighting` is not a `Weighting`.

    Warns:
        UserWarning: As `info_nce` does.

    References:
        van den Oord et al., arXiv 1807.03748, equation 4; Yeh et al., arXiv 2110.06848, equation 6 (decoupled).

    Examples:
        >>> contrast = two_views(torch.randn(4, 8), torch.randn(4, 8), temperature=0.5)
        >>> positives, negatives = log_sums(contrast, UnDiMix())
        >>> decoupled = (negatives - positives).mean()
    """
    check_compared(contrast, weighting)
    with full_precision(contrast.pool):
        plan = planned(contrast, weighting, one_positive=True)
        _show(contrast, weighting, plan)
        return _log_sums(plan)


def _fast_mean(plan: Plan, loss: Margin) -> Tensor:
    """Returns the mean loss by the fast path, which computes no sums with gradient."""
    mean = fast.mean_loss(plan, loss)
    if not plan.free:
        mean = mean + _not_a_number_if_not_finite(plan.contrast)
    elif not math.isfinite(float(mean.detach())):
        with torch.no_grad():
            _check_sums(fast.negative_log_sums(plan), plan.weighting)
    if plan.contrast.excluded_mask is not None:
        _warn_of_no_negatives(plan.contrast, mean.detach() == 0)
    return mean


def _mean_of_margins(contrast: Contrast, sums: LogSums, loss: Margin) -> Tensor:
    positives, negatives = sums
    none = positives.isneginf()
    losses = loss(negatives - positives.masked_fill(none, 0))[0]
    if contrast.positive_columns is not None:
        losses = (losses + positives - contrast.positive_logits()).masked_fill(none, 0)
    return (losses if contrast.anchor_weights is None else losses * contrast.anchor_weights).mean()


def _log_sums(plan: Plan) -> LogSums:
    contrast, weighting = plan.contrast, plan.weighting
    positives, number = _positives(plan)
    negatives = _by_block(weighted_log_sum, plan, plan.weigher, plan.prepared) if plan.by_autograd else None
    if negatives is None:
        negatives = fast.negative_log_sums(plan)
    none, combined = negatives.isneginf(), negatives
    if plan.combines:
        mean, count = positives - number.log(), contrast.count.clamp(min=1)
        combined = weighting.combine(contrast, mean, negatives.masked_fill(none, 0), count)
    combined = combined.masked_fill(none, -torch.inf)
    if plan.free:
        _check_sums(combined, weighting)
    else:
        positives = positives + _not_a_number_if_not_finite(contrast)
    _warn_of_no_negatives(contrast, none)
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


def _check_sums(negatives: Tensor, weighting: Weighting) -> None:
    """Raises a ValueError if a log-sum is NaN or infinite although the embeddings are finite and do not overflow."""
    if not bool((negatives < torch.inf).all()):
        raise ValueError(
            f"weighting: expected weights that are numbers, got NaN or too large ones from {weighting!r}; look at its "
            "log_weights and combine"
        )


def _warn_of_no_negatives(contrast: Contrast, perhaps: Tensor) -> None:
    """Warns if labels, or another mask, exclude all negatives of a batch; only if `perhaps` is True everywhere."""
    if contrast.excluded_mask is None or not may_look(perhaps, "negatives") or not bool(perhaps.all()):
        return
    candidates = len(contrast.pool) - (contrast.excluded >= 0).sum(dim=1)  # without the mask
    if bool(candidates.any()) and not bool(contrast.count.any()):
        warnings.warn(
            "labels: no anchor of this batch has a negative, since all samples have one label or are marked as no "
            "negatives of each other: nothing is learnt from it. Are these the labels? A folder of images without "
            "classes gives one target to all",
            stacklevel=2,
        )


def _show(contrast: Contrast, weighting: Weighting, plan: Plan) -> None:
    """Calls the observers with the contrast, after the weighting has been prepared (and, if it learns, fitted)."""
    if plan.compiled:
        return
    # Activation checkpointing runs the forward pass again in the backward pass: it has been shown before.
    if (observers := OBSERVERS.values()) and not in_backward():
        with OBSERVERS.holding_nothing():  # they may compute losses, too
            for observer in observers:
                observer(contrast, weighting)


@torch.no_grad()
def _not_a_number_if_not_finite(contrast: Contrast) -> Tensor:
    """Returns 0, or NaN if an embedding is not finite. An infinite one could otherwise give a finite, wrong loss."""
    return sum((rows * 0).sum() for rows in (contrast.anchors, contrast.positives, contrast.pool))  # type: ignore[return-value]
