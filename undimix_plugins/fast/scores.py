"""UnDiMix's three scores for a block of anchors, each with a bound on its rounding error.

What standardising undoes is left as it comes: a factor of an anchor's own, and a number added to all of its scores.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from undimix_plugins.blocks import FEW, blocks
from undimix_plugins.checks import values_are_free
from undimix_plugins.columns import sum_of_rows
from undimix_plugins.components import TaskGradients, euclidean_distances
from undimix_plugins.contrast import Contrast
from undimix_plugins.fast.excluded import Excluded, ExcludedBlock
from undimix_plugins.fast.logits import Logits, finite, inner_products, own_products, row_lengths
from undimix_plugins.fast.tasks import has_same_tasks
from undimix_plugins.weightings.undimix import ROUNDING

CONCENTRATED = 0.25  # the length of the mean of rows of length 1 from which sums over them are taken in float64


class Block(NamedTuple):
    """A block of r anchors, and memory to work in.

    Attributes:
        rows: Which anchors.
        logits: [r, m]; `StandardisedMix.block` writes 0 where excluded.
        excluded: The excluded columns.
        out: [r, m] to work in, where the block's numerators will stand.
        scratch: Further blocks [r, m] to work in.
    """

    rows: slice
    logits: Tensor
    excluded: ExcludedBlock
    out: Tensor
    scratch: list[Tensor]


class Scored(NamedTuple):
    """A score of a block of anchors.

    Attributes:
        values: [r, m], 0 where excluded.
        far: Places in the block [f], and the errors there [f, 1] instead of the score's; None for none.
    """

    values: Tensor
    far: tuple[Tensor | slice, Tensor] | None = None


class Bounds:
    """Bounds on the terms of all scores, for each candidate, and the largest among each anchor's negatives.

    Args:
        excluded: The excluded columns.
    """

    def __init__(self, excluded: Excluded) -> None:
        self.excluded = excluded
        self.parts: list[Tensor] = []

    def add(self, bounds: Tensor) -> slice:
        """Adds the bounds of a score [q, m], and returns their place among all."""
        start = sum(map(len, self.parts))
        self.parts.append(bounds)
        return slice(start, start + len(bounds))

    @cached_property
    def largest(self) -> Tensor:
        """The largest bounds among each anchor's negatives [all, n, 1]; call it once all scores have added theirs."""
        return self.excluded.largest_of_negatives(torch.cat(self.parts))[:, :, None]


class Score:
    """Base class of the scores.

    Args:
        bounds: The bounds of all scores.
        own: Bounds on the terms that are summed in this score, for each candidate [q, m].
    """

    def __init__(self, bounds: Bounds, own: Tensor) -> None:
        self.excluded, self.bounds, self.own_bounds = bounds.excluded, bounds, own
        self.place = bounds.add(own)

    def block(self, block: Block) -> Scored:
        """Returns the score of a block of anchors."""
        raise NotImplementedError

    def error(self, largest: Tensor) -> Tensor:
        """Returns the size of the terms of each anchor's scores [n, 1]. Times eps, it is their rounding error.

        Args:
            largest: The largest bounds [q, n, 1], or those of the whole pool [q, 1, 1].
        """
        raise NotImplementedError

    @property
    def largest(self) -> Tensor:
        """The largest of the score's bounds among each anchor's negatives [q, n, 1]."""
        return self.bounds.largest[self.place]


class Similarity(Score):
    """The logits themselves."""

    def __init__(self, logits: Logits, bounds: Bounds, lengths: Tensor) -> None:
        """`lengths` are the pool's [m]."""
        super().__init__(bounds, lengths[None])
        self.lengths = row_lengths(logits.scaled)

    def block(self, block: Block) -> Scored:
        """Returns the score of a block of anchors."""
        return Scored(block.logits)

    def error(self, largest: Tensor) -> Tensor:
        """See `Score.error`."""
        return self.lengths * largest[0]


