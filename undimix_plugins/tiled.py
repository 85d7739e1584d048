"""The fast path: the numbers of the plain reference (`loss.py`, `components.py`) in blocks of anchors.

1. Logits are inner products in units of log 2, since `exp2` is cheaper than `exp`. While they fit a budget they are
   kept, those of one batch with itself worked out by half and mirrored; else a block is made whenever it is needed.
2. UnDiMix first takes every row's task gradient from its logits: the largest, the second largest, one product.
3. A block of anchors meets the whole pool, so that means, deviations and softmaxes are a row's own and exact. Its
   scores are written over each other in a few buffers; what is excluded, a few columns, is written in, not masked.
4. A block leaves a number per anchor, the log-sum of its negatives, and the numerators of their softmax.
5. Backward is two products with the numerators, or one with their symmetric part where anchors are the pool. Where
   they do not fit, a mean loss adds up its gradient block by block in the forward pass; backward then scales it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from undimix_plugins.checks import values_are_free
from undimix_plugins.components import TaskGradients, equality_key, euclidean_distances, sum_of_rows
from undimix_plugins.contrast import Contrast, full_precision
from undimix_plugins.weightings.undimix import ROUNDING, UnDiMix
from undimix_plugins.weightings.weighting import Uniform, Weighting, checked

LOG2E = 1 / math.log(2)
KEPT_BYTES = 2**29  # up to which a contrast's logits and numerators are kept
BLOCK_BYTES = 2**22  # of a block of kept scores, so few that a cache holds them
LONE_BLOCK_BYTES = 2**25  # of a block that is worked out whenever it is needed: more, for the products' sake
TILE = 512  # rows and columns of what is mirrored at once
LEAST_ROWS = 64  # of a block
PADDING = 16  # between rows: a power of two apart, all entries of a column would share a few lines of the cache
MOST_LOOKED_UP = 4  # excluded columns whose products are looked up, not worked out again

# (rows, their logits, out) writes scores; returns what is still to be added to a row's, or None.
Scorer = Callable[[slice, Tensor, Tensor], Tensor | None]


def fits(contrast: Contrast) -> bool:
    """Whether logits and numerators of the whole contrast are kept."""
    return 2 * len(contrast.anchors) * len(contrast.pool) * contrast.pool.element_size() <= KEPT_BYTES


def blocks(count: int, row_bytes: int, kept: bool) -> list[slice]:
    """Slices of `count` rows of `row_bytes` each, a block of scores at a time."""
    step = max(LEAST_ROWS, (BLOCK_BYTES if kept else LONE_BLOCK_BYTES) // row_bytes)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


class Columns(NamedTuple):
    """The excluded columns of each anchor, so padded that they can be written to without a look at any of them."""

    index: Tensor  # [n, k]
    once: Tensor  # bool [n, k]: no padding
    padded: bool  # False where a look is free and shows no padding

    @staticmethod
    def of(excluded: Tensor) -> Columns:
        once = excluded >= 0
        if values_are_free(excluded) and bool(once.all()):
            return Columns(excluded, once, False)
        return Columns(torch.where(once, excluded, excluded.amax(dim=1, keepdim=True).clamp(min=0)), once, True)

    def write(self, block: Tensor, rows: slice, value: float) -> None:
        """Writes `value` into the excluded columns of a block of scores [r, m]."""
        if self.padded:
            # Padding writes what another excluded column of the anchor gets, or what is there.
            has_any = self.once[rows].any(dim=1, keepdim=True)
            block.scatter_(1, self.index[rows], torch.where(has_any, value, block.gather(1, self.index[rows])))
        else:
            block.scatter_(1, self.index[rows], value)

    def total(self, block: Tensor, rows: slice) -> Tensor:
        """The sum of a block's scores in the excluded columns [r, 1]."""
        scores = block.gather(1, self.index[rows])
        return (scores.masked_fill(~self.once[rows], 0) if self.padded else scores).sum(dim=1, keepdim=True)

    def largest_of_negatives(self, values: Tensor) -> Tensor:
        """The largest of the pool's `values` [q, m] among each anchor's negatives: [q, n], -inf for none."""
        top, place = values.topk(min(self.index.shape[1] + 1, values.shape[1]))
        index = self.index.masked_fill(~self.once, -1) if self.padded else self.index
        taken = (place[:, :, None, None] == index).any(dim=3)
        return torch.where(taken, -torch.inf, top[:, :, None]).amax(dim=1)


