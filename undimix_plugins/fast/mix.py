"""UnDiMix's log-weights: standardised scores, mixed in a few blocks of memory that a cache holds."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from undimix_plugins.checks import values_are_free
from undimix_plugins.components import TaskGradients
from undimix_plugins.fast.excluded import Excluded
from undimix_plugins.fast.logits import LOG2E, Logits, exponentials, row_lengths
from undimix_plugins.fast.scores import (
    Block,
    Bounds,
    CosineDiversity,
    EuclideanDiversity,
    Influence,
    Score,
    Scored,
    Similarity,
)
from undimix_plugins.fast.tasks import all_task_gradients, has_same_tasks
from undimix_plugins.weightings.undimix import ROUNDING, Prepared, UnDiMix, gradient_slope_at, hardness_share_at


class Slope(NamedTuple):
    """Turns a block's numerators into the gradient of their log-sum, for weights with a gradient.

    Attributes:
        steepness: By how much a log-weight grows with its logit [r, 1].
        weights: Weights but for a factor of the anchor's [r, m].
        total: Their sums [r, 1].
    """

    steepness: Tensor
    weights: Tensor
    total: Tensor

    def add_to(self, numerators: Tensor, total: Tensor, work: Tensor) -> None:
        """Adds what it makes of numerators [r, m] of sum `total` [r, 1]; `work` [r, m] is to work in.

        A logit counts by itself and, `steepness` times as much, as a part of the log-weight, whose mean is taken off.
        """
        mean = torch.where(self.total > 0, total / self.total, 0)
        # Their difference first: beside a huge steepness, what a logit counts by itself would be rounded away.
        numerators.addcmul_(torch.addcmul(numerators, self.weights, mean, value=-1, out=work), self.steepness)


class Mixed(NamedTuple):
    """The scores of a block of anchors: logits plus log-weights, in units of log 2.

    Attributes:
        scores: [r, m], but for `log_mean`.
        log_mean: The log of what the mean of their weights is above 1 [r, 1]; None where it is 1.
        slope: None where weights carry no gradient.
    """

    scores: Tensor
    log_mean: Tensor | None
    slope: Slope | None


class StandardisedMix:
    """The scores of all anchors under `UnDiMix`, by blocks."""

    def __init__(
        self,
        mix: UnDiMix,
        prepared: Prepared | None,
        logits: Logits,
        excluded: Excluded,
        scratch: list[Tensor],
        out: Tensor | None,
    ) -> None:
        """`out` [n, m] is where numerators will be written, or None; blocks of it are given to work in."""
        contrast = logits.contrast
        mix.check(contrast)
        self.mix, self.logits = mix, logits
        self.count = contrast.count[:, None].clamp(min=1)
        lengths = row_lengths(logits.pool)[:, 0]
        self.scores: dict[str, Score] = {}
        bounds = Bounds(excluded)
        if mix.influence:
            tasks = self._tasks(prepared, scratch, lengths)
            inputs = None
            if mix.gradient == "weight" and contrast.last_layer is not None:
                inputs = contrast.last_layer.anchor_inputs.detach(), contrast.last_layer.pool_inputs.detach()
            self.scores["influence"] = Influence(logits, bounds, tasks, inputs, out)
        if mix.similarity or mix.mixing == "geometric":  # there, each anchor's hardness needs it
            self.scores["similarity"] = Similarity(logits, bounds, lengths)
        if mix.diversity:
            of_distance = CosineDiversity if mix.distance == "cosine" else EuclideanDiversity
            rows, of_rows = logits.pool, lengths
            if contrast.vectors is not None:
                rows = contrast.vectors
                of_rows = row_lengths(rows)[:, 0]
            self.scores["diversity"] = of_distance(logits, bounds, rows, of_rows, self.count)
        self.strengths: dict[str, float] = {name: getattr(mix, name) for name in self.scores}
        self.root = self.count.sqrt()
        self.eps = ROUNDING * torch.finfo(self.root.dtype).eps * self.root
        errors = [score.error(score.own_bounds.amax(dim=1)[:, None, None]) for score in self.scores.values()]
        self.bound = (torch.stack(errors) * self.eps).square()
        by_strength = mix.mixing == "geometric"
        factors = [LOG2E * mix.hardness * (strength if by_strength else 1.0) for strength in self.strengths.values()]
        self.factor = torch.cat([lengths.new_full((1, 1, 1), factor) for factor in factors])

    def block(self, block: Block) -> Mixed:
        """Returns the scores of a block of anchors. It overwrites the excluded logits."""
        block.excluded.write(block.logits, 0)
        values, inverse = self._inverse_deviations(block, [score.block(block) for score in self.scores.values()])
        scales = inverse * self.factor
        if self.mix.mixing == "linear":
            return self._linear(block, values, scales)
        of_similarity = inverse[list(self.scores).index("similarity")]
        return self._geometric(block, values, scales, of_similarity * LOG2E)

    def _geometric(self, block: Block, values: list[Tensor], scales: Tensor, inverse_spread: Tensor) -> Mixed:
        """`inverse_spread` is one over the deviation of the logits, 0 where that is a rounding error [r, 1]."""
        out, scratch, count = block.out, block.scratch, self.count[block.rows]
        share = hardness_share_at(inverse_spread)
        scales = scales * share
        torch.mul(values[0], scales[0], out=out)
        for value, scale in zip(values[1:], scales[1:], strict=True):
            out.addcmul_(value, scale)
        weights = scratch[1] if self.mix.carries_gradient else scratch[0]
        total, _ = exponentials(out, block.excluded, weights)
        slope = None
        if self.mix.carries_gradient:
            steepness = gradient_slope_at(inverse_spread) * share * (self.mix.hardness * self.mix.similarity)
            slope = Slope(steepness, weights, total)
        log_mean = (total / count).masked_fill(total == 0, 1).log2()
        return Mixed(torch.add(out, block.logits, out=scratch[0]), log_mean, slope)

    def _linear(self, block: Block, values: list[Tensor], scales: Tensor) -> Mixed:
        scratch, count, of_all = block.scratch, self.count[block.rows], sum(self.strengths.values())
        parts = []
        for value, scale, strength in zip(values, scales, self.strengths.values(), strict=True):
            share = count * (strength / of_all)
            if self.mix.similarity:
                # Weights; what underflows has a logit so small that it does not count.
                part = torch.mul(value, scale, out=scratch[1] if value is block.logits else value)
                total, _ = exponentials(part, block.excluded)
                parts.append(part.mul_(torch.where(total > 0, share / total, 0)))
            else:
                part = value.mul_(scale)
                total, _ = exponentials(part, block.excluded, scratch[1])
                parts.append(part.add_((share / total).masked_fill(total == 0, 1).log2_()))
        log_weights = parts[0]
        for part in parts[1:]:
            if self.mix.similarity:
                log_weights.add_(part)
            else:
                torch.logaddexp2(log_weights, part, out=log_weights)
        if self.mix.similarity:
            log_weights.log2_()
        return Mixed(torch.add(log_weights, block.logits, out=scratch[0]), None, None)

    def _inverse_deviations(self, block: Block, scored: list[Scored]) -> tuple[list[Tensor], Tensor]:
        """Returns the scores, 0 in the excluded columns, and one over their deviations [scores, r, 1].

        0 stands for a deviation that is a rounding error.
        """
        rows, values = block.rows, [score.values for score in scored]
        totals = torch.stack([value.sum(dim=1, keepdim=True) for value in values])
        squares = torch.stack([row_lengths(value) for value in values]).square_()
        if not any(score.far for score in scored) and values_are_free(totals):
            # About their mean: from sums alone while that cancels nothing, and no score is all rounding.
            about_mean = squares - totals.square().div_(self.count[rows])
            if bool((about_mean > torch.maximum(squares / 8, self.bound[:, rows])).all()):
                return values, about_mean.rsqrt_().mul_(self.root[rows])
        means = totals / self.count[rows]
        values = [block.excluded.write(value - mean, 0) for value, mean in zip(values, means, strict=True)]
        lengths = torch.stack([row_lengths(value) for value in values])
        rounding = self.rounding[:, rows].clone()
        for place, score in enumerate(scored):
            if score.far is not None:
                anchors, error = score.far
                rounding[place, anchors] = self.eps[rows][anchors] * error
        rounding = rounding.clamp(min=0)  # -inf for an anchor without negatives
        return values, torch.where(lengths > rounding, self.root[rows] / lengths, 0)

    @cached_property
    def rounding(self) -> Tensor:
        """The length up to which scores are rounding errors [scores, n, 1]."""
        return torch.stack([score.error(score.largest) for score in self.scores.values()]) * self.eps

    def _tasks(
        self, prepared: Prepared | None, scratch: list[Tensor], lengths: Tensor
    ) -> tuple[TaskGradients, TaskGradients]:
        """Returns the task gradients of anchors and pool. Those shared between processes are in `prepared`."""
        if prepared is not None and prepared.tasks is not None:
            return prepared.tasks
        logits, last_layer = self.logits, self.logits.contrast.last_layer
        of_anchors, of_pool = all_task_gradients(logits, scratch, lengths.max())
        if self.mix.gradient == "embedding" or last_layer is None or not last_layer.normalized:
            return of_anchors, of_pool
        of_pool = of_pool.along_sphere(logits.pool)
        if has_same_tasks(logits.contrast):
            return of_pool, of_pool
        return of_anchors.along_sphere(logits.anchors), of_pool