class Influence(Score):
    """Inner products of task gradients, and of the last layer's inputs.

    Attributes:
        products: Those of the rows' directions, where they are symmetric: they wait where numerators will be.
    """

    def __init__(
        self,
        logits: Logits,
        bounds: Bounds,
        tasks: tuple[TaskGradients, TaskGradients],
        inputs: tuple[Tensor, Tensor] | None,
        products: Tensor | None,
    ) -> None:
        """`inputs` are the last layer's, for a gradient at its weight; `products` [n, m] is to work in, or None."""
        self.of_anchors, self.of_pool = tasks
        self.inputs = inputs
        direction, log_scale, terms = self.of_pool
        self.largest_scale = finite(log_scale.max())
        self.scale_of_pool = (log_scale - self.largest_scale).exp()
        self.scaled_of_pool = direction * self.scale_of_pool[:, None]
        own = [row_lengths(self.scaled_of_pool)[:, 0], self.scale_of_pool * terms, log_scale]
        if inputs is not None:
            own.append(row_lengths(inputs[1])[:, 0])
        super().__init__(bounds, torch.stack(own))
        self.products = products if has_same_tasks(logits.contrast) else None
        if self.products is not None:
            own_products(direction, direction, self.products)

    def block(self, block: Block) -> Scored:
        """Returns the score of a block of anchors."""
        rows, out = block.rows, block.out
        if self.products is not None:
            torch.mul(self.products[rows], self.scale_of_pool, out=out)
        elif self.far is None or values_are_free(out):
            inner_products(self.of_anchors.direction[rows], self.scaled_of_pool, out)
        far = None if self.far is None else self._write_far(self.far, block)
        if self.inputs is not None:
            of_anchors, of_pool = self.inputs
            out.mul_(of_anchors[rows] @ of_pool.T)
        return Scored(block.excluded.write(out, 0), far)

    def error(self, largest: Tensor) -> Tensor:
        """See `Score.error`."""
        direction, _, terms = self.of_anchors
        error = terms[:, None] * largest[0] + row_lengths(direction) * largest[1]
        return error if self.inputs is None else error * (row_lengths(self.inputs[0]) * largest[3])

    @cached_property
    def far(self) -> Tensor | None:
        """The anchors [n] whose negatives' gradients are tiny beside the largest in the pool: all would be 0.

        None if values can be read for free and there are none.
        """
        log_scale, least = self.of_pool.log_scale, math.log(torch.finfo(self.own_bounds.dtype).tiny) / 4.4
        if values_are_free(log_scale) and bool(log_scale.min() - self.largest_scale >= least):
            return None
        far = (self.largest[2] - self.largest_scale)[:, 0] < least
        return far if not values_are_free(far) or bool(far.any()) else None

    def _write_far(self, far: Tensor, block: Block) -> tuple[Tensor | slice, Tensor]:
        """Writes the influence for the `far` anchors, relative to the largest gradient of their own negatives.

        For all of the block where a look at which they are is not free. Returns their places and errors.
        """
        place: Tensor | slice = slice(0, len(block.out))
        anchors: Tensor | slice = block.rows
        if values_are_free(block.out):
            place = far[block.rows].nonzero()[:, 0]
            anchors = place + block.rows.start
        direction, log_scale, terms = self.of_pool
        of_anchors = self.of_anchors.direction[anchors]
        scale = log_scale.expand(len(of_anchors), -1).clone()
        scale = block.excluded.of(place).write(scale, -torch.inf)
        scale = (scale - finite(scale.amax(dim=1, keepdim=True))).exp()
        block.out[place] = of_anchors @ direction.T * scale
        error = self.of_anchors.terms[anchors, None] * (scale * row_lengths(direction).T).amax(dim=1, keepdim=True)
        error += row_lengths(of_anchors) * (scale * terms).amax(dim=1, keepdim=True)
        if self.inputs is not None:
            error *= row_lengths(self.inputs[0][anchors]) * self.largest[3, anchors]
        return place, error


class Diversity(Score):
    """Distances to the anchor's other negatives, summed.

    Args:
        bounds: As `Score` takes them, and so `own`.
        own: [q, m].
        count: How many negatives each anchor has, at least 1 [n, 1].
    """

    def __init__(self, bounds: Bounds, own: Tensor, count: Tensor) -> None:
        super().__init__(bounds, own)
        summed = torch.full_like(count, own.shape[1]) if bounds.excluded.dense else count - 1
        self.summed = summed.clamp(min=1)  # how many distances


