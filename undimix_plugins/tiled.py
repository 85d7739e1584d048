"""The fast path: the numbers of the plain reference (`loss.py`, `components.py`) in blocks of anchors.

1. Logits are inner products with the pool about its mean, in units of log 2, since `exp2` is cheaper than `exp`. While
   they fit a budget they are kept, of one batch with itself by half and mirrored; else a block is made when needed.
2. UnDiMix first takes every row's task gradient from its logits: the largest, the sum of the others, one product.
3. A block of anchors meets the whole pool, so that deviations and softmaxes are a row's own and exact. Its scores are
   mixed in a few buffers that a cache holds; what is excluded, a few columns, is written in, not masked.
4. A block leaves a number per anchor, the log-sum of its negatives, and the numerators of their softmax.
5. Backward is two products with the numerators, or one with their symmetric part where anchors are the pool. Where
   they do not fit, a mean loss adds up its gradient block by block in the forward pass; backward then scales it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor

from undimix_plugins.checks import values_are_free
from undimix_plugins.components import TaskGradients, euclidean_distances, groups
from undimix_plugins.contrast import WIDE, Contrast, full_precision, sum_of_rows
from undimix_plugins.weightings.undimix import ROUNDING, Prepared, UnDiMix
from undimix_plugins.weightings.weighting import Weighting, checked, weighs_alike

LOG2E = 1 / math.log(2)
KEPT_BYTES = 2**29  # up to which a contrast's logits and numerators are kept
BLOCK_BYTES = 2**22  # of a block of kept scores, so few that a cache holds them
LONE_BLOCK_BYTES = 2**25  # of a block that is worked out whenever it is needed: more, for the products' sake
FEW = 4  # excluded columns whose distances to the pool are taken off one after the other
TILE = 512  # rows and columns of what is mirrored at once on the CPU, whose caches hold few
DEVICE_TILE = 8192  # elsewhere, where each operation has to be a large one
LEAST_ROWS = 64  # of a block
PADDING = 16  # between rows: a power of two apart, all entries of a column would share a few lines of the cache
CONCENTRATED = 0.25  # the length of the mean of rows of length 1 from which sums over them are taken in float64
MODERATE = 2.0**64  # sums of exponentials from 1 over this to this need no reference taken off

# (rows, their logits, out) gives the scores of a block of anchors [r, m], logits plus log-weights; `out` is to work in.
Scorer = Callable[[slice, Tensor, Tensor], Tensor]
# A loss as a function of `log(negatives) - log(positive)` [r], and its derivative.
Margin = Callable[[Tensor], tuple[Tensor, Tensor]]


def fits(contrast: Contrast, matrices: int = 2) -> bool:
    """Whether so many matrices of the whole contrast are kept: logits and numerators, or what autograd needs."""
    return matrices * len(contrast.anchors) * len(contrast.pool) * contrast.pool.element_size() <= KEPT_BYTES


def blocks(count: int, row_bytes: int, kept: bool) -> list[slice]:
    """Slices of `count` rows of `row_bytes` each, a block of scores at a time."""
    # Beyond, not up to, the latter: more than 32 MiB is given back to the system, less may be left in pieces.
    step = max(LEAST_ROWS, BLOCK_BYTES // row_bytes if kept else LONE_BLOCK_BYTES // row_bytes + 1)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def blocks_of(contrast: Contrast) -> list[slice]:
    """The blocks of anchors in which their scores are worked out."""
    return blocks(len(contrast.anchors), len(contrast.pool) * contrast.pool.element_size(), fits(contrast))


def prepare(contrast: Contrast, weighting: Weighting) -> Any:
    """What `log_weights` needs; for `UnDiMix` what processes share, for the rest that this file works out nothing."""
    if is_worked_out(weighting, contrast) and weighting.influence and contrast.everyone is not None:
        return weighting.prepare(contrast)  # once, not in a backward pass again: it waits for the other processes
    return None if weighs_alike(weighting) or is_worked_out(weighting, contrast) else weighting.prepare(contrast)


def is_worked_out(weighting: Weighting, contrast: Contrast) -> TypeGuard[UnDiMix]:
    """Whether the weights, and their gradient, are worked out here."""
    if type(weighting) is not UnDiMix:
        return False
    # A temperature that learns has its gradient through the anchors, of which weights are to have no part.
    learned = isinstance(contrast.temperature, Tensor) and contrast.temperature.requires_grad
    return not (learned and weighting.carries_gradient and torch.is_grad_enabled())


def weights_carry_gradient(contrast: Contrast, weighting: Weighting, prepared: Any) -> bool:
    """Whether a loss has to follow the log-weights' own gradient."""
    if not torch.is_grad_enabled() or weighs_alike(weighting) or is_worked_out(weighting, contrast):
        return False
    log_weights = weighting.log_weights(prepared, slice(0, 1))
    return isinstance(log_weights, Tensor) and log_weights.requires_grad


def negative_log_sums(contrast: Contrast, weighting: Weighting, prepared: Any) -> Tensor:
    """The log of the weighted sum of each anchor's negatives [n], -inf for none; no gradient follows `log_weights`."""
    return NegativeLogSums.apply(contrast.anchors, contrast.pool, contrast, weighting, prepared)  # type: ignore[no-any-return]