def write_one(block: Tensor, columns: Tensor, value: float) -> None:
    """Writes `value` into a column each [r] of a block [r, m]; nothing where that is -1."""
    index = columns.clamp(min=0)[:, None]
    block.scatter_(1, index, torch.where(columns[:, None] < 0, block.gather(1, index), value))


def finite(values: Tensor) -> Tensor:
    """-inf as the least number, so that it can be taken from another -inf."""
    return values.clamp(min=torch.finfo(values.dtype).min)


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
    """Inner products over the temperature, in units of log 2: `exp2(logits) = exp(s / t)`.

    Attributes:
        kept: All of them [n, m], in the memory that was given for it, or None: a block is made when it is needed.
        scratch: Blocks [rows, m] to work in.
    """

    def __init__(self, contrast: Contrast, kept: Tensor | None, rows: list[slice], scratch: list[Tensor]) -> None:
        self.contrast, self.kept, self.blocks, self.scratch = contrast, kept, rows, scratch
        self.pool = contrast.pool.detach()
        self.anchors = self.pool if contrast.anchors is contrast.pool else contrast.anchors.detach()
        self.factor = LOG2E / contrast.temperature
        self.scaled = self.anchors * self.factor
        if kept is not None:
            self._products(kept)

    def block(self, rows: slice, out: Tensor) -> Tensor:
        """The logits of a block of anchors [r, m]: kept ones, to be read only, or written to `out`."""
        if self.kept is not None:
            return self.kept[rows]
        return torch.mm(self.scaled[rows], self.pool.T, out=out)

    def transposed(self, rows: slice) -> Tensor:
        """The logits of a block of the pool against all anchors [r, n], a copy."""
        if self.kept is not None:
            return self.kept[:, rows].clone().T
        return self.pool[rows] @ self.scaled.T

    def _products(self, out: Tensor) -> None:
        count = len(self.anchors)
        if self.anchors is not self.pool or count <= TILE:
            torch.mm(self.scaled, self.pool.T, out=out)
            return
        for rows, columns in tile_pairs(count):
            torch.mm(self.scaled[rows], self.pool[columns].T, out=out[rows, columns])
            if rows != columns:
                out[columns, rows] = out[rows, columns].T


def tile_pairs(count: int) -> Iterator[tuple[slice, slice]]:
    """The tiles of a square on and above its diagonal."""
    tiles = [slice(start, min(start + TILE, count)) for start in range(0, count, TILE)]
    return ((rows, columns) for place, rows in enumerate(tiles) for columns in tiles[place:])


def largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """A row's largest score and the first column it stands in, each [r]; wide ones by chunks, since `max` is slow."""
    chunk, width = 64, scores.shape[1]
    if width < 16 * chunk:
        top, column = scores.max(dim=1)
        return top, column
    whole = width - width % chunk
    by_chunk = scores[:, :whole].unflatten(1, (-1, chunk)).amax(dim=2)
    if whole < width:
        by_chunk = torch.cat([by_chunk, scores[:, whole:].amax(dim=1, keepdim=True)], dim=1)
    top, place = by_chunk.max(dim=1)
    start = (place * chunk).clamp(max=width - chunk)
    window = start[:, None] + torch.arange(chunk, device=scores.device)
    found = (scores.gather(1, window) == top[:, None]).to(torch.uint8).argmax(dim=1)
    return top, start + found


class Candidates:
    """What a task chooses from: rows about their mean, and which of them are the same."""

    def __init__(self, rows: Tensor, longest: Tensor, further: Tensor | None = None) -> None:
        centre = rows.mean(dim=0)
        self.rows, self.longest = rows - centre, longest
        self.further = None if further is None else further - centre  # a candidate of one task each
        group = groups(rows if further is None else torch.cat([rows, further]))
        self.group = None if group is None else group[: len(rows)]
        self.further_group = None if group is None or further is None else group[len(rows) :]


def groups(rows: Tensor) -> Tensor | None:
    """A number for each row [rows] that equal ones share, or None where a look is free and shows none equal."""
    ordered, order = equality_key(rows, 0).sort(stable=True)
    new = ordered[1:] != ordered[:-1]
    if values_are_free(rows) and bool(new.all()):
        return None
    second = equality_key(rows, 1)[order]
    new |= second[1:] != second[:-1]
    return torch.zeros_like(order).scatter(0, order, torch.cat([new.new_zeros(1), new]).cumsum(0))


