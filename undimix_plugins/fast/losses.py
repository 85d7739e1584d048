"""The fast losses: custom gradients of two products with the numerators.

1. Logits are inner products with the pool about its mean, in units of log 2, since `exp2` is cheaper than `exp`. While
   they fit a budget they are kept, of one batch with itself by half and mirrored; else a block is made when needed
   (`logits.py`).
2. UnDiMix first takes every row's task gradient from its logits: the largest, the sum of the others, one product
   (`tasks.py`).
3. A block of anchors meets the whole pool, so that deviations and softmaxes are a row's own and exact. Its scores
   (`scores.py`) are mixed in a few buffers that a cache holds (`mix.py`); what is excluded, a few columns, is written
   in, not masked (`excluded.py`).
4. A block leaves a number per anchor, the log-sum of its negatives, and the numerators of their softmax
   (`numerators.py`).
5. Backward is two products with the numerators, or one with their symmetric part where anchors are the pool. Where
   they do not fit, a mean loss adds up its gradient block by block in the forward pass; backward then scales it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from undimix_plugins.blocks import PADDING, fits, tile_pairs, tile_size
from undimix_plugins.contrast import Contrast
from undimix_plugins.fast.logits import LOG2E
from undimix_plugins.fast.numerators import Numerators, plain_log_sums, workspace
from undimix_plugins.fast.scores import is_two_views
from undimix_plugins.plan import Plan
from undimix_plugins.rows import full_precision

# A loss as a function of `log(negatives) - log(positive)` [r], and its derivative.
Margin = Callable[[Tensor], tuple[Tensor, Tensor]]

Gradients = tuple[Tensor | None, Tensor | None]  # of anchors and pool; one tensor where these are one


def negative_log_sums(plan: Plan) -> Tensor:
    """Returns the weighted log-sum of each anchor's negatives [n], or -inf. `log_weights` get no gradient."""
    return NegativeLogSums.apply(plan.contrast.anchors, plan.contrast.pool, plan)  # type: ignore[no-any-return]


def mean_loss(plan: Plan, loss: Margin) -> Tensor:
    """Returns the mean of `loss` over the anchors. `log_weights` get no gradient; a second derivative is an error."""
    contrast = plan.contrast
    return MeanLoss.apply(contrast.anchors, contrast.positives, contrast.pool, plan, loss)  # type: ignore[no-any-return]


class NegativeLogSums(torch.autograd.Function):
    """The weighted log-sum of each anchor's negatives [n]. Numerators that do not fit are computed twice."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, pool: Tensor, plan: Plan) -> Tensor:
        contrast, numerators = plan.contrast, None
        if fits(anchors, pool):
            numerators = pool.new_empty(len(anchors), len(pool) + PADDING)[:, : len(pool)]
        with workspace(contrast) as memory:
            work = Numerators(plan, numerators, memory)
            sums = [(block.total, block.log_sum) for block in work]
        total, log_sums = map(torch.cat, zip(*sums, strict=True))
        # The last ones that a change of them, before they are used again, be an error.
        inputs = () if (layer := contrast.last_layer) is None else (layer.anchor_inputs, layer.pool_inputs)
        ctx.save_for_backward(anchors, pool, numerators, total, contrast.positives, *inputs)
        ctx.plan = plan
        return log_sums + work.logits.offset / LOG2E

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        anchors, pool, numerators, total, *_ = ctx.saved_tensors
        contrast = ctx.plan.contrast
        pool = pool.detach()
        anchors = pool if contrast.anchors is contrast.pool else anchors.detach()
        sums = zero_sums(anchors, pool, ctx.needs_input_grad[:2])
        share = torch.where(total > 0, grad.detach()[:, None] / (total * contrast.held_temperature), 0)
        with full_precision(pool):
            if numerators is not None:
                gradients(numerators, share, anchors, pool, sums, symmetric=False)
            else:
                with workspace(contrast) as memory:
                    for block in Numerators(ctx.plan, None, memory):
                        add_gradients(block.numerators, share[block.rows], anchors, pool, block.rows, sums)
        of_anchors, of_pool = sums
        return *once([None if anchors is pool else of_anchors, of_pool], contrast), None


class MeanLoss(torch.autograd.Function):
    """The mean over the anchors of a function of their margins. The forward pass computes the gradient, too."""

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        positives: Tensor,
        pool: Tensor,
        plan: Plan,
        loss: Margin,
    ) -> Tensor:
        contrast, needed = plan.contrast, ctx.needs_input_grad
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

        with workspace(contrast) as memory:
            out = memory.block(n, len(pool)) if fits(anchors, pool) else None
            if out is None:
                by_block = []
                for block in Numerators(plan, None, memory):
                    by_block.append(finish(block.total, block.log_sum, block.rows))
                    add_gradients(block.numerators, by_block[-1][2], anchors, pool, block.rows, sums)
                losses, slope, _ = map(torch.cat, zip(*by_block, strict=True))
            else:
                sums_of_all = None
                if plan.alike and contrast.is_own_pool and is_two_views(contrast):
                    sums_of_all = plain_log_sums(contrast, centre, out)
                symmetric = sums_of_all is not None
                if sums_of_all is None:
                    parts = [(block.total, block.log_sum) for block in Numerators(plan, out, memory)]
                    sums_of_all = torch.cat([total for total, _ in parts]), torch.cat([of for _, of in parts])
                losses, slope, share = finish(*sums_of_all, slice(0, n))
                gradients(out, share, anchors, pool, sums, symmetric=symmetric)
        if of_anchors is not None:
            of_anchors.addcmul_(positives, slope, value=-1)
        ctx.contrast = contrast
        of_positives = anchors * -slope if needed[1] else None
        ctx.save_for_backward(None if anchors is pool else of_anchors, of_positives, of_pool)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if rows is None else rows * grad for rows in ctx.saved_tensors)
        return *once(scaled, ctx.contrast), None, None


def zero_sums(anchors: Tensor, pool: Tensor, needed: tuple[bool, bool]) -> Gradients:
    """Returns zeros to add the gradients of anchors and pool to, None for gradients that are not needed."""
    of_pool = torch.zeros_like(pool) if needed[1] else None
    return (of_pool if anchors is pool else torch.zeros_like(anchors) if needed[0] else None), of_pool


def add_gradients(
    numerators: Tensor, share: Tensor, anchors: Tensor, pool: Tensor, rows: slice, sums: Gradients
) -> None:
    """Adds the gradients of a block of anchors to the sums. See `gradients`."""
    of_anchors, of_pool = sums
    if of_anchors is not None:
        of_anchors[rows].addcmul_(numerators @ pool, share)
    if of_pool is not None:
        of_pool.addmm_(numerators.T, anchors[rows] * share)


def gradients(
    numerators: Tensor, share: Tensor, anchors: Tensor, pool: Tensor, sums: Gradients, *, symmetric: bool
) -> None:
    """Adds the gradients of `sum over i, j of share_i * numerators_ij * <a_i, v_j>` to the sums, numerators constant.

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
    """The identity for a gradient. It raises an error in a second derivative, where it would pass for a constant."""

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
    """Returns the gradients that a backward pass returns, so that a second derivative is an error."""
    if not torch.is_grad_enabled():  # but with create_graph=True
        return tuple(gradients)
    inputs = contrast.anchors, contrast.positives, contrast.pool
    return tuple(None if rows is None else Once.apply(rows, *inputs) for rows in gradients)
