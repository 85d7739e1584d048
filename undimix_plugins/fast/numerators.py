"""The softmax of each anchor's scores over its negatives, before it is divided by its sum."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from undimix_plugins.blocks import PADDING, blocks_of, fits, tile_pairs
from undimix_plugins.contrast import Contrast
from undimix_plugins.fast.excluded import Excluded
from undimix_plugins.fast.logits import LOG2E, Logits, exponentials
from undimix_plugins.fast.memory import Workspace
from undimix_plugins.fast.mix import StandardisedMix
from undimix_plugins.fast.scores import Block
from undimix_plugins.plan import Plan
from undimix_plugins.weightings.weighting import checked


class Sums(NamedTuple):
    """The results for a block of r anchors.

    Attributes:
        rows: Which anchors.
        numerators: [r, m]; where not all are kept, in memory that the next block writes over.
        total: Their sums [r, 1].
        log_sum: The log of the weighted sum of the negatives [r], less the logits' offset; -inf for none.
    """

    rows: slice
    numerators: Tensor
    total: Tensor
    log_sum: Tensor


class Numerators:
    """The numerators of a contrast, block by block.

    Where weights carry a gradient, it is in the numerators: divided by the sum, they are the log-sum's gradient at the
    logits.

    Args:
        plan: What is compared, and how.
        out: All numerators [n, m] where they are to be kept, else None.
        work: Memory, as `workspace` makes it.
    """

    def __init__(self, plan: Plan, out: Tensor | None, work: Workspace) -> None:
        contrast = plan.contrast
        n, m = len(contrast.anchors), len(contrast.pool)
        self.plan, self.out = plan, out
        self.rows = blocks_of(contrast.anchors, contrast.pool)
        self.excluded = Excluded(contrast)
        self.lone = work.block(self.rows[0].stop, m) if out is None else out
        self.scratch: list[Tensor] = []
        kept = out  # each block's scores and numerators are written over its logits
        if plan.mix is not None:
            kept = None if out is None else work.block(n, m)
            buffers = (2 if plan.mix.mixing == "linear" or plan.mix.carries_gradient else 1) + (kept is None)
            self.scratch = [work.block(self.rows[0].stop, m) for _ in range(buffers)]
        self.logits = Logits(contrast, kept)
        self.mix = None
        if plan.mix is not None:
            self.mix = StandardisedMix(plan.mix, plan.prepared, self.logits, self.excluded, self.scratch, out)

    def __iter__(self) -> Iterator[Sums]:
        return map(self.block, self.rows)

    def block(self, rows: slice) -> Sums:
        """Computes the numerators of a block of anchors, and their sums."""
        out = self.lone[: rows.stop - rows.start] if self.out is None else self.out[rows]
        scratch, excluded = [memory[: len(out)] for memory in self.scratch], self.excluded.block(rows)
        logits = self.logits.block(rows, scratch[-1] if scratch else out)
        if self.mix is None:
            total, top = exponentials(self.scores(rows, logits, out), excluded)
            return Sums(rows, out, total, (total.log2() + top)[:, 0] / LOG2E)
        scores, log_mean, slope = self.mix.block(Block(rows, logits, excluded, out, scratch))
        total, top = exponentials(scores, excluded, out)
        log_sum = total.log2() + top
        if log_mean is not None:
            log_sum -= log_mean
        if slope is not None:
            slope.add_to(out, total, work=scores)
        return Sums(rows, out, total, log_sum[:, 0] / LOG2E)

    def scores(self, rows: slice, logits: Tensor, out: Tensor) -> Tensor:
        """Returns logits plus log-weights of a block [r, m], without a `mix`. It may write to `out`."""
        if self.plan.alike:
            return logits
        weigher = self.plan.weigher
        log_weights = checked(weigher, weigher.log_weights(self.plan.prepared, rows), logits)
        return torch.add(logits, log_weights, alpha=LOG2E, out=out)


def workspace(contrast: Contrast) -> Workspace:
    """Returns memory for what is kept, and to work in."""
    anchors, pool = contrast.anchors, contrast.pool
    kept = 2 * len(anchors) if fits(anchors, pool) else 0
    return Workspace(pool, (kept + 4 * blocks_of(anchors, pool)[0].stop) * (len(pool) + PADDING))


def plain_log_sums(contrast: Contrast, centre: Tensor, out: Tensor) -> tuple[Tensor, Tensor] | None:
    """Numerators above the diagonal, by tiles in `out`, their sums [n, 1] and the log-sums [n], for equal weights.

    Of two views the numerators are symmetric while all are relative to the same bound; None where that is too high.
    The log-sums lack the logits' offset, as `Sums.log_sum` does.
    """
    factor, centred = LOG2E / contrast.held_temperature, contrast.pool.detach() - centre
    scaled = centred * factor
    along = scaled @ centre
    bound = ((scaled * centred).sum(dim=1) + 2 * along).max()
    along -= bound / 2
    total = torch.zeros_like(centred[:, :1])
    for rows, columns in tile_pairs(centred):
        tile = torch.mm(scaled[rows], centred[columns].T, out=out[rows, columns])
        tile.add_(along[columns]).add_(along[rows, None]).exp2_()
        for place in (0, len(centred) // 2, -(len(centred) // 2)):
            offset = rows.start + place - columns.start
            if -len(tile) < offset < tile.shape[1]:
                tile.diagonal(offset).zero_()
        total[rows] += tile.sum(dim=1, keepdim=True)
        if rows != columns:
            total[columns] += tile.sum(dim=0)[:, None]
    if not float(total.min()) > torch.finfo(total.dtype).tiny * 2**26:
        return None
    return total, (total[:, 0].log2() - along + bound / 2) / LOG2E
