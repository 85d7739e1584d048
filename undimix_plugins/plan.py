"""How a contrast's loss is worked out: everything that depends on weighting, device or autograd, decided once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from undimix_plugins.blocks import blocks_of, fits
from undimix_plugins.checks import values_are_free
from undimix_plugins.contrast import Contrast
from undimix_plugins.weightings.undimix import UnDiMix
from undimix_plugins.weightings.weighting import Weighting

AUTOGRAD_MATRICES = 8  # of a contrast, which autograd keeps of a weighted sum


@dataclass(frozen=True, eq=False)
class Plan:
    """What is compared, and by which of the ways.

    Attributes:
        contrast: What the weighting has chosen to compare.
        weighting: How much each negative counts, and what else is done.
        weigher: The weighting whose `log_weights` count.
        prepared: What it has prepared of the contrast.
        alike: Whether all negatives count the same.
        mix: The mix of standardised scores that the fast path works out by itself; None for other weights.
        by_autograd: Whether autograd follows the weighted sum, as weights that carry a gradient need; else the fast
            path has a gradient of its own, and weights are constants or a `mix`.
        combines: Whether the weighting changes more of an anchor's sum than weights.
        sums_needed: Whether a loss needs each anchor's sums with their gradient, rather than the mean alone.
        blocks: The anchors that autograd works on at once: all of them while they are few.
        compiled: Whether `torch.compile` traces the loss; then autograd has it in one piece.
        free: Whether values may be looked at without waiting for a device.
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
    compiled: bool
    free: bool


def planned(contrast: Contrast, weighting: Weighting, *, one_positive: bool = False) -> Plan:
    """The plan of a loss; call it where autocast is off.

    Args:
        contrast: What is compared.
        weighting: How much each negative counts.
        one_positive: Whether the loss has no place for several positives.

    Raises:
        ValueError: For a weighting that makes positives where there is no place for them, and as the weighting does.
    """
    chosen = weighting.choose(contrast)
    if one_positive and chosen.positive_columns is not contrast.positive_columns:
        raise ValueError(
            f"weighting: expected one that makes no positives, for which this loss has no place, got {weighting}"
        )
    weigher, compiled = weighting._weigher(), torch.compiler.is_compiling()
    alike, mix = weigher._weighs_alike, weigher._standardised_mix
    # A temperature that learns has its gradient through the anchors, of which weights are to have no part.
    learned = isinstance(chosen.temperature, Tensor) and chosen.temperature.requires_grad
    if mix is not None and learned and mix.carries_gradient and torch.is_grad_enabled():
        mix = None
    if compiled:
        prepared = weigher.prepare(chosen)  # the compiler does its own tiling
    elif mix is not None:
        # Once, not in a backward pass again, where it waits for other processes.
        prepared = mix.prepare(chosen) if mix.influence and chosen.gathered is not None else None
    else:
        prepared = None if alike else weigher.prepare(chosen)
    by_autograd = compiled or (not alike and mix is None and _carries_gradient(weigher, prepared))
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
        compiled=compiled,
        free=values_are_free(chosen.pool),
    )


def _carries_gradient(weigher: Weighting, prepared: Any) -> bool:
    """Whether a loss has to follow the log-weights' own gradient."""
    if not torch.is_grad_enabled():
        return False
    log_weights = weigher.log_weights(prepared, slice(0, 1))
    return isinstance(log_weights, Tensor) and log_weights.requires_grad
