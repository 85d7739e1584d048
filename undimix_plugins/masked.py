"""Log-sum-exp and mean over the negatives of each anchor."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_log_sum_exp(scores: Tensor, mask: Tensor) -> Tensor:
    """Computes the log-sum-exp over the columns that a mask selects.

    Args:
        scores: [r, m], floating point.
        mask: The columns of the sum, bool [r, m].

    Returns:
        [r], same dtype as `scores`. A row without selected columns gives -inf, with gradient 0.

    Examples:
        >>> masked_log_sum_exp(torch.zeros(1, 4), torch.tensor([[True, True, False, False]])).exp()
        tensor([2.])
    """
    scores = scores.masked_fill(~mask, -torch.inf)
    top = scores.detach().amax(dim=1, keepdim=True)
    top = top.masked_fill(top.isneginf(), 0)
    total = (scores - top).exp().sum(dim=1)
    # log(0) would be correct, but its gradient is NaN.
    none = total == 0
    return (total.masked_fill(none, 1).log() + top[:, 0]).masked_fill(none, -torch.inf)


def mean_one(log_weights: Tensor, negative: Tensor) -> Tensor:
    """Rescales weights so that their mean over each anchor's negatives is 1.

    Args:
        log_weights: The logarithms of the weights [r, m], floating point.
        negative: Which columns are negatives, bool [r, m].

    Returns:
        `log_weights` minus the log of the mean weight of the row's negatives [r, m], same dtype.

    Examples:
        >>> mean_one(torch.tensor([[1.0, 1.0, 5.0]]), torch.tensor([[True, True, False]]))
        tensor([[0., 0., 4.]])
    """
    # The largest is subtracted first. Added to a huge number, the log of the number of negatives would be lost.
    top = log_weights.detach().masked_fill(~negative, -torch.inf).amax(dim=1, keepdim=True)
    log_weights = log_weights - top.masked_fill(top.isneginf(), 0)
    log_sum = masked_log_sum_exp(log_weights, negative)
    log_mean = log_sum - negative.sum(dim=1).clamp(min=1).to(log_sum.dtype).log()
    return log_weights - log_mean.masked_fill(log_mean.isneginf(), 0)[:, None]