class CosineDiversity(Diversity):
    """Cosine distances to the anchor's other negatives, summed.

    Attributes:
        rest: The distance of each candidate to all of the pool but itself [m], plus the same for all.
        looks_up: Whether what is excluded is added from the logits: of two views of rows of length 1 it is there.
    """

    def __init__(self, logits: Logits, bounds: Bounds, rows: Tensor, lengths: Tensor, count: Tensor) -> None:
        """The `rows` are the pool, or vectors of its candidates [m, w], and these are their `lengths` [m].

        `count` is how many negatives each anchor has, at least 1 [n, 1].
        """
        super().__init__(bounds, lengths[None][:0], count)  # rows of length 1 need no bound
        self.logits = logits
        of_length_one = values_are_free(lengths) and all_one(lengths)
        are_pool = of_length_one and rows is logits.pool
        self.unit = rows if of_length_one else rows / lengths.masked_fill(lengths == 0, 1)[:, None]
        total = self.unit.sum(dim=0)
        self.centred = logits.centred if are_pool else self.unit - total / len(self.unit)
        if values_are_free(self.unit) and bool(total.norm() <= CONCENTRATED * len(self.unit)):
            rest = -(self.centred @ total) - (lengths == 0).to(self.unit.dtype)
        else:
            rest = precise_distances(self.unit).to(self.unit.dtype)
        self.looks_up = are_pool and logits.kept is not None and is_two_views(logits.contrast)
        self.rest = rest * logits.factor if self.looks_up else rest

    def block(self, block: Block) -> Scored:
        """The score of a block of anchors: `rest`, plus what the excluded rows are similar to each candidate."""
        out, kept = block.scratch[0], self.logits.kept
        if self.excluded.dense:
            total = block.excluded.marks(len(self.unit)).to(self.unit.dtype) @ self.unit
            torch.add(self.rest, inner_products(total, self.centred, out), out=out)
        elif self.logits.contrast.excluded.shape[1] == 0:
            out.copy_(self.rest.expand_as(out))
        elif not self.looks_up or kept is None:
            torch.add(self.rest, inner_products(self.excluded_sums[block.rows], self.centred, out), out=out)
        else:
            start = (block.rows.start + len(kept) // 2) % len(kept)
            above = min(len(kept) - start, len(out))  # whose other view is no further than the last anchor
            torch.add(block.logits[:above], kept[start : start + above], out=out[:above])
            torch.add(block.logits[above:], kept[: len(out) - above], out=out[above:])
            out.add_(self.rest)
        return Scored(block.excluded.write(out, 0))

    def error(self, largest: Tensor) -> Tensor:
        """See `Score.error`."""
        return self.summed * (self.logits.factor if self.looks_up else 1)

    @cached_property
    def excluded_sums(self) -> Tensor:
        """The sum of the excluded rows, at length 1, of each anchor [n, d]."""
        return sum_of_rows(self.unit, self.logits.contrast.excluded)


class EuclideanDiversity(Diversity):
    """Euclidean distances to the anchor's other negatives, summed."""

    def __init__(self, logits: Logits, bounds: Bounds, rows: Tensor, lengths: Tensor, count: Tensor) -> None:
        """Takes the arguments of `CosineDiversity`."""
        super().__init__(bounds, lengths[None], count)
        self.pool, self.listed = rows, logits.contrast.excluded

    def block(self, block: Block) -> Scored:
        """Returns the score of a block of anchors."""
        out, pool = block.scratch[0], self.pool
        if self.excluded.dense or self.listed.shape[1] > FEW:
            negative = 1 - block.excluded.marks(len(pool)).to(pool.dtype)
            out.zero_()
            for part in blocks(len(pool), len(pool) * pool.element_size(), True):
                out.addmm_(negative[:, part], euclidean_distances(pool[part], pool))
        else:
            out.copy_(self.to_all.expand_as(out))
            for column in self.listed[block.rows].T:
                to_excluded = euclidean_distances(pool[column.clamp(min=0)], pool)
                out.sub_(to_excluded.masked_fill_(column[:, None] < 0, 0))
        return Scored(block.excluded.write(out, 0))

    def error(self, largest: Tensor) -> Tensor:
        """See `Score.error`."""
        return self.summed * largest[0]

    @cached_property
    def to_all(self) -> Tensor:
        """Each candidate's distances to all others, summed [m]."""
        parts = blocks(len(self.pool), len(self.pool) * self.pool.element_size(), True)
        return torch.cat([euclidean_distances(self.pool[part], self.pool).sum(dim=1) for part in parts])


def precise_distances(unit: Tensor) -> Tensor:
    """Returns the distances of rows of length 1 to all others, summed [m], up to a constant.

    In float64: of concentrated rows it is so little of the terms' sum that rounding would show, even in their lengths.
    """
    rows = unit if unit.device.type == "mps" else unit.double()  # which has none
    lengths = row_lengths(rows)
    rows = rows / lengths.masked_fill(lengths == 0, 1)
    return -((rows - rows.mean(dim=0)) @ rows.sum(dim=0)) - (lengths[:, 0] == 0).to(rows.dtype)


def is_two_views(contrast: Contrast) -> bool:
    """Whether the anchors are two views, both excluded from the pool. False if reading values is not free."""
    excluded, half = contrast.excluded, len(contrast.anchors) // 2
    if contrast.excluded_mask is not None or excluded.shape[1] != 2 or len(excluded) != 2 * half:
        return False
    if not values_are_free(excluded):
        return False
    if not torch.equal(excluded[:, 0], excluded[:, 1].roll(half)) or int(excluded.min()) < 0:
        return False
    return contrast.is_own_pool or torch.equal(contrast.anchors, contrast.pool[excluded[:, 1]])


def all_one(lengths: Tensor) -> bool:
    """Whether all lengths are 1 up to rounding."""
    return bool(((lengths - 1).abs() <= ROUNDING * torch.finfo(lengths.dtype).eps).all())
