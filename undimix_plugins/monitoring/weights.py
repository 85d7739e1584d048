"""The importance weights themselves, and what they come to."""

from __future__ import annotations

import torch
from torch import Tensor

from undimix_plugins.contrast import Contrast, alone, holds_all_anchors
from undimix_plugins.rows import full_precision
from undimix_plugins.weightings.weighting import Weighting, check_compared


def importance_weights(contrast: Contrast, weighting: Weighting) -> Tensor:
    """The weights themselves, to look at: what each negative of each anchor counts.

    Of a pool gathered from all processes without their anchors (a memory bank's), each process has to call it.

    Args:
        contrast: What is compared, n anchors and a pool of m.
        weighting: How.

    Returns:
        Weights [n, m] without gradient, 0 in the columns that are no negatives of an anchor.

    Raises:
        TypeError: For something else than a Contrast and a Weighting.

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
    """The effective number of negatives of each anchor, `(sum_j w_j)^2 / sum_j w_j^2` (Kish 1965).

    Args:
        weights: Importance weights [n, m], 0 for what is no negative.

    Returns:
        [n], from 1 (one negative has all the weight) to the number of negatives (all count the same); 0 without any.

    Examples:
        >>> effective_number(torch.tensor([[1.0, 1.0, 0.0], [2.0, 0.0, 0.0]]))
        tensor([2., 1.])
    """
    squares = weights.square().sum(dim=1)
    return weights.sum(dim=1).square() / squares.masked_fill(squares == 0, 1)
