"""Logits relative to the pool's mean, in units of log 2, and the products and exponentials they need."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from undimix_plugins.blocks import tile_pairs, tile_size
from undimix_plugins.checks import values_are_free
from undimix_plugins.contrast import Contrast
from undimix_plugins.fast.excluded import ExcludedBlock

LOG2E = 1 / math.log(2)
MODERATE = 2.0**64  # sums of exponentials from 1 over this to this need no reference taken off


class Logits:
    """Inner products with the pool about its mean, over the temperature, in units of log 2.

    `exp2(logits)` is `exp(s / t)` but for a factor of the anchor's, `exp2(offset)`, which no softmax depends on. About
    their mean, rows keep their digits when they are concentrated.

    Attributes:
        kept: All of them [n, m], in the memory that was given for it, or None: a block is made when it is needed.
            Excluded columns are written over.
    """

    def __init__(self, contrast: Contrast, kept: Tensor | None) -> None:
        self.contrast, self.kept = contrast, kept
        self.pool = contrast.pool.detach()
        self.anchors = self.pool if contrast.anchors is contrast.pool else contrast.anchors.detach()
        self.factor = LOG2E / contrast.held_temperature
        self.centre = self.pool.mean(dim=0)
        self.centred = self.pool - self.centre
        self.scaled = self.anchors * self.factor
        if kept is not None and (self.anchors is not self.pool or len(self.pool) <= tile_size(self.pool)):
            inner_products(self.scaled, self.centred, kept)
        elif kept is not None:
            own_products(self.centred * self.factor, self.centred, kept, self.centred @ (self.centre * self.factor))
            write_zero_rows(self.pool, kept)

    @property
    def offset(self) -> Tensor:
        """The difference between the inner products with the pool itself and these logits [n]."""
        return self.scaled @ self.centre

    def block(self, rows: slice, out: Tensor) -> Tensor:
        """Returns the logits of a block of anchors [r, m], from memory or computed into `out`."""
        if self.kept is not None:
            return self.kept[rows]
        return inner_products(self.scaled[rows], self.centred, out)

    @cached_property
    def scaled_about_mean(self) -> Tensor:
        return self.scaled - self.scaled.mean(dim=0)

    @cached_property
    def offset_about_mean(self) -> Tensor:
        return self.scaled_about_mean @ self.centre

    def transposed(self, rows: slice, out: Tensor) -> Tensor:
        """Writes the logits of a block of the pool with all anchors [r, n] to `out`, up to a constant for each row."""
        if self.kept is None:
            return torch.mm(self.pool[rows], self.scaled_about_mean.T, out=out)
        torch.add(self.kept[:, rows].T, self.offset_about_mean, out=out)
        return write_zero_rows(self.pool[rows], out)


def write_zero_rows(rows: Tensor, logits: Tensor) -> Tensor:
    """Writes 0 as the logits [r, m] of rows of zeros [r, d], so that rounding does not choose the largest."""
    zero = (rows == 0).all(dim=1)
    if not values_are_free(zero) or bool(zero.any()):
        logits.masked_fill_(zero[:, None], 0)
    return logits


def inner_products(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Computes `left @ right.T`, some columns at a time, so that the output fits into a cache."""
    step = 2 * tile_size(right)
    for start in range(0, len(right), step):
        columns = slice(start, start + step)
        torch.mm(left, right[columns].T, out=out[:, columns])
    return out


def own_products(scaled: Tensor, rows: Tensor, out: Tensor, along: Tensor | None = None) -> None:
    """Computes `scaled @ rows.T` for a multiple of the rows: one half, which is mirrored. `along` [rows] is added."""
    for above, columns in tile_pairs(rows):
        tile = torch.mm(scaled[above], rows[columns].T, out=out[above, columns])
        if above != columns and along is None:
            out[columns, above] = tile.T
        elif above != columns and along is not None:
            torch.add(tile.T, along[above], out=out[columns, above])
        if along is not None:
            tile.add_(along[columns])


def row_lengths(rows: Tensor) -> Tensor:
    """Returns the length of each row [r, 1]."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return lengths


def finite(values: Tensor) -> Tensor:
    """Replaces -inf by the least number, so that a difference of two is not NaN."""
    return values.clamp(min=torch.finfo(values.dtype).min)


def are_moderate(totals: Tensor) -> bool:
    """Whether sums of exponentials are far from overflow and underflow. Call it where reading values is free."""
    least, most = map(float, totals.aminmax())
    return least > 1 / MODERATE and most < MODERATE


def exponentials(scores: Tensor, excluded: ExcludedBlock, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Powers of 2 of a block's scores [r, m], 0 where excluded: their sums and what was taken off before, [r, 1] each.

    They are written to `out`, or over the scores for None. What is taken off, each row's largest, is taken from
    `scores` too; nothing is where there is an `out` and sums are moderate without.
    """
    if out is not None and values_are_free(scores):
        total = excluded.write(torch.exp2(scores, out=out), 0).sum(dim=1, keepdim=True)
        if are_moderate(total):
            return total, torch.zeros_like(total)
    excluded.write(scores, -torch.inf)
    top = finite(scores.amax(dim=1, keepdim=True))
    return torch.exp2(scores.sub_(top), out=scores if out is None else out).sum(dim=1, keepdim=True), top
