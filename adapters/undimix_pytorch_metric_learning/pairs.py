"""Which pairs of embeddings a loss of pytorch-metric-learning compares: by labels, or as a miner lists them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """The positive and negative pairs of n anchors with m rows of the reference.

    Attributes:
        anchors: The anchor of each positive pair [p], int64, in ascending order for pairs by labels.
        positives: The row of the reference of each positive pair [p], int64.
        positive_count: The number of positive pairs that are listed, repeated ones included.
        negative_count: The number of negative pairs that are listed.
        listed: How often each pair is listed as a negative [n, m], int32. None for pairs by labels: then all rows are
            negatives but an anchor's positives and itself.
    """

    anchors: Tensor
    positives: Tensor
    positive_count: int
    negative_count: int
    listed: Tensor | None = None


def pairs_by_labels(labels: Tensor, ref_labels: Tensor) -> Pairs:
    """Returns the pairs by labels, with memory for the positive pairs alone.

    Args:
        labels: The label of each anchor [n].
        ref_labels: The label of each row of the reference [m]. If it is the tensor object `labels` itself, an anchor
            is no positive of its own, as in pytorch-metric-learning.

    Returns:
        The pairs, in the order of pytorch-metric-learning's `get_all_pairs_indices`.

    Examples:
        >>> labels = torch.tensor([0, 1, 0])
        >>> pairs = pairs_by_labels(labels, labels)
        >>> pairs.anchors, pairs.positives, pairs.negative_count
        (tensor([0, 2]), tensor([2, 0]), 4)
    """
    others_only = ref_labels is labels
    labels, of_reference = (part.byte() if part.dtype == torch.bool else part for part in (labels, ref_labels))
    labels = labels.contiguous()
    ordered, order = of_reference.sort(stable=True)
    start = torch.searchsorted(ordered, labels)
    count = torch.searchsorted(ordered, labels, right=True) - start
    anchors = torch.arange(len(labels), device=labels.device).repeat_interleave(count)
    positives = order[start[anchors] + _places(anchors, count)]
    negative_count = len(labels) * len(of_reference) - len(anchors)
    if others_only:
        others = anchors != positives
        anchors, positives = anchors[others], positives[others]
    return Pairs(anchors, positives, len(anchors), negative_count)


def _places(anchors: Tensor, count: Tensor) -> Tensor:
    """Returns 0, 1, 2 and so on within each anchor's pairs [p], for ordered anchors with `count` pairs each [n]."""
    return torch.arange(len(anchors), device=anchors.device) - (count.cumsum(0) - count)[anchors]


def pairs_by_indices(
    indices_tuple: Sequence[Tensor], n: int, m: int, device: torch.device, *, repeats: bool = True
) -> Pairs:
    """Returns the pairs that a miner lists.

    Args:
        indices_tuple: (anchors, positives, anchors, negatives), or triplets (anchors, positives, negatives): rows of
            integers, the first two of one length, and the last two.
        n: The number of anchors.
        m: The number of rows of the reference.
        device: The device of the embeddings.
        repeats: Whether a pair counts as often as it is listed, or once.

    Returns:
        The pairs. A triplet is a positive pair and a negative pair.

    Raises:
        ValueError: If it is none of these, if indices are on another device, or if a pair is both positive and
            negative. On the CPU also if an index is out of range.

    Examples:
        >>> triplets = torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([2, 3])
        >>> pairs_by_indices(triplets, 4, 4, torch.device("cpu")).listed[0]
        tensor([0, 0, 1, 1], dtype=torch.int32)
    """
    if not isinstance(indices_tuple, (tuple, list)) or len(indices_tuple) not in (3, 4):
        came = f"{len(indices_tuple)} tensors" if isinstance(indices_tuple, (tuple, list)) else type(indices_tuple)
        raise ValueError(
            "indices_tuple: expected pairs (anchors, positives, anchors, negatives) or triplets (anchors, positives, "
            f"negatives), got {came}"
        )
    for place, indices in enumerate(indices_tuple):
        _check_indices(f"indices_tuple[{place}]", indices, device)
    if len(indices_tuple) == 3:
        anchors, positives, negatives = (indices.long() for indices in indices_tuple)
        of_negatives = anchors
    else:
        anchors, positives, of_negatives, negatives = (indices.long() for indices in indices_tuple)
    lengths = [len(indices) for indices in indices_tuple]
    if len(anchors) != len(positives) or len(of_negatives) != len(negatives):
        raise ValueError(f"indices_tuple: expected an anchor for each positive and negative, got lengths {lengths}")
    if device.type == "cpu":
        for rows, most in ((anchors, n), (of_negatives, n), (positives, m), (negatives, m)):
            if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < most:
                raise ValueError(
                    f"indices_tuple: expected rows from 0 to {most - 1}, got {int(rows.min())} to {int(rows.max())}"
                )
    listed = torch.zeros(n, m, dtype=torch.int32, device=device)
    one = torch.ones((), dtype=torch.int32, device=device)
    listed.index_put_((of_negatives, negatives), one, accumulate=True)
    if len(anchors) and bool(listed[anchors, positives].any()):
        raise ValueError("indices_tuple: expected each pair to be either positive or negative, got one as both")
    positive_count = len(anchors)
    if not repeats:
        listed = listed.clamp(max=1)
        pairs = torch.unique(anchors * m + positives)
        anchors, positives = pairs // m, pairs % m
    return Pairs(anchors, positives, positive_count, len(negatives), listed)


def _check_indices(name: str, indices: Tensor, device: torch.device) -> None:
    """Raises a ValueError unless they are a vector of integers on the device. An empty vector may have any dtype."""
    if not isinstance(indices, Tensor) or indices.dim() != 1:
        came = list(indices.shape) if isinstance(indices, Tensor) else type(indices).__name__
        raise ValueError(f"{name}: expected a tensor of shape [pairs], got {came}")
    if indices.numel() and (indices.is_floating_point() or indices.dtype == torch.bool):
        raise ValueError(f"{name}: expected integers, got {indices.dtype}")
    if indices.device != device:
        raise ValueError(f"{name}: expected device {device}, as the embeddings have, got {indices.device}")


def positive_columns(pairs: Pairs, n: int) -> Tensor:
    """Returns for each anchor the rows of its positives [n, k], int64, padded with -1.

    Args:
        pairs: The pairs.
        n: The number of anchors.

    Examples:
        >>> labels = torch.tensor([0, 1, 0, 0])
        >>> positive_columns(pairs_by_labels(labels, labels), 4)
        tensor([[ 2,  3],
                [-1, -1],
                [ 0,  3],
                [ 0,  2]])
    """
    anchors, order = pairs.anchors.sort(stable=True)
    count = anchors.bincount(minlength=n)
    columns = anchors.new_full((n, int(count.max())), -1)
    columns[anchors, _places(anchors, count)] = pairs.positives[order]
    return columns
