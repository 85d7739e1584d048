"""The excluded columns of each anchor, and how they are written into blocks of scores without reading any value."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from undimix_plugins.blocks import blocks_of, is_wide
from undimix_plugins.checks import values_are_free
from undimix_plugins.contrast import Contrast


@dataclass(frozen=True, eq=False)
class ExcludedBlock:
    """The excluded columns of a block of r anchors.

    Attributes:
        index: Columns [r, k], padded by columns that may be written to.
        once: Which of these are no padding, bool [r, k].
        padded: False where a look is free and shows no padding.
        mask: What is excluded, bool [r, m], where columns are not listed.
    """

    index: Tensor
    once: Tensor
    padded: bool
    mask: Tensor | None

    def write(self, block: Tensor, value: float) -> Tensor:
        """Writes `value` into the excluded columns of a block of scores [r, m], and returns it."""
        if self.mask is not None:
            block.masked_fill_(self.mask, value)
        if not self.padded:
            return block.scatter_(1, self.index, value)
        # Padding writes what another excluded column of the anchor gets, or what is there.
        has_any = self.once.any(dim=1, keepdim=True)
        return block.scatter_(1, self.index, torch.where(has_any, value, block.gather(1, self.index)))

    def marks(self, width: int) -> Tensor:
        """Returns 1 for the excluded columns and 0 for the others, [r, width]."""
        return self.write(self.index.new_zeros(len(self.index), width, dtype=torch.float), 1)

    def of(self, places: Tensor | slice) -> ExcludedBlock:
        """Returns the excluded columns of some of the block's anchors."""
        mask = None if self.mask is None else self.mask[places]
        return ExcludedBlock(self.index[places], self.once[places], self.padded, mask)


class Excluded:
    """The excluded columns of each anchor of a contrast.

    Attributes:
        dense: Whether they are a mask on the whole pool, rather than a few columns.
    """

    def __init__(self, contrast: Contrast) -> None:
        self.contrast = contrast
        listed = contrast.excluded
        self.dense = contrast.excluded_mask is not None or is_wide(listed)
        if self.dense:  # the mask has these as well
            listed = listed[:, :0]
        self.once = listed >= 0
        free = values_are_free(listed) and bool(self.once.all())
        self.padded = listed.shape[1] > 0 and not free
        self.index = listed
        if self.padded:
            self.index = torch.where(self.once, listed, listed.amax(dim=1, keepdim=True).clamp(min=0))

    def block(self, rows: slice) -> ExcludedBlock:
        """Returns the excluded columns of a block of anchors."""
        return self.all if rows == slice(0, len(self.index)) else self._block(rows)

    @cached_property
    def all(self) -> ExcludedBlock:
        """The excluded columns of all anchors, for a contrast that is a single block."""
        return self._block(slice(0, len(self.index)))

    def _block(self, rows: slice) -> ExcludedBlock:
        mask = ~self.contrast.is_negative(rows) if self.dense else None
        return ExcludedBlock(self.index[rows], self.once[rows], self.padded, mask)

    def largest_of_negatives(self, values: Tensor) -> Tensor:
        """Returns the largest of the pool's `values` [q, m] among each anchor's negatives [q, n], or -inf."""
        if self.dense:
            rows = blocks_of(self.contrast.anchors, self.contrast.pool)
            return torch.cat([_largest_unmarked(self.block(block), values) for block in rows], dim=1)
        index = self.index.masked_fill(~self.once, -1) if self.padded else self.index
        tops, places = values.topk(min(index.shape[1] + 1, values.shape[1]))
        largest = torch.full_like(values[:, :1], -torch.inf)
        for top, place in zip(tops.T.flip(0), places.T.flip(0), strict=True):  # each [q], the largest last
            taken = (index == place[:, None, None]).any(dim=2)
            largest = torch.where(taken, largest, top[:, None])
        return largest


def _largest_unmarked(excluded: ExcludedBlock, values: Tensor) -> Tensor:
    count = len(excluded.index)
    return torch.stack([excluded.write(of.repeat(count, 1), -torch.inf).amax(dim=1) for of in values])


def write_one(block: Tensor, columns: Tensor, value: float) -> Tensor:
    """Writes `value` into one column of each row of a block [r, m], and returns the block. Column -1 writes nothing."""
    index = columns.clamp(min=0)[:, None]
    return block.scatter_(1, index, torch.where(columns[:, None] < 0, block.gather(1, index), value))