def task_gradients(
    logits: Tensor, candidates: Candidates, rows: slice, further: Tensor | None = None
) -> TaskGradients:
    """As `components._gradients`, of a block of tasks from their logits [r, candidates], which are written over.

    `further` [r] are the logits of `candidates.further[rows]`.
    """
    top, label = largest(logits)
    label_rows = candidates.rows[label]
    if further is not None:
        assert candidates.further is not None
        outside = further > top
        top = torch.where(outside, further, top)
        label = torch.where(outside, -1, label)
        label_rows = torch.where(outside[:, None], candidates.further[rows], label_rows)
        further = further.masked_fill(outside, -torch.inf)
    log_label = finite(top)
    if candidates.group is not None:
        # What is the label over again adds v_y - v_y; beside it, rounding would leave nothing of the other terms.
        group = candidates.group[label.clamp(min=0)]
        if further is not None:
            assert candidates.further_group is not None
            group = torch.where(outside, candidates.further_group[rows], group)
        same = candidates.group == group[:, None]
        total = (logits - log_label[:, None]).exp2().masked_fill(~same, 0).sum(dim=1)
        if further is not None:
            assert candidates.further_group is not None
            same_further = (candidates.further_group[rows] == group) & ~outside
            total = total + outside + (further - log_label).exp2().masked_fill(~same_further, 0)
            further = further.masked_fill(same_further, -torch.inf)
        log_label = log_label + total.log2()
        logits.masked_fill_(same, -torch.inf)
    elif further is None:
        logits.scatter_(1, label[:, None], -torch.inf)
    else:
        write_one(logits, label, -torch.inf)
    # Probabilities relative to the second likeliest: 1 - p_label is never formed, so that nothing cancels.
    second = logits.amax(dim=1)
    second = finite(second if further is None else torch.maximum(second, further))
    relative = logits.sub_(second[:, None]).exp2_()
    total = relative.sum(dim=1)
    direction = relative @ candidates.rows
    if further is not None:
        assert candidates.further is not None
        further = (further - second).exp2()
        total = total + further
        direction.addcmul_(candidates.further[rows], further[:, None])
    log_scale = (second - torch.logaddexp2(log_label, second + total.log2())) / LOG2E
    return TaskGradients(
        direction.addcmul_(label_rows, total[:, None], value=-1),
        log_scale.masked_fill(total == 0, -torch.inf),
        total * candidates.longest,
    )


def all_task_gradients(logits: Logits, longest: Tensor) -> tuple[TaskGradients, TaskGradients]:
    """The gradients of the anchors' tasks and of the pool's; `longest` is the length of the longest in the pool."""
    contrast, anchors, pool = logits.contrast, logits.anchors, logits.pool
    itself = contrast.itself
    further = None
    candidates = Candidates(pool, longest)
    if not contrast.positives_in_pool:
        positives = contrast.positives.detach()
        further = (logits.scaled * positives).sum(dim=1)
        candidates = Candidates(pool, torch.maximum(longest, positives.norm(dim=1).max()), positives)
    parts = []
    for rows in logits.blocks:
        scratch = logits.scratch[0][: rows.stop - rows.start]
        block = logits.block(rows, scratch)
        block = block if block is scratch else scratch.copy_(block)
        if contrast.is_own_pool:
            block.diagonal(rows.start).fill_(-torch.inf)
        elif itself is not None:
            write_one(block, itself[rows], -torch.inf)
        parts.append(task_gradients(block, candidates, rows, None if further is None else further[rows]))
    of_anchors = joined(parts)
    if contrast.is_own_pool and further is None:  # a row's task is the same on either side
        return of_anchors, of_anchors
    candidates, parts = Candidates(anchors, anchors.norm(dim=1).max()), []
    for rows in blocks(len(pool), len(anchors) * pool.element_size(), logits.kept is not None):
        block = logits.transposed(rows)
        if contrast.is_own_pool:
            block.diagonal(rows.start).fill_(-torch.inf)
        elif itself is not None:
            here = (itself >= rows.start) & (itself < rows.stop)
            write_one(block.T, (itself - rows.start).masked_fill(~here, -1), -torch.inf)
        parts.append(task_gradients(block, candidates, rows))
    return of_anchors, joined(parts)