def mean_loss(contrast: Contrast, weighting: Weighting, prepared: Any, loss: Margin) -> Tensor:
    """The mean of `loss` over the anchors; no gradient follows `log_weights`, and backward twice is an error."""
    rows = contrast.anchors, contrast.positives, contrast.pool
    return MeanLoss.apply(*rows, contrast, weighting, prepared, loss)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Columns:
    """The excluded columns of each anchor, so padded that they can be written to without a look at any of them."""

    index: Tensor  # [n, k]
    once: Tensor  # bool [n, k]: no padding
    padded: bool  # False where a look is free and shows no padding
    verdicts: LastMarks | None = None

    @staticmethod
    def of(contrast: Contrast) -> Columns:
        excluded = contrast.excluded
        assert excluded is not None
        dense = contrast.verdicts is not None or excluded.shape[1] > WIDE
        verdicts = LastMarks(contrast) if dense else None
        if dense:  # which mark these as well
            excluded = excluded[:, :0]
        once = excluded >= 0
        if excluded.shape[1] == 0 or (values_are_free(excluded) and bool(once.all())):
            return Columns(excluded, once, False, verdicts)
        index = torch.where(once, excluded, excluded.amax(dim=1, keepdim=True).clamp(min=0))
        return Columns(index, once, True, verdicts)

    def write(self, block: Tensor, rows: slice, value: float) -> Tensor:
        """Writes `value` into the excluded columns of a block of scores [r, m], and returns it."""
        if self.verdicts is not None:
            block.masked_fill_(self.verdicts(rows), value)
        if not self.padded:
            return block.scatter_(1, self.index[rows], value)
        # Padding writes what another excluded column of the anchor gets, or what is there.
        has_any = self.once[rows].any(dim=1, keepdim=True)
        return block.scatter_(1, self.index[rows], torch.where(has_any, value, block.gather(1, self.index[rows])))

    def marks(self, rows: slice, width: int) -> Tensor:
        """Which of so many columns are excluded, for a block of anchors: 1 or 0 [r, width]."""
        return self.write(self.index.new_zeros(len(self.index[rows]), width, dtype=torch.float), rows, 1)

    def largest_of_negatives(self, values: Tensor) -> Tensor:
        """The largest of the pool's `values` [q, m] among each anchor's negatives: [q, n], -inf for none."""
        if self.verdicts is not None:
            return torch.cat([self._largest_unmarked(values, rows) for rows in self.verdicts.blocks], dim=1)
        index = self.index.masked_fill(~self.once, -1) if self.padded else self.index
        tops, places = values.topk(min(index.shape[1] + 1, values.shape[1]))
        largest = torch.full_like(values[:, :1], -torch.inf)
        for top, place in zip(tops.T.flip(0), places.T.flip(0), strict=True):  # each [q], the largest last
            taken = (index == place[:, None, None]).any(dim=2)
            largest = torch.where(taken, largest, top[:, None])
        return largest

    def _largest_unmarked(self, values: Tensor, rows: slice) -> Tensor:
        count = len(self.index[rows])
        return torch.stack([self.write(of.repeat(count, 1), rows, -torch.inf).amax(dim=1) for of in values])


class LastMarks:
    """Marks on what is no negative; those of the last block are kept, since a block asks for them several times."""

    def __init__(self, contrast: Contrast) -> None:
        self.contrast, self.blocks = contrast, blocks_of(contrast)
        self.last: tuple[slice, Tensor] | None = None

    def __call__(self, rows: slice) -> Tensor:
        if self.last is None or self.last[0] != rows:
            self.last = rows, ~self.contrast.is_negative(rows)
        return self.last[1]


def write_one(block: Tensor, columns: Tensor, value: float) -> Tensor:
    """Writes `value` into a column each [r] of a block [r, m], nothing where that is -1, and returns it."""
    index = columns.clamp(min=0)[:, None]
    return block.scatter_(1, index, torch.where(columns[:, None] < 0, block.gather(1, index), value))


def finite(values: Tensor) -> Tensor:
    """-inf as the least number, so that it can be taken from another -inf."""
    return values.clamp(min=torch.finfo(values.dtype).min)


def are_moderate(totals: Tensor) -> bool:
    """Whether sums of exponentials are far from overflow and underflow; a look at them has to be free."""
    least, most = map(float, totals.aminmax())
    return least > 1 / MODERATE and most < MODERATE


