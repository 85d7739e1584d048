"""The weighted contrastive losses: a contrast gets a plan, and the plan gives two numbers per anchor or their mean."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from undimix_plugins.contrast import Contrast, check_offset, in_batch_negatives
from undimix_plugins.fast.losses import Margin
from undimix_plugins.plan import planned
from undimix_plugins.rows import full_precision
from undimix_plugins.sums import LogSums, anchor_sums, mean_of
from undimix_plugins.weightings.weighting import Weighting, check_compared


def info_nce(contrast: Contrast, weighting: Weighting) -> Tensor:
    """Computes the weighted InfoNCE (NT-Xent) loss, averaged over the anchors.

        loss_i = -log( exp(s_i+ / t) / (exp(s_i+ / t) + sum over j of w_ij exp(s_ij / t)) )

    The weights are not rescaled. An anchor without negatives adds 0 to the mean. If the weighting has a
    `positive_factor` (`HCL(alpha=...)`), the denominator's first term is multiplied by it.

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
    plan = planned(contrast, weighting)
    factor = weighting.positive_factor
    return mean_of(plan, _softplus if factor == 1 else partial(_softplus_above, factor))


def info_nce_both_ways(
    first: Tensor,
    second: Tensor,
    temperature: float | Tensor,
    weighting: Weighting,
    *,
    gathered: tuple[Tensor, Tensor] | None = None,
    offset: int = 0,
    **further: Any,
) -> Tensor:
    """Computes CLIP's loss, weighted: the mean of `info_nce` from the first rows to the second, and back.

    The rows are compared by inner products and are *not* normalised. Pass `unit_rows(...)` for cosine similarity.

    Args:
        first: Embeddings of one kind [n, d], such as of images, floating point.
        second: The positive of each of the other kind [n, d], same dtype.
        temperature: The temperature that similarities are divided by, a finite number above 0 or a tensor with one
            element (a learned temperature gets its gradient).
        weighting: How much each negative counts. `Uniform()` gives the plain loss.
        gathered: The first and second rows of all processes, each [N, d]. Positives and negatives are taken from these.
            None for one process.
        offset: The index of this process's first row among the gathered rows.
        further: Further arguments of `Contrast.of`, the same for both ways: `excluded_mask`, `anchor_weights`.

    Returns:
        A scalar, in the embeddings' dtype (float32 for half precision, also under autocast).

    Raises:
        ValueError: As `in_batch_negatives` and `info_nce` do.
        TypeError: As `info_nce` does.

    References:
        Radford et al., arXiv 2103.00020, figure 3.

    Examples:
        >>> texts, images = unit_rows(texts=torch.randn(8, 16), images=torch.randn(8, 16))
        >>> loss = info_nce_both_ways(texts, images, 0.07, UnDiMix())
    """
    if gathered is not None:
        check_offset(offset, len(gathered[0]) - len(first))
    back = None if gathered is None else (gathered[1], gathered[0])
    losses = []
    for anchors, positives, of_all in ((first, second, gathered), (second, first, back)):
        if of_all is not None:
            positives = of_all[1][offset : offset + len(anchors)]
        contrast = in_batch_negatives(anchors, positives, temperature, gathered=of_all, offset=offset, **further)
        losses.append(info_nce(contrast, weighting))
    return (losses[0] + losses[1]) / 2