def joined(parts: list[TaskGradients]) -> TaskGradients:
    """Blocks of gradients as one."""
    return parts[0] if len(parts) == 1 else TaskGradients(*(torch.cat(part) for part in zip(*parts, strict=True)))


class UnDiMixScores:
    """The scores of a block of anchors under `UnDiMix`: logits and log-weights, in units of log 2."""

    def __init__(self, weighting: UnDiMix, logits: Logits, columns: Columns) -> None:
        self.weighting, self.logits, self.columns = weighting, logits, columns
        self.count = logits.contrast.count[:, None].clamp(min=1)
        self.root = self.count.sqrt()
        self.lengths = logits.pool.norm(dim=1)
        self.parts: list[tuple[float, Callable[[slice, Tensor, Tensor], Tensor]]] = []
        # What bounds the terms that are summed in a score of the pool's: the largest of its negatives is an anchor's.
        sizes = [self.lengths]
        if weighting.similarity:
            self.parts.append((weighting.similarity, self.similarity))
        if weighting.influence:
            self.parts.append((weighting.influence, self.influence))
            self._prepare_influence(sizes)
        if weighting.diversity:
            self.parts.append((weighting.diversity, self.diversity))
            self._prepare_diversity()
        self.largest = columns.largest_of_negatives(torch.stack(sizes))[:, :, None]
        self._bound_rounding()

    def __call__(self, rows: slice, logits: Tensor, out: Tensor) -> Tensor | None:
        factor, root = LOG2E * self.weighting.hardness, self.root[rows]
        if self.weighting.mixing == "geometric":
            for place, (strength, score) in enumerate(self.parts):
                block = out if place == 0 else self._scratch(rows, 1)
                scale = score(rows, logits, block) * (root * (factor * strength))
                out.mul_(scale) if place == 0 else out.addcmul_(block, scale)
            log_mean = self._exponentials(out, rows, self._scratch(rows, 1))
            out.add_(logits)
            return -log_mean
        out.zero_()
        total = sum(strength for strength, _ in self.parts)
        block = self._scratch(rows, 1)
        for strength, score in self.parts:
            block.mul_(score(rows, logits, block) * (root * factor))
            log_mean = self._exponentials(block, rows, block)
            out.addcmul_(block, (-log_mean).exp2()[:, None], value=strength / total)
        out.log2_().add_(logits)
        return None

    def _scratch(self, rows: slice, number: int) -> Tensor:
        return self.logits.scratch[number][: rows.stop - rows.start]

    def _exponentials(self, scores: Tensor, rows: slice, out: Tensor) -> Tensor:
        """Takes each row's largest from `scores` and writes their powers of 2 to `out`; the log of their mean [r]."""
        self.columns.write(scores, rows, -torch.inf)
        scores.sub_(finite(scores.amax(dim=1, keepdim=True)))
        total = torch.exp2(scores, out=out).sum(dim=1)
        return (total / self.count[rows, 0]).masked_fill(total == 0, 1).log2()

    # Each writes a block of scores, centred on the row's negatives, and returns one over their length [r, 1].

    def similarity(self, rows: slice, logits: Tensor, out: Tensor) -> Tensor:
        return self._centre(logits, out, rows, self.similarity_rounding[rows])

    def influence(self, rows: slice, logits: Tensor, out: Tensor) -> Tensor:
        torch.mm(self.of_anchors.direction[rows], self.scaled_of_pool.T, out=out)
        rounding = self.influence_rounding[rows]
        if self.far is not None:
            rounding = self._far(rows, out, rounding)
        if self.weighting.gradient == "weight":
            contrast, inputs = self.logits.contrast, self._scratch(rows, 2)
            assert contrast.anchor_inputs is not None
            assert contrast.pool_inputs is not None
            out.mul_(torch.mm(contrast.anchor_inputs[rows].detach(), contrast.pool_inputs.detach().T, out=inputs))
        return self._centre(out, out, rows, rounding)

    def diversity(self, rows: slice, logits: Tensor, out: Tensor) -> Tensor:
        other = self._scratch(rows, 2)
        if self.weighting.distance == "euclidean":
            pool = self.logits.pool
            out.copy_(self.rest.expand_as(out))
            for column in self.excluded[rows].T:
                to_excluded = euclidean_distances(pool[column.clamp(min=0)], pool)
                out.sub_(to_excluded.masked_fill_(column[:, None] < 0, 0))
        elif self.others is None:
            torch.sub(self.rest, torch.mm(self.total[rows], self.centred.T, out=out), out=out)
        else:
            kept = self.logits.kept
            assert kept is not None
            torch.mul(logits, self.to_cosine[rows], out=out)
            for place in range(self.others.shape[1]):
                torch.index_select(kept, 0, self.others[rows, place], out=other)
                out.addcmul_(other, self.others_to_cosine[rows, place, None])
            out.mul_(self.to_cosine.T).add_(self.rest)
        return self._centre(out, out, rows, self.diversity_rounding[rows])

    def _centre(self, scores: Tensor, out: Tensor, rows: slice, rounding: Tensor) -> Tensor:
        total = scores.sum(dim=1, keepdim=True) - self.columns.total(scores, rows)
        torch.sub(scores, total / self.count[rows], out=out)
        self.columns.write(out, rows, 0)
        length = torch.linalg.vector_norm(out, dim=1, keepdim=True)
        return torch.where(length > rounding, 1 / length, 0)

    def _bound_rounding(self) -> None:
        eps = ROUNDING * torch.finfo(self.lengths.dtype).eps * self.root
        contrast, longest = self.logits.contrast, self.largest[0]
        self.similarity_rounding = eps * self.logits.scaled.norm(dim=1, keepdim=True) * longest
        if self.weighting.influence:
            of_anchors = self.of_anchors
            terms, length = of_anchors.terms[:, None], of_anchors.direction.norm(dim=1, keepdim=True)
            self.influence_rounding = eps * (terms * self.largest[1] + length * self.largest[2])
            if self.weighting.gradient == "weight":
                assert contrast.anchor_inputs is not None
                self.input_lengths = contrast.anchor_inputs.detach().norm(dim=1, keepdim=True) * self.largest[4]
                self.influence_rounding *= self.input_lengths
            # Beside a huge gradient that is no negative of an anchor's, its own negatives' would all be 0.
            tiny = torch.finfo(eps.dtype).tiny
            far = (self.largest[3] - self.largest_scale)[:, 0] < math.log(tiny) / 4.4
            self.far = far if not values_are_free(far) or bool(far.any()) else None
        if self.weighting.diversity:
            others = (self.count - 1).clamp(min=1)
            if self.weighting.distance == "euclidean":
                self.diversity_rounding = eps * others * longest
            else:
                self.diversity_rounding = eps * others * (1 if self.others is None else self.logits.factor)

    def _prepare_influence(self, sizes: list[Tensor]) -> None:
        contrast = self.logits.contrast
        self.of_anchors, of_pool = all_task_gradients(self.logits, self.lengths.max())
        self.of_pool, self.largest_scale = of_pool, finite(of_pool.log_scale.max())
        scale = (of_pool.log_scale - self.largest_scale).exp()
        self.scaled_of_pool = of_pool.direction * scale[:, None]
        sizes += [self.scaled_of_pool.norm(dim=1), scale * of_pool.terms, of_pool.log_scale]
        if self.weighting.gradient == "weight":
            assert contrast.pool_inputs is not None
            sizes.append(contrast.pool_inputs.detach().norm(dim=1))

    def _far(self, rows: slice, out: Tensor, rounding: Tensor) -> Tensor:
        """Writes the influence of anchors whose own scale is far below the largest; returns all anchors' rounding."""
        assert self.far is not None
        far = self.far[rows]
        place = far.nonzero()[:, 0] if values_are_free(far) else torch.arange(len(far), device=far.device)
        anchors = place + rows.start
        of_pool, direction = self.of_pool, self.of_anchors.direction[anchors]
        scale = self.of_pool.log_scale.expand(len(place), -1).clone()
        Columns(self.columns.index[anchors], self.columns.once[anchors], self.columns.padded).write(
            scale, slice(0, len(place)), -torch.inf
        )
        scale = (scale - finite(scale.amax(dim=1, keepdim=True))).exp()
        out[place] = direction @ of_pool.direction.T * scale
        largest_length = (scale * of_pool.direction.norm(dim=1)).amax(dim=1, keepdim=True)
        largest_terms = (scale * of_pool.terms).amax(dim=1, keepdim=True)
        bound = self.of_anchors.terms[anchors, None] * largest_length
        bound += direction.norm(dim=1, keepdim=True) * largest_terms
        if self.weighting.gradient == "weight":
            bound *= self.input_lengths[anchors]
        return rounding.index_copy(
            0, place, ROUNDING * torch.finfo(bound.dtype).eps * self.root[anchors] * bound
        )

    def _prepare_diversity(self) -> None:
        contrast, pool, lengths = self.logits.contrast, self.logits.pool, self.lengths
        assert contrast.excluded is not None
        self.excluded, self.others = contrast.excluded, None
        if self.weighting.distance == "euclidean":
            rows = blocks(len(pool), len(pool) * pool.element_size(), True)
            self.rest = torch.cat([euclidean_distances(pool[block], pool).sum(dim=1) for block in rows])
            return
        unit = pool / lengths.masked_fill(lengths == 0, 1)[:, None]
        total, own = unit.sum(dim=0), unit.square().sum(dim=1)
        self.centred = unit - total / len(unit)
        # From <sum of the anchor's negatives, v_j>: where its products are at hand, less those of the excluded.
        if self.logits.kept is not None and contrast.is_own_pool and self.excluded.shape[1] <= MOST_LOOKED_UP:
            self.rest = (own - self.centred @ total) * self.logits.factor
            self.to_cosine = (1 / lengths).masked_fill(lengths == 0, 0)[:, None]
            others = self.excluded[:, :-1]  # the last is the anchor itself
            self.others = others.clamp(min=0)
            self.others_to_cosine = self.to_cosine[self.others, 0].masked_fill(others < 0, 0)
        else:
            self.rest = own
            self.total = total - sum_of_rows(unit, self.excluded)