def exponentials(scores: Tensor, columns: Columns, rows: slice, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Powers of 2 of a block's scores [r, m], 0 where excluded: their sums and what was taken off before, [r, 1] each.

    They are written to `out`, or over the scores for None. What is taken off, each row's largest, is taken from
    `scores` too; nothing is where there is an `out` and sums are moderate without.
    """
    if out is not None and values_are_free(scores):
        total = columns.write(torch.exp2(scores, out=out), rows, 0).sum(dim=1, keepdim=True)
        if are_moderate(total):
            return total, torch.zeros_like(total)
    columns.write(scores, rows, -torch.inf)
    top = finite(scores.amax(dim=1, keepdim=True))
    return torch.exp2(scores.sub_(top), out=scores if out is None else out).sum(dim=1, keepdim=True), top


class Workspace:
    """Memory for blocks of scores, kept from one call to the next on the CPU, whose allocator gives large ones back.

    To get them again costs a page fault for every 4 KiB, a fifth of a step at any batch size.
    """

    spare: ClassVar[dict[torch.dtype, Tensor]] = {}

    def __init__(self, like: Tensor, numbers: int) -> None:
        self.next = 0
        memory = self.spare.pop(like.dtype, None) if like.device.type == "cpu" else None
        if memory is None or len(memory) < numbers:
            with torch.inference_mode(False):
                memory = like.new_empty(numbers)
        self.memory = memory

    def block(self, rows: int, columns: int) -> Tensor:
        """An uninitialised block [rows, columns]."""
        width = columns + PADDING
        block = self.memory[self.next : self.next + rows * width].view(rows, width)[:, :columns]
        self.next += rows * width
        return block

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *error: object) -> None:
        if type(self.memory) is Tensor and self.memory.device.type == "cpu":
            self.spare[self.memory.dtype] = self.memory


class Logits:
    """Inner products with the pool about its mean, over the temperature, in units of log 2.

    `exp2(logits)` is `exp(s / t)` but for a factor of the anchor's, `exp2(offset)`, which no softmax depends on. About
    their mean, rows keep their digits when they are concentrated.

    Attributes:
        kept: All of them [n, m], in the memory that was given for it, or None: a block is made when it is needed.
            Excluded columns are written over.
        scratch: Blocks [rows, m] to work in.
    """

    def __init__(self, contrast: Contrast, kept: Tensor | None, rows: list[slice], scratch: list[Tensor]) -> None:
        self.contrast, self.kept, self.blocks, self.scratch = contrast, kept, rows, scratch
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
        """What they lack of the inner products with the pool as it is [n]."""
        return self.scaled @ self.centre

    def block(self, rows: slice, out: Tensor) -> Tensor:
        """The logits of a block of anchors [r, m]: kept ones, or written to `out`."""
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
        """The logits of a block of the pool against all anchors [r, n], but for a number for each row, to `out`."""
        if self.kept is None:
            return torch.mm(self.pool[rows], self.scaled_about_mean.T, out=out)
        torch.add(self.kept[:, rows].T, self.offset_about_mean, out=out)
        return write_zero_rows(self.pool[rows], out)


def tile_size(rows: Tensor) -> int:
    return TILE if rows.device.type == "cpu" else DEVICE_TILE


def write_zero_rows(rows: Tensor, logits: Tensor) -> Tensor:
    """Writes the logits [r, m] of rows of zeros [r, d], which are all 0: rounding is not to choose the largest."""
    zero = (rows == 0).all(dim=1)
    if not values_are_free(zero) or bool(zero.any()):
        logits.masked_fill_(zero[:, None], 0)
    return logits


def inner_products(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """`left @ right.T`, some columns at a time, so that a cache holds what is written."""
    step = 2 * tile_size(right)
    for start in range(0, len(right), step):
        columns = slice(start, start + step)
        torch.mm(left, right[columns].T, out=out[:, columns])
    return out


def own_products(scaled: Tensor, rows: Tensor, out: Tensor, along: Tensor | None = None) -> None:
    """`scaled @ rows.T`, of rows and a multiple of them, by half and mirrored; `along` [rows] is added to each row."""
    for above, columns in tile_pairs(rows):
        tile = torch.mm(scaled[above], rows[columns].T, out=out[above, columns])
        if above != columns and along is None:
            out[columns, above] = tile.T
        elif above != columns and along is not None:
            torch.add(tile.T, along[above], out=out[columns, above])
        if along is not None:
            tile.add_(along[columns])


def tile_pairs(rows: Tensor) -> Iterator[tuple[slice, slice]]:
    """The tiles, on and above the diagonal, of a square of the rows' products with each other."""
    size, count = tile_size(rows), len(rows)
    tiles = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    return ((rows, columns) for place, rows in enumerate(tiles) for columns in tiles[place:])


def largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """A row's largest score and the first column it stands in, each [r]; wide ones by chunks, since `max` is slow."""
    chunk, width = 64, scores.shape[1]
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
        self.group = None if group is None else group[: len(centred)]
        self.further_group = None if group is None else group[len(centred) :]

    def task_gradients(self, logits: Tensor, rows: slice, out: Tensor, further: Tensor | None) -> TaskGradients:
        """As `components._gradients`, of a block of tasks.

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
        if self.group is not None:
            assert self.further_group is not None
            group = self.group[label]
            if outside is not None:
                group = torch.where(outside, self.further_group[rows], group)
            same = self.group == group[:, None]
            copies = (logits - log_label[:, None]).exp2().masked_fill(~same, 0).sum(dim=1)
            if further is not None and outside is not None:
                same_further = (self.further_group[rows] == group) & ~outside
                copies = copies + outside + (further - log_label).exp2().masked_fill(~same_further, 0)
                further = further.masked_fill(same_further, -torch.inf)
            log_label = log_label + copies.log2()

        def others(block: Tensor, value: float) -> Tensor:
            """The block with `value` for the label and its copies."""
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


def has_same_tasks(contrast: Contrast) -> bool:
    """Whether a row's task is the same as an anchor and as a candidate: of one batch with itself."""
    return contrast.is_own_pool and bool(contrast.positives_in_pool)


def all_task_gradients(logits: Logits, longest: Tensor) -> tuple[TaskGradients, TaskGradients]:
    """The gradients of the anchors' tasks and of the pool's; `longest` is the length of the longest in the pool."""
    contrast, anchors, pool = logits.contrast, logits.anchors, logits.pool
    itself = torch.arange(len(pool), device=pool.device) if contrast.is_own_pool else contrast.itself
    further = logits_of_further = None
    if not contrast.positives_in_pool:
        positives = contrast.positives.detach()
        further = positives, positives - logits.centre
        logits_of_further = (logits.scaled * further[1]).sum(dim=1)
        longest = torch.maximum(longest, row_lengths(positives).max())
    candidates, parts = Candidates(pool, logits.centred, longest, further), []
    for rows in logits.blocks:
        count = rows.stop - rows.start
        block = logits.block(rows, logits.scratch[-1][:count])
        if contrast.is_own_pool:
            block.diagonal(rows.start).fill_(-torch.inf)
        elif itself is not None:
            write_one(block, itself[rows], -torch.inf)
        beside = None if logits_of_further is None else logits_of_further[rows]
        parts.append(candidates.task_gradients(block, rows, logits.scratch[0][:count], beside))
    of_anchors = together(parts)
    if has_same_tasks(contrast):
        return of_anchors, of_anchors
    candidates, parts = Candidates(anchors, anchors - anchors.mean(dim=0), row_lengths(anchors).max()), []
    of_pool = blocks(len(pool), len(anchors) * pool.element_size(), logits.kept is not None)
    first, second = pool.new_empty(2, of_pool[0].stop, len(anchors))
    for rows in of_pool:
        block = logits.transposed(rows, first[: rows.stop - rows.start])
        if itself is not None:
            here = (itself >= rows.start) & (itself < rows.stop)
            write_one(block.T, (itself - rows.start).masked_fill(~here, -1), -torch.inf)
        parts.append(candidates.task_gradients(block, rows, second[: len(block)], None))
    return of_anchors, together(parts)


def together(parts: list[TaskGradients]) -> TaskGradients:
    """Of all blocks of tasks."""
    return parts[0] if len(parts) == 1 else TaskGradients(*map(torch.cat, zip(*parts, strict=True)))


class UnDiMixScores:
    """The scores of a block of anchors under `UnDiMix`: logits plus log-weights, in units of log 2.

    What standardising and softmaxes undo is left as it comes: a number of an anchor's own added to all of a score.
    """

    def __init__(
        self, weighting: UnDiMix, prepared: Prepared | None, logits: Logits, columns: Columns, out: Tensor | None
    ) -> None:
        """`out` [n, m] is where numerators will be written, or None; blocks of it are given to work in."""
        weighting.check(logits.contrast)
        self.weighting, self.logits, self.columns = weighting, logits, columns
        self.count = logits.contrast.count[:, None].clamp(min=1)
        self.weight_total = self.count.clone()
        self.lengths = row_lengths(logits.pool)[:, 0]
        # Of one batch with itself, products of gradients are symmetric too, and wait where numerators will be.
        self.products = out if has_same_tasks(logits.contrast) else None
        strengths = ((score, getattr(weighting, score)) for score in ("influence", "similarity", "diversity"))
        self.strengths: dict[str, float] = {score: strength for score, strength in strengths if strength}
        # What bounds the terms summed in a score, per column of the pool: the largest of its negatives is an anchor's.
        bounds = [self.lengths]
        if weighting.influence:
            bounds += self._prepare_influence(prepared)
        self.bounds = torch.stack(bounds)
        if weighting.diversity:
            self._prepare_diversity()
        root = self.count.sqrt()
        self.eps = ROUNDING * torch.finfo(root.dtype).eps * root
        self.far = self._far_rows() if weighting.influence else None
        self.bound = self._rounding(self.bounds.amax(dim=1)[:, None, None]).square()
        by_strength = weighting.mixing == "geometric"
        factors = [strength if by_strength else 1.0 for strength in self.strengths.values()]
        self.factor = torch.stack([root * (LOG2E * weighting.hardness * factor) for factor in factors])

    def __call__(self, rows: slice, logits: Tensor, out: Tensor) -> Tensor:
        """Scores [r, m], but for what the mean of their weights [r] is above 1; `out` [r, m] is to work in."""
        scratch = [block[: len(out)] for block in self.logits.scratch]
        self.columns.write(logits, rows, 0)
        blocks = [getattr(self, score)(rows, logits, out) for score in self.strengths]
        blocks, scales = self._scales(rows, blocks)
        if self.weighting.mixing == "geometric":
            torch.mul(blocks[0], scales[0], out=out)
            for block, scale in zip(blocks[1:], scales[1:], strict=True):
                out.addcmul_(block, scale)
            weights = scratch[1] if self.weighting.carries_gradient else scratch[0]
            self.weight_total[rows] = exponentials(out, self.columns, rows, weights)[0]
            if self.weighting.carries_gradient:
                # As if similarities deviated by the temperature where they do by less.
                most = abs(self.weighting.hardness * self.weighting.similarity)
                self.steepness = scales[list(self.strengths).index("similarity")].clamp(-most, most)
            return torch.add(out, logits, out=scratch[0])
        of_all = sum(self.strengths.values())
        parts = []
        for block, scale, strength in zip(blocks, scales, self.strengths.values(), strict=True):
            share = self.count[rows] * (strength / of_all)
            if self.weighting.similarity:
                # Weights; what underflows has a logit so small that it does not count.
                part = torch.mul(block, scale, out=scratch[1] if block is logits else block)
                total = exponentials(part, self.columns, rows)[0]
                parts.append(part.mul_(torch.where(total > 0, share / total, 0)))
            else:
                part = block.mul_(scale)
                total = exponentials(part, self.columns, rows, scratch[1])[0]
                parts.append(part.add_((share / total).masked_fill(total == 0, 1).log2_()))
        log_weights = parts[0]
        for part in parts[1:]:
            if self.weighting.similarity:
                log_weights.add_(part)
            else:
                torch.logaddexp2(log_weights, part, out=log_weights)
        if self.weighting.similarity:
            log_weights.log2_()
        return torch.add(log_weights, logits, out=scratch[0])

    def _scales(self, rows: slice, blocks: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The scores, 0 in the excluded columns, and what standardises them to their strength: [scores, r, 1]."""
        totals = torch.stack([block.sum(dim=1, keepdim=True) for block in blocks])
        squares = torch.stack([row_lengths(block) for block in blocks]).square_()
        if self.far is None and values_are_free(totals):
            # About their mean: from sums alone while that cancels nothing, and no score is all rounding.
            about_mean = squares - totals.square().div_(self.count[rows])
            if bool((about_mean > torch.maximum(squares / 8, self.bound[:, rows])).all()):
                return blocks, about_mean.rsqrt_().mul_(self.factor[:, rows])
        means = totals / self.count[rows]
        blocks = [self.columns.write(block - mean, rows, 0) for block, mean in zip(blocks, means, strict=True)]
        lengths = torch.stack([row_lengths(block) for block in blocks])
        rounding = self.rounding[:, rows].clamp(min=0)  # -inf for an anchor without negatives
        return blocks, torch.where(lengths > rounding, self.factor[:, rows] / lengths, 0)

    def add_gradient(self, rows: slice, numerators: Tensor, total: Tensor) -> None:
        """Adds to the last block's numerators, of sum `total` [r, 1], what makes them the gradient of their log-sum.

        A logit counts by itself and, `steepness` times as much, as a part of the log-weight, whose mean is taken off.
        """
        scores, weights = (block[: len(numerators)] for block in self.logits.scratch[:2])
        of_all = self.weight_total[rows]
        mean = torch.where(of_all > 0, total / of_all, 0)
        # Their difference first: beside a huge steepness, what a logit counts by itself would be rounded away.
        numerators.addcmul_(torch.addcmul(numerators, weights, mean, value=-1, out=scores), self.steepness)

    def log_mean(self, rows: slice) -> Tensor:
        """The log of the mean weight [r, 1] that the scores are still to be relieved of."""
        total = self.weight_total[rows]
        return (total / self.count[rows]).masked_fill(total == 0, 1).log2()

    # Each gives a block of scores, 0 in the excluded columns.

    def similarity(self, rows: slice, logits: Tensor, out: Tensor) -> Tensor:
        return logits

    def influence(self, rows: slice, logits: Tensor, out: Tensor) -> Tensor:
        if self.products is not None:
            torch.mul(self.products[rows], self.scale_of_pool, out=out)
        elif self.far is None or values_are_free(out):
            inner_products(self.of_anchors.direction[rows], self.scaled_of_pool, out)
        if self.far is not None:
            self._write_far(rows, out)
        if self.inputs is not None:
            of_anchors, of_pool = self.inputs
            out.mul_(of_anchors[rows] @ of_pool.T)
        return self.columns.write(out, rows, 0)

    def diversity(self, rows: slice, logits: Tensor, out: Tensor) -> Tensor:
        excluded, pool, kept = self.logits.contrast.excluded, self.logits.pool, self.logits.kept
        assert excluded is not None
        out = self.logits.scratch[0][: len(out)]
        dense = self.columns.verdicts is not None
        if self.weighting.distance == "euclidean" and (dense or excluded.shape[1] > FEW):
            self._add_euclidean_distances(1 - self.columns.marks(rows, len(pool)).to(pool.dtype), out.zero_())
        elif self.weighting.distance == "euclidean":
            out.copy_(self.rest.expand_as(out))
            for column in excluded[rows].T:
                to_excluded = euclidean_distances(pool[column.clamp(min=0)], pool)
                out.sub_(to_excluded.masked_fill_(column[:, None] < 0, 0))
        elif dense:
            total = self.columns.marks(rows, len(pool)).to(pool.dtype) @ self.unit
            torch.add(self.rest, inner_products(total, self.centred, out), out=out)
        elif excluded.shape[1] == 0:
            out.copy_(self.rest.expand_as(out))
        elif not self.looks_up or kept is None:
            torch.add(self.rest, inner_products(self.excluded[rows], self.centred, out), out=out)
        else:
            start = (rows.start + len(kept) // 2) % len(kept)
            above = min(len(kept) - start, len(out))  # whose other view is no further than the last anchor
            torch.add(logits[:above], kept[start : start + above], out=out[:above])
            torch.add(logits[above:], kept[: len(out) - above], out=out[above:])
            out.add_(self.rest)
        return self.columns.write(out, rows, 0)

    def _add_euclidean_distances(self, weights: Tensor, out: Tensor) -> None:
        """Adds each row's weighted sum [r, m] of the distances to all of the pool."""
        pool = self.logits.pool
        for block in blocks(len(pool), len(pool) * pool.element_size(), True):
            out.addmm_(weights[:, block], euclidean_distances(pool[block], pool))

    def _prepare_influence(self, prepared: Prepared | None) -> list[Tensor]:
        self.of_anchors, self.of_pool = self._task_gradients(prepared)
        direction, log_scale, terms = self.of_pool
        self.largest_scale = finite(log_scale.max())
        self.scale_of_pool = (log_scale - self.largest_scale).exp()
        self.scaled_of_pool = direction * self.scale_of_pool[:, None]
        bounds = [row_lengths(self.scaled_of_pool)[:, 0], self.scale_of_pool * terms, log_scale]
        if self.products is not None:
            own_products(direction, direction, self.products)
        contrast, self.inputs = self.logits.contrast, None
        if self.weighting.gradient == "weight" and contrast.anchor_inputs is not None:
            assert contrast.pool_inputs is not None
            self.inputs = contrast.anchor_inputs.detach(), contrast.pool_inputs.detach()
            bounds.append(row_lengths(self.inputs[1])[:, 0])
        return bounds

    def _task_gradients(self, prepared: Prepared | None) -> tuple[TaskGradients, TaskGradients]:
        if prepared is not None and prepared.of_anchors is not None and prepared.of_pool is not None:
            return prepared.of_anchors, prepared.of_pool
        of_anchors, of_pool = all_task_gradients(self.logits, self.lengths.max())
        if self.weighting.gradient == "embedding" or not self.logits.contrast.normalized:
            return of_anchors, of_pool
        of_pool = of_pool.along_sphere(self.logits.pool)
        if has_same_tasks(self.logits.contrast):
            return of_pool, of_pool
        return of_anchors.along_sphere(self.logits.anchors), of_pool

    def _rounding(self, largest: Tensor) -> Tensor:
        """From the largest bounds among each anchor's negatives: the length up to which scores are rounding."""
        terms = {"similarity": row_lengths(self.logits.scaled) * largest[0]}
        if self.weighting.influence:
            direction, _, of_anchors = self.of_anchors
            terms["influence"] = of_anchors[:, None] * largest[1] + row_lengths(direction) * largest[2]
            if self.inputs is not None:
                terms["influence"] *= row_lengths(self.inputs[0]) * largest[4]
        if self.weighting.diversity:
            scale = largest[0] if self.weighting.distance == "euclidean" else self.logits.factor if self.looks_up else 1
            summed = self.count - 1 if self.columns.verdicts is None else torch.full_like(self.count, len(self.lengths))
            terms["diversity"] = summed.clamp(min=1) * scale
        return torch.stack([terms[score] for score in self.strengths]) * self.eps

    @cached_property
    def of_negatives(self) -> Tensor:
        """The largest bounds among each anchor's negatives [bounds, n, 1]."""
        return self.columns.largest_of_negatives(self.bounds)[:, :, None]

    @cached_property
    def rounding(self) -> Tensor:
        """The length up to which scores are rounding [scores, n, 1]."""
        return self._rounding(self.of_negatives)

    def _far_rows(self) -> Tensor | None:
        """The anchors [n] beside whose negatives' gradients the largest in the pool is huge: all would be 0."""
        log_scale, least = self.of_pool.log_scale, math.log(torch.finfo(self.eps.dtype).tiny) / 4.4
        if values_are_free(log_scale) and bool(log_scale.min() - self.largest_scale >= least):
            return None
        far = (self.of_negatives[3] - self.largest_scale)[:, 0] < least
        return far if not values_are_free(far) or bool(far.any()) else None

    def _write_far(self, rows: slice, out: Tensor) -> None:
        """Writes the influence for the anchors that are far, relative to the largest of their own negatives.

        For all of the block where a look at which they are is not free.
        """
        assert self.far is not None
        place: Tensor | slice = slice(0, len(out))
        anchors: Tensor | slice = rows
        if values_are_free(out):
            place = self.far[rows].nonzero()[:, 0]
            anchors = place + rows.start
        direction, log_scale, terms = self.of_pool
        columns = Columns(self.columns.index[anchors], self.columns.once[anchors], self.columns.padded)
        of_anchors = self.of_anchors.direction[anchors]
        every = slice(0, len(of_anchors))
        scale = columns.write(log_scale.expand(len(of_anchors), -1).clone(), every, -torch.inf)
        if self.columns.verdicts is not None:
            scale.masked_fill_(self.columns.verdicts(rows)[place], -torch.inf)
        scale = (scale - finite(scale.amax(dim=1, keepdim=True))).exp()
        out[place] = of_anchors @ direction.T * scale
        bound = self.of_anchors.terms[anchors, None] * (scale * row_lengths(direction).T).amax(dim=1, keepdim=True)
        bound += row_lengths(of_anchors) * (scale * terms).amax(dim=1, keepdim=True)
        if self.inputs is not None:
            bound *= row_lengths(self.inputs[0][anchors]) * self.of_negatives[4, anchors]
        self.rounding[list(self.strengths).index("influence"), anchors] = self.eps[anchors] * bound

    def _prepare_diversity(self) -> None:
        contrast, pool, lengths = self.logits.contrast, self.logits.pool, self.lengths
        assert contrast.excluded is not None
        self.looks_up = False
        if self.weighting.distance == "euclidean":
            if self.columns.verdicts is not None:
                return
            rows = blocks(len(pool), len(pool) * pool.element_size(), True)
            self.rest = torch.cat([euclidean_distances(pool[block], pool).sum(dim=1) for block in rows])
            return
        of_length_one = values_are_free(lengths) and all_one(lengths)
        unit = pool if of_length_one else pool / lengths.masked_fill(lengths == 0, 1)[:, None]
        total = unit.sum(dim=0)
        self.centred = self.logits.centred if of_length_one else unit - total / len(unit)
        # The distance to all of the pool but itself, plus what an anchor's excluded rows are similar.
        if values_are_free(unit) and bool(total.norm() <= CONCENTRATED * len(unit)):
            self.rest = -(self.centred @ total) - (lengths == 0).to(unit.dtype)
        else:
            self.rest = precise_distances(unit).to(unit.dtype)
        # For two views of rows of length 1, these are the excluded logits.
        self.looks_up = of_length_one and self.logits.kept is not None and is_two_views(contrast)
        if self.looks_up:
            self.rest *= self.logits.factor
        elif self.columns.verdicts is not None:
            self.unit = unit
        elif contrast.excluded.shape[1] > 0:
            self.excluded = sum_of_rows(unit, contrast.excluded)


def precise_distances(unit: Tensor) -> Tensor:
    """The distances of rows of length 1 to all others [m], less the same for all.

    In float64: of concentrated rows it is so little of the terms' sum that rounding would show, even in their lengths.
    """
    rows = unit if unit.device.type == "mps" else unit.double()  # which has none
    lengths = row_lengths(rows)
    rows = rows / lengths.masked_fill(lengths == 0, 1)
    return -((rows - rows.mean(dim=0)) @ rows.sum(dim=0)) - (lengths[:, 0] == 0).to(rows.dtype)


def row_lengths(rows: Tensor) -> Tensor:
    """The length of each row [r, 1]."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return lengths


def is_two_views(contrast: Contrast) -> bool:
    """Whether a look is free and shows anchors in two views, half their number apart, both excluded from the pool."""
    excluded, half = contrast.excluded, len(contrast.anchors) // 2
    assert excluded is not None
    if contrast.verdicts is not None or excluded.shape[1] != 2 or len(excluded) != 2 * half:
        return False
    if not values_are_free(excluded):
        return False
    if not torch.equal(excluded[:, 0], excluded[:, 1].roll(half)) or int(excluded.min()) < 0:
        return False
    return contrast.is_own_pool or torch.equal(contrast.anchors, contrast.pool[excluded[:, 1]])


def all_one(lengths: Tensor) -> bool:
    """Whether all are 1 but for rounding."""
    return bool(((lengths - 1).abs() <= ROUNDING * torch.finfo(lengths.dtype).eps).all())


def scorer_of(weighting: Weighting, prepared: Any, logits: Logits, columns: Columns, out: Tensor | None) -> Scorer:
    """What gives a weighting's scores: lean ones for our own weightings, else what `log_weights` says."""
    if weighs_alike(weighting):
        return lambda rows, block, out: block
    if type(weighting) is UnDiMix:
        return UnDiMixScores(weighting, prepared, logits, columns, out)

    def with_log_weights(rows: slice, block: Tensor, out: Tensor) -> Tensor:
        return torch.add(block, checked(weighting, weighting.log_weights(prepared, rows), block), alpha=LOG2E, out=out)

    return with_log_weights


class Numerators:
    """The softmax of each anchor's scores over its negatives, before it is divided by its sum, in blocks of anchors.

    Where weights carry a gradient, it is in the numerators: divided by the sum, they are the log-sum's gradient at the
    logits.

    Attributes:
        out: All numerators [n, m] where they fit, else those of the last block.
        total: The sums of the numerators of the blocks that are done [n, 1].
    """

    def __init__(self, contrast: Contrast, weighting: Weighting, prepared: Any, out: Tensor | None, work: Workspace):
        """`out` [n, m] takes all numerators; with None, each block's are in the memory of the last one's."""
        assert contrast.excluded is not None
        n, m = len(contrast.anchors), len(contrast.pool)
        rows = blocks_of(contrast)
        self.columns = Columns.of(contrast)
        self.whole = out is not None
        self.out = work.block(rows[0].stop, m) if out is None else out
        kept, scratch = None, []
        if type(weighting) is UnDiMix:
            kept = None if out is None else work.block(n, m)
            buffers = (2 if weighting.mixing == "linear" or weighting.carries_gradient else 1) + (kept is None)
            scratch = [work.block(rows[0].stop, m) for _ in range(buffers)]
        else:
            kept = out  # each block's scores and numerators are written over its logits
        self.logits = Logits(contrast, kept, rows, scratch)
        self.scorer = scorer_of(weighting, prepared, self.logits, self.columns, out)
        self.top = contrast.pool.new_empty(n, 1)
        self.total = contrast.pool.new_empty(n, 1)

    def block(self, rows: slice) -> Tensor:
        """Numerators [r, m] of a block of anchors."""
        out = self.out[rows] if self.whole else self.out[: rows.stop - rows.start]
        scratch = self.logits.scratch
        scores = self.scorer(rows, self.logits.block(rows, scratch[-1][: len(out)] if scratch else out), out)
        self.total[rows], self.top[rows] = exponentials(scores, self.columns, rows, out if scratch else None)
        if isinstance(self.scorer, UnDiMixScores) and self.scorer.weighting.carries_gradient:
            self.scorer.add_gradient(rows, out, self.total[rows])
        return out

    def log_sums(self, rows: slice) -> Tensor:
        """The log of the weighted sum of the negatives [r], less the logits' offset, of blocks that are done."""
        log_sum = self.total[rows].log2() + self.top[rows]
        if isinstance(self.scorer, UnDiMixScores):
            log_sum -= self.scorer.log_mean(rows)
        return log_sum[:, 0] / LOG2E

    @staticmethod
    def workspace(contrast: Contrast) -> Workspace:
        """Memory for what is kept and the scratch."""
        kept = 2 * len(contrast.anchors) if fits(contrast) else 0
        return Workspace(contrast.pool, (kept + 4 * blocks_of(contrast)[0].stop) * (len(contrast.pool) + PADDING))


def plain_log_sums(contrast: Contrast, centre: Tensor, out: Tensor) -> tuple[Tensor, Tensor] | None:
    """Numerators above the diagonal, by tiles in `out`, their sums [n, 1] and the log-sums [n], for equal weights.

    Of two views the numerators are symmetric while all are relative to the same bound; None where that is too high.
    The log-sums lack the logits' offset, as `Numerators.log_sums` do.
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


Sums = tuple[Tensor | None, Tensor | None]  # of the gradients of anchors and pool; one tensor where these are one


def zero_sums(anchors: Tensor, pool: Tensor, needed: tuple[bool, bool]) -> Sums:
    """What the gradients of anchors and pool are to be added to, None where they are not needed."""
    of_pool = torch.zeros_like(pool) if needed[1] else None
    return (of_pool if anchors is pool else torch.zeros_like(anchors) if needed[0] else None), of_pool


def add_gradients(numerators: Tensor, share: Tensor, anchors: Tensor, pool: Tensor, rows: slice, sums: Sums) -> None:
    """Adds those of a block of anchors to the sums, as `gradients` has them."""
    of_anchors, of_pool = sums
    if of_anchors is not None:
        of_anchors[rows].addcmul_(numerators @ pool, share)
    if of_pool is not None:
        of_pool.addmm_(numerators.T, anchors[rows] * share)


def gradients(numerators: Tensor, share: Tensor, anchors: Tensor, pool: Tensor, sums: Sums, *, symmetric: bool) -> None:
    """Adds those of `sum over i, j of share_i * numerators_ij * <a_i, v_j>` to the sums, the numerators held fixed.

    Symmetric numerators are given on and above the diagonal alone.
    """
    result = sums[1]
    if anchors is not pool or result is None:
        add_gradients(numerators, share, anchors, pool, slice(0, len(anchors)), sums)
        return
    # Of one batch with itself, both at once: a product with the symmetric part, tile by tile.
    size = min(tile_size(pool), len(pool))
    buffer = pool.new_empty(size, size + PADDING)
    for i, j in tile_pairs(pool):
        tile = buffer[: i.stop - i.start, : j.stop - j.start]
        if symmetric:
            torch.add(share[i], share[j].T, out=tile).mul_(numerators[i, j])
        else:
            torch.mul(numerators[i, j], share[i], out=tile).addcmul_(numerators[j, i].T, share[j].T)
        result[i].addmm_(tile, pool[j])
        if i != j:
            result[j].addmm_(tile.T, pool[i])


class Once(torch.autograd.Function):
    """A gradient as it is, which says so when it is asked for its own, rather than pass for a constant."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        raise RuntimeError(
            "the weighted losses can be differentiated once; this is their gradient's gradient. "
            "For that, `weighted_log_sum` is the plain reference"
        )


def once(gradients: Iterable[Tensor | None], contrast: Contrast) -> tuple[Tensor | None, ...]:
    """What a backward returns for anchors, positives and pool, or those of them that it has."""
    if not torch.is_grad_enabled():  # but with create_graph=True
        return tuple(gradients)
    inputs = contrast.anchors, contrast.positives, contrast.pool
    return tuple(None if rows is None else Once.apply(rows, *inputs) for rows in gradients)


class NegativeLogSums(torch.autograd.Function):
    """The log of the weighted sum of each anchor's negatives [n]; numerators that do not fit are made twice."""

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, pool: Tensor, contrast: Contrast, weighting: Weighting, prepared: Any
    ) -> Tensor:
        numerators = None
        if fits(contrast):
            numerators = pool.new_empty(len(anchors), len(pool) + PADDING)[:, : len(pool)]
        with Numerators.workspace(contrast) as memory:
            work = Numerators(contrast, weighting, prepared, numerators, memory)
            for rows in work.logits.blocks:
                work.block(rows)
        # The last three that a change of them, before they are used again, be an error.
        again = contrast.positives, contrast.anchor_inputs, contrast.pool_inputs
        ctx.save_for_backward(anchors, pool, numerators, work.total, *again)
        ctx.of_what = contrast, weighting, prepared
        return work.log_sums(slice(0, len(anchors))) + work.logits.offset / LOG2E

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        anchors, pool, numerators, total, *_ = ctx.saved_tensors
        contrast, weighting, prepared = ctx.of_what
        pool = pool.detach()
        anchors = pool if contrast.anchors is contrast.pool else anchors.detach()
        sums = zero_sums(anchors, pool, ctx.needs_input_grad[:2])
        share = torch.where(total > 0, grad.detach()[:, None] / (total * contrast.held_temperature), 0)
        with full_precision(pool):
            if numerators is not None:
                gradients(numerators, share, anchors, pool, sums, symmetric=False)
            else:
                with Numerators.workspace(contrast) as memory:
                    work = Numerators(contrast, weighting, prepared, None, memory)
                    for rows in work.logits.blocks:
                        add_gradients(work.block(rows), share[rows], anchors, pool, rows, sums)
        of_anchors, of_pool = sums
        return *once([None if anchors is pool else of_anchors, of_pool], contrast), None, None, None


