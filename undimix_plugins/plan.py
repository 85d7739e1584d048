"""The plan of a loss: every choice that depends on the weighting, the device or autograd is made here, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from undimix_plugins.blocks import AUTOGRAD_MATRICES, blocks_of, fits
from undimix_plugins.checks import values_are_free
from undimix_plugins.contrast import Contrast
from undimix_plugins.rows import full_precision, in_backward
from undimix_plugins.scoped import Scoped
from undimix_plugins.weightings.undimix import UnDiMix, mix_of
from undimix_plugins.weightings.weighting import Weighting, check_compared

# Functions registered by `undimix_plugins.monitoring.statistics.watch`, called with each contrast before its loss.
OBSERVERS = Scoped[Callable[[Contrast, Weighting], None]]("watch")


@dataclass(frozen=True, eq=False)
class Plan:
    """What a loss compares, and how it is computed.

    Attributes:
        contrast: The contrast after `Weighting.choose`.
        weighting: The weighting of the loss.
        weigher: The weighting whose `log_weights` are used.
        prepared: What `weigher.prepare(contrast)` returned, or None where it is not needed.
        alike: Whether all negatives have the same weight.
        mix: The `UnDiMix` whose standardised scores the fast path computes itself. None for other weights.
        by_autograd: Whether autograd differentiates the weighted sum. This is needed for weights with a gradient.
            Otherwise the fast path computes the gradient, and weights are constants or a `mix`.
        combines: Whether `Weighting.combine` changes the sum of the negatives.
        sums_needed: Whether the loss needs the sums of each anchor with their gradient, or only the mean loss.
        blocks: The blocks of anchors that autograd works on. A single block if its matrices fit into memory, or if
            `torch.compile` traces the loss.
        free: Whether values can be read without waiting for a device.
    """

    contrast: Contrast
    weighting: Weighting
    weigher: Weighting
    prepared: Any
    alike: bool
    mix: UnDiMix | None
    by_autograd: bool
    combines: bool
    sums_needed: bool
    blocks: list[slice]
    free: bool


def planned(contrast: Contrast, weighting: Weighting, *, one_positive: bool = False) -> Plan:
    """Chooses what is compared, prepares the weighting, shows both to observers, and returns the plan of the loss.

    Args:
        contrast: The anchors, positives and candidates.
        weighting: How much each negative counts.
        one_positive: Whether the loss allows a single positive for each anchor.

    Returns:
        The plan.

    Raises:
        ValueError: If the weighting adds positives and `one_positive` is True, or as the weighting does.

    Examples:
        >>> plan = planned(two_views(torch.randn(4, 8), torch.randn(4, 8), 0.5), Uniform())
        >>> plan.alike, plan.sums_needed
        (True, False)
    """
    check_compared(contrast, weighting)
    chosen = weighting.choose(contrast)
    if one_positive and chosen.positive_columns is not contrast.positive_columns:
        raise ValueError(
            f"weighting: expected one that makes no positives, for which this loss has no place, got {weighting}"
        )
    weigher, compiled = weighting._weigher(), torch.compiler.is_compiling()
    alike, mix = weigher._weighs_alike, mix_of(weigher)
    # A learned temperature has its gradient through the anchors. Weights must not contribute to it.
    learned = isinstance(chosen.temperature, Tensor) and chosen.temperature.requires_grad
    if mix is not None and learned and mix.carries_gradient and torch.is_grad_enabled():
        mix = None
    with full_precision(chosen.pool):
        if compiled:
            prepared = weigher.prepare(chosen)  # the compiler does its own tiling
        elif mix is not None:
            # Once, and not again in a backward pass: it waits for other processes.
            prepared = mix.prepare(chosen) if mix.influence and chosen.gathered is not None else None
        else:
            prepared = None if alike else weigher.prepare(chosen)
        by_autograd = compiled or (not alike and mix is None and _carries_gradient(weigher, prepared))
        if not compiled:
            _show(contrast, weighting)
    combines = weighting._combines()
    whole = compiled or fits(chosen.anchors, chosen.pool, AUTOGRAD_MATRICES)
    return Plan(
        contrast=chosen,
        weighting=weighting,
        weigher=weigher,
        prepared=prepared,
        alike=alike,
        mix=mix,
        by_autograd=by_autograd,
        combines=combines,
        sums_needed=by_autograd or combines or chosen.positive_columns is not None,
        blocks=[slice(0, len(chosen.anchors))] if whole else blocks_of(chosen.anchors, chosen.pool),
        free=values_are_free(chosen.pool),
    )


def _carries_gradient(weigher: Weighting, prepared: Any) -> bool:
    """Whether the log-weights have a gradient that the loss must follow."""
    if not torch.is_grad_enabled():
        return False
    log_weights = weigher.log_weights(prepared, slice(0, 1))
    return isinstance(log_weights, Tensor) and log_weights.requires_grad


def _show(contrast: Contrast, weighting: Weighting) -> None:
    """Calls the observers with the contrast, after the weighting has been prepared (and, if it learns, fitted)."""
    # Activation checkpointing runs the forward pass again in the backward pass: it has been shown before.
    if (observers := OBSERVERS.values()) and not in_backward():
        with OBSERVERS.holding_nothing():  # they may compute losses, too
            for observer in observers:
                observer(contrast, weighting)