def decoupled(contrast: Contrast, weighting: Weighting) -> Tensor:
    """Computes the weighted decoupled contrastive loss, averaged over the anchors.

        loss_i = -log( exp(s_i+ / t) / sum over j of w_ij exp(s_ij / t) )

    The denominator does not contain the positive. Otherwise the loss is computed like `info_nce`. An anchor without
    negatives adds 0 to the mean. An anchor with several positives adds the further term that `mean_loss` describes.

    Args:
        contrast: The anchors, positives and candidates.
        weighting: How much each negative counts. `Uniform()` gives the plain loss.

    Returns:
        A scalar, in the embeddings' dtype (float32 for half precision, also under autocast).

    Raises:
        ValueError: As `info_nce` does, or if the weighting has a `positive_factor` other than 1 (`HCL(alpha=...)`).
        TypeError: As `info_nce` does.

    Warns:
        UserWarning: As `info_nce` does.

    References:
        Yeh et al.: Decoupled Contrastive Learning, arXiv 2110.06848, equation 6.

    Examples:
        >>> loss = decoupled(two_views(torch.randn(8, 16), torch.randn(8, 16), temperature=0.5), UnDiMix())
    """
    return mean_loss(contrast, weighting, _identity)


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
        ValueError: As `info_nce` does, if `one_positive` is True and the weighting adds positives, or if the weighting
            has a `positive_factor` other than 1: only `info_nce` knows the term that it multiplies.
        TypeError: As `info_nce` does.

    Warns:
        UserWarning: As `info_nce` does.

    Examples:
        >>> contrast = two_views(torch.randn(8, 16), torch.randn(8, 16), temperature=0.5)
        >>> loss = mean_loss(contrast, UnDiMix(), lambda margin: (margin.relu(), (margin > 0).to(margin.dtype)))
    """
    _check_factor(contrast, weighting)
    return mean_of(planned(contrast, weighting, one_positive=one_positive), loss)


def log_sums(contrast: Contrast, weighting: Weighting, *, applies_factor: bool = False) -> LogSums:
    """Computes the two log-sums of each anchor that a loss is made of.

        pos_i = s_i+ / t,   neg_i = log sum over j of w_ij exp(s_ij / t)

    The InfoNCE loss is `logaddexp(pos, neg) - pos`, the decoupled loss is `neg - pos`. With several positives, pos_i is
    log sum over p of exp(s_ip / t). If the weighting debiases or adds negatives, neg_i is what `Weighting.combine`
    returns.

    Args:
        contrast: The anchors, positives and candidates.
        weighting: How much each negative counts.
        applies_factor: Whether the caller multiplies the positive's term in its denominator by
            `weighting.positive_factor`. If not, weightings with another factor than 1 raise a ValueError.

    Returns:
        Both numbers for each anchor, each [n], in the contrast's dtype, also under autocast.

    Raises:
        ValueError: As `info_nce` does, or if the weighting adds positives (`FalseNegativeAttraction`): the two numbers
            do not give the mean over several positives. Also if the weighting has a `positive_factor` other than 1 and
            `applies_factor` is False.
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
    if not applies_factor:
        _check_factor(contrast, weighting)
    plan = planned(contrast, weighting, one_positive=True)
    with full_precision(plan.contrast.pool):
        return anchor_sums(plan)


def _softplus(margin: Tensor) -> tuple[Tensor, Tensor]:
    return torch.logaddexp(margin, torch.zeros_like(margin)), margin.sigmoid()


def _softplus_above(factor: float, margin: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `log(factor + exp(margin))` and its derivative, both 0 for an anchor without negatives."""
    log_factor = math.log(factor)
    losses = torch.logaddexp(margin, torch.full_like(margin, log_factor))
    return losses.masked_fill(margin.isneginf(), 0), (margin - log_factor).sigmoid()


def _check_factor(contrast: object, weighting: object) -> None:
    """Raises a ValueError if the weighting multiplies the positive's term, for a loss that cannot do so."""
    check_compared(contrast, weighting)
    if isinstance(weighting, Weighting) and weighting.positive_factor != 1:
        raise ValueError(
            "weighting: expected a positive_factor of 1 (alpha=1 for HCL), since this loss does not multiply the "
            f"positive's term in its denominator, got {weighting}"
        )


def _identity(margin: Tensor) -> tuple[Tensor, Tensor]:
    none = margin.isneginf()
    return margin.masked_fill(none, 0), (~none).to(margin.dtype)