class MeanLoss(torch.autograd.Function):
    """The mean over the anchors of a function of their margins, with its gradient worked out in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        positives: Tensor,
        pool: Tensor,
        contrast: Contrast,
        weighting: Weighting,
        prepared: Any,
        loss: Margin,
    ) -> Tensor:
        needed = ctx.needs_input_grad
        pool = pool.detach()
        anchors = pool if contrast.anchors is contrast.pool else anchors.detach()
        of_anchors, of_pool = sums = zero_sums(anchors, pool, (needed[0], needed[2]))
        n, centre, weights = len(anchors), pool.mean(dim=0), contrast.anchor_weights
        positive_logits = (anchors * (positives - centre)).sum(dim=1) / contrast.held_temperature

        def finish(total: Tensor, log_sums: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            losses, slope = loss(log_sums - positive_logits[rows])
            if weights is not None:
                losses, slope = losses * weights[rows], slope * weights[rows]
            slope = slope[:, None] / (n * contrast.held_temperature)
            return losses, slope, torch.where(total > 0, slope / total, 0)

        with Numerators.workspace(contrast) as memory:
            every, plain, by_block = slice(0, n), None, []
            out = memory.block(n, len(pool)) if fits(contrast) else None
            if out is not None and weighs_alike(weighting) and contrast.is_own_pool and is_two_views(contrast):
                plain = plain_log_sums(contrast, centre, out)
            if plain is None:
                work = Numerators(contrast, weighting, prepared, out, memory)
                for rows in work.logits.blocks:
                    numerators = work.block(rows)
                    if out is None:
                        by_block.append(finish(work.total[rows], work.log_sums(rows), rows))
                        add_gradients(numerators, by_block[-1][2], anchors, pool, rows, sums)
            if out is None:
                losses, slope, _ = map(torch.cat, zip(*by_block, strict=True))
            else:
                losses, slope, share = finish(*(plain or (work.total, work.log_sums(every))), every)
                gradients(out, share, anchors, pool, sums, symmetric=plain is not None)
        if of_anchors is not None:
            of_anchors.addcmul_(positives, slope, value=-1)
        ctx.contrast = contrast
        of_positives = anchors * -slope if needed[1] else None
        ctx.save_for_backward(None if anchors is pool else of_anchors, of_positives, of_pool)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if rows is None else rows * grad for rows in ctx.saved_tensors)
        return *once(scaled, ctx.contrast), None, None, None, None