def scorer_of(weighting: Weighting, prepared: Any, logits: Logits, columns: Columns) -> Scorer:
    """What writes a weighting's scores: lean ones for our own weightings, else what `log_weights` says."""
    if type(weighting) is Uniform:
        return lambda rows, block, out: None
    if type(weighting) is UnDiMix:
        return UnDiMixScores(weighting, logits, columns)

    def add_log_weights(rows: slice, block: Tensor, out: Tensor) -> None:
        torch.add(block, checked(weighting, weighting.log_weights(prepared, rows), block), alpha=LOG2E, out=out)

    return add_log_weights


class Numerators:
    """The softmax of each anchor's scores over its negatives, before it is divided by its sum, in blocks of anchors."""

    def __init__(self, contrast: Contrast, weighting: Weighting, prepared: Any, out: Tensor | None, work: Workspace):
        """`out` [n, m] takes all numerators; with None, each block's are in the memory of the last one's."""
        assert contrast.excluded is not None
        n, m = len(contrast.anchors), len(contrast.pool)
        rows = blocks(n, m * contrast.pool.element_size(), out is not None)
        scratch = [work.block(rows[0].stop, m) for _ in range(3 if type(weighting) is UnDiMix else 1)]
        kept = out
        if out is not None and type(weighting) is UnDiMix:
            kept = work.block(n, m)
        self.columns = Columns.of(contrast.excluded)
        self.logits = Logits(contrast, kept, rows, scratch)
        self.scorer = scorer_of(weighting, prepared, self.logits, self.columns)
        self.out = out if out is not None else work.block(rows[0].stop, m)

    def block(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Numerators [r, m] of a block of anchors; the log of their weighted sum and their own sum, each [r]."""
        count = rows.stop - rows.start
        out = self.out[rows] if self.logits.kept is not None else self.out[:count]
        logits = self.logits.block(rows, self.logits.scratch[0][:count])
        constant = self.scorer(rows, logits, out)
        self.columns.write(out, rows, -torch.inf)
        top = finite(out.amax(dim=1, keepdim=True))
        total = out.sub_(top).exp2_().sum(dim=1)
        log_sum = total.log2() + top[:, 0]
        return out, (log_sum if constant is None else log_sum + constant) / LOG2E, total

    @staticmethod
    def workspace(contrast: Contrast, weighting: Weighting, *, whole: int) -> Workspace:
        """Memory for `whole` square blocks and the scratch."""
        n, m = len(contrast.anchors), len(contrast.pool)
        rows = blocks(n, m * contrast.pool.element_size(), whole > 0)
        return Workspace(contrast.pool, (whole * n + 4 * rows[0].stop) * (m + PADDING))


def gradients(
    numerators: Tensor, share: Tensor, anchors: Tensor, pool: Tensor, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Those of `sum over i, j of share_i * numerators_ij * <a_i, v_j>`, the numerators held fixed."""
    if anchors is not pool:
        of_anchors = (numerators @ pool).mul_(share) if needed[0] else None
        return of_anchors, numerators.T @ (anchors * share) if needed[1] else None
    # Of one batch with itself, both at once: a product with the symmetric part, tile by tile.
    result, buffer = torch.zeros_like(pool), pool.new_empty(TILE, TILE + PADDING)
    for i, j in tile_pairs(len(pool)):
        tile = torch.mul(numerators[i, j], share[i], out=buffer[: i.stop - i.start, : j.stop - j.start])
        tile.addcmul_(numerators[j, i].T, share[j].T)
        result[i].addmm_(tile, pool[j])
        if i != j:
            result[j].addmm_(tile.T, pool[i])
    return None, result


class NegativeLogSums(torch.autograd.Function):
    """The log of the weighted sum of each anchor's negatives [n]; numerators are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, pool: Tensor, contrast: Contrast, weighting: Weighting, prepared: Any
    ) -> Tensor:
        numerators = pool.new_empty(len(anchors), len(pool) + PADDING)[:, : len(pool)]
        with Numerators.workspace(contrast, weighting, whole=1) as memory:
            work = Numerators(contrast, weighting, prepared, numerators, memory)
            _, sums, totals = zip(*map(work.block, work.logits.blocks), strict=True)
        ctx.save_for_backward(anchors, pool, numerators, torch.cat(totals))
        ctx.temperature = contrast.temperature
        ctx.of_itself = contrast.anchors is contrast.pool
        return torch.cat(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        anchors, pool, numerators, totals = ctx.saved_tensors
        share = (grad / (totals * ctx.temperature)).masked_fill(totals == 0, 0)[:, None]
        anchors = pool if ctx.of_itself else anchors
        with full_precision(pool):
            return *gradients(numerators, share, anchors, pool, ctx.needs_input_grad[:2]), None, None, None


# A loss as a function of `log(negatives) - log(positive)`, and its derivative.
Margin = Callable[[Tensor], tuple[Tensor, Tensor]]


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
        needed, of_itself = ctx.needs_input_grad[:3], contrast.anchors is contrast.pool
        anchors = pool if of_itself else anchors
        n, whole = len(anchors), fits(contrast)
        of_anchors = torch.empty_like(anchors) if needed[0] and not of_itself else None
        of_pool = torch.zeros_like(pool) if needed[2] else None
        positive_logits = (anchors * positives).sum(dim=1) / contrast.temperature
        losses, slopes, shares = [], [], []
        squares = 0 if not whole else 2 if type(weighting) is UnDiMix else 1
        with Numerators.workspace(contrast, weighting, whole=squares) as memory:
            out = memory.block(n, len(pool)) if whole else None
            work = Numerators(contrast, weighting, prepared, out, memory)
            for rows in work.logits.blocks:
                numerators, log_sum, total = work.block(rows)
                block_loss, slope = loss(log_sum - positive_logits[rows])
                slope = slope / (n * contrast.temperature)
                share = (slope / total).masked_fill(total == 0, 0)[:, None]
                losses.append(block_loss)
                slopes.append(slope)
                shares.append(share)
                if whole or not any(needed):
                    continue
                if of_pool is not None:
                    of_pool.addmm_(numerators.T, anchors[rows] * share)
                    if of_itself:
                        of_pool[rows] += (numerators @ pool).mul_(share)
                if of_anchors is not None:
                    of_anchors[rows] = (numerators @ pool).mul_(share)
            if out is not None and any(needed):
                of_anchors, of_pool = gradients(out, torch.cat(shares), anchors, pool, (needed[0], needed[2]))
        slope = torch.cat(slopes)[:, None]
        of_positives = anchors * -slope if needed[1] else None
        if of_itself and of_pool is not None:
            of_pool.addcmul_(positives, slope, value=-1)
        elif of_anchors is not None:
            of_anchors.addcmul_(positives, slope, value=-1)
        ctx.save_for_backward(of_anchors, of_positives, of_pool)
        return torch.cat(losses).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if rows is None else rows * grad for rows in ctx.saved_tensors), None, None, None, None
