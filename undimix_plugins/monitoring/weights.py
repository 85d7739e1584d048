"""The importance weights of a contrast, and their effective number."""

from __future__ import annotations

import torch
from torch import Tensor

from undimix_plugins.contrast import Contrast, alone, holds_all_anchors
from undimix_plugins.rows import full_precision
from undimix_plugins.weightings.weighting import Weighting, check_compared


def importance_weights(contrast: Contrast, weighting: Weighting) -> Tensor:
    """Returns the weight of each negative of each anchor, for inspection.

    All processes have to call it if the pool is gathered from them and does not contain their anchors (a memory bank).

    Args:
        contrast: A contrast with n anchors and a pool of m candidates.
        weighting: How much each negative counts.

    Returns:
        Weights [n, m], floating point, without gradient. 0 in columns that are not negatives of an anchor.

    Raises:
        TypeError: If `contrast` is not a `Contrast` or `weighting` is not a `Weighting`.
        ValueError: As the weighting does.

    Examples:
        >>> contrast = two_views(torch.randn(4, 8), torch.randn(4, 8), temperature=0.5)
        >>> importance_weights(contrast, Uniform())[0]
        tensor([0., 1., 1., 1., 0., 1., 1., 1.])
    """
    check_compared(contrast, weighting)
    rows, contrast = slice(0, len(contrast.anchors)), weighting.choose(contrast)
    contrast = alone(contrast) if holds_all_anchors(contrast) else contrast
    with torch.no_grad(), full_precision(contrast.pool):
        weights = weighting.log_weights(weighting.prepare(contrast), rows).exp()
        return weights.masked_fill(~contrast.is_negative(rows), 0)


def effective_number(weights: Tensor) -> Tensor:
    """Returns the effective number of negatives of each anchor (Kish 1965).

        n_eff = (sum_j w_j)^2 / sum_j w_j^2

    Args:
        weights: Importance weights [n, m], at least 0, and 0 in columns that are not negatives, as from
            `importance_weights`.

    Returns:
        [n], same dtype, from 1 (one negative has all the weight) to the number of negatives (all weights are equal). 0
        if all weights are 0.

    References:
        Kish: Survey Sampling, 1965.

    Examples:
        >>> effective_number(torch.tensor([[1.0, 1.0, 0.0], [2.0, 0.0, 0.0]]))
        tensor([2., 1.])
    """
    squares = weights.square().sum(dim=1)
    return weights.sum(dim=1).square() / squares.masked_fill(squares == 0, 1)
