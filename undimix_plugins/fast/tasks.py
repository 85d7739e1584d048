"""The gradients of all pseudo-labelling tasks, block by block. `components.task_gradients` is the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from undimix_plugins.blocks import CHUNK, blocks, blocks_of
from undimix_plugins.checks import values_are_free
from undimix_plugins.components import TaskGradients, groups
from undimix_plugins.contrast import Contrast
from undimix_plugins.fast.excluded import write_one
from undimix_plugins.fast.logits import LOG2E, Logits, are_moderate, finite, row_lengths


def all_task_gradients(logits: Logits, scratch: list[Tensor], longest: Tensor) -> tuple[TaskGradients, TaskGradients]:
    """Computes the gradients of the anchors' tasks and of the pool's.

    Args:
        logits: Of all anchors.
        scratch: One or more blocks [rows, m] to work in; two where logits are not kept.
        longest: The length of the longest row of the pool.
    """
    contrast, anchors, pool = logits.contrast, logits.anchors, logits.pool
    own_columns = torch.arange(len(pool), device=pool.device) if contrast.is_own_pool else contrast.own_columns
    further = logits_of_further = None
    if not contrast.positives_in_pool:
        positives = contrast.positives.detach()
        further = positives, positives - logits.centre
        logits_of_further = (logits.scaled * further[1]).sum(dim=1)
        longest = torch.maximum(longest, row_lengths(positives).max())
    candidates, parts = Candidates(pool, logits.centred, longest, further), []
    for rows in blocks_of(anchors, pool):
        count = rows.stop - rows.start
        block = logits.block(rows, scratch[-1][:count])
        if contrast.is_own_pool:
            block.diagonal(rows.start).fill_(-torch.inf)
        elif own_columns is not None:
            write_one(block, own_columns[rows], -torch.inf)
        beside = None if logits_of_further is None else logits_of_further[rows]
        parts.append(candidates.task_gradients(block, rows, scratch[0][:count], beside))
    of_anchors = together(parts)
    if has_same_tasks(contrast):
        return of_anchors, of_anchors
    candidates, parts = Candidates(anchors, anchors - anchors.mean(dim=0), row_lengths(anchors).max()), []
    of_pool = blocks(len(pool), len(anchors) * pool.element_size(), logits.kept is not None)
    first, second = pool.new_empty(2, of_pool[0].stop, len(anchors))
    for rows in of_pool:
        block = logits.transposed(rows, first[: rows.stop - rows.start])
        if own_columns is not None:
            here = (own_columns >= rows.start) & (own_columns < rows.stop)
            write_one(block.T, (own_columns - rows.start).masked_fill(~here, -1), -torch.inf)
        parts.append(candidates.task_gradients(block, rows, second[: len(block)], None))
    return of_anchors, together(parts)


def has_same_tasks(contrast: Contrast) -> bool:
    """Whether a row has the same task as an anchor and as a candidate: anchors are the pool."""
    return contrast.is_own_pool and bool(contrast.positives_in_pool)


def together(parts: list[TaskGradients]) -> TaskGradients:
    """Joins the blocks."""
    return parts[0] if len(parts) == 1 else TaskGradients(*map(torch.cat, zip(*parts, strict=True)))


class Candidates:
    """What pseudo-labelling tasks choose from: rows, a further one for each task, and which of them are the same.

    Rows are given as they are and about their mean.
    """

    def __init__(
        self, rows: Tensor, centred: Tensor, longest: Tensor, further: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.rows, self.longest, self.further = centred, longest, None
        if further is not None:
            rows, self.further = torch.cat([rows, further[0]]), further[1]
        group = groups(rows)
        self.groups = None if group is None else (group[: len(centred)], group[len(centred) :])  # of rows, and further

    def task_gradients(self, logits: Tensor, rows: slice, out: Tensor, further: Tensor | None) -> TaskGradients:
        """Computes the gradients of a block of tasks. See `components._gradients`.

        From their logits [r, candidates] in units of log 2, and those of the further candidates [r]; `out`
        [r, candidates] is to work in.
        """
        top, label = largest(logits)
        log_label, outside = finite(top), None
        if further is not None:
            outside = further > top
            log_label = torch.where(outside, further, log_label)
            label = label.masked_fill(outside, -1)
            further = further.masked_fill(outside, -torch.inf)
        # What is the label over again adds v_y - v_y; beside it, rounding would leave nothing of the other terms.
        same = None
        if self.groups is not None:
            of_rows, of_further = self.groups
            group = of_rows[label]
            if outside is not None:
                group = torch.where(outside, of_further[rows], group)
            same = of_rows == group[:, None]
            copies = (logits - log_label[:, None]).exp2().masked_fill(~same, 0).sum(dim=1)
            if further is not None and outside is not None:
                same_further = (of_further[rows] == group) & ~outside
                copies = copies + outside + (further - log_label).exp2().masked_fill(~same_further, 0)
                further = further.masked_fill(same_further, -torch.inf)
            log_label = log_label + copies.log2()

        def others(block: Tensor, value: float) -> Tensor:
            """Writes `value` for the label and its copies."""
            if same is not None:
                return block.masked_fill_(same, value)
            return block.scatter_(1, label[:, None], value) if further is None else write_one(block, label, value)

        # Probabilities relative to the second likeliest: 1 - p_label is never formed, so that nothing cancels.
        second, moderate = torch.zeros_like(top), False
        if values_are_free(logits):
            relative = others(torch.exp2(logits, out=out), 0)
            total = relative.sum(dim=1) if further is None else relative.sum(dim=1) + further.exp2()
            moderate = are_moderate(total)
        if not moderate:
            relative = others(out.copy_(logits), -torch.inf)
            second = relative.amax(dim=1)
            second = finite(second if further is None else torch.maximum(second, further))
            total = relative.sub_(second[:, None]).exp2_().sum(dim=1)
        direction, label_rows = relative @ self.rows, self.rows[label]
        if further is not None and self.further is not None:
            beside = (further - second).exp2()
            total = total if moderate else total + beside
            direction.addcmul_(self.further[rows], beside[:, None])
            label_rows = torch.where(label[:, None] < 0, self.further[rows], label_rows)
        log_others = second + total.log2()
        log_scale = (log_others if moderate else second) - torch.logaddexp2(log_label, log_others)
        if moderate:  # or to all of them
            direction, total = direction.div_(total[:, None]), torch.ones_like(total)
        return TaskGradients(
            direction.addcmul_(label_rows, total[:, None], value=-1),
            (log_scale / LOG2E).masked_fill(total == 0, -torch.inf),
            total * self.longest,
        )


def largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each row's largest score and its first column, each [r]. Wide rows go by chunks, since `max` is slow."""
    chunk, width = CHUNK, scores.shape[1]
    if width < 16 * chunk:
        top, column = scores.max(dim=1)
        return top, column
    whole = width - width % chunk
    by_chunk = scores[:, :whole].unflatten(1, (-1, chunk)).amax(dim=2)  # type: ignore[no-untyped-call]
    if whole < width:
        by_chunk = torch.cat([by_chunk, scores[:, whole:].amax(dim=1, keepdim=True)], dim=1)
    top, place = by_chunk.max(dim=1)
    start = (place * chunk).clamp(max=width - chunk)
    window = start[:, None] + torch.arange(chunk, device=scores.device)
    found = (scores.gather(1, window) == top[:, None]).to(torch.uint8).argmax(dim=1)
    return top, start + found
