"""A warm-up of the hardness: from the plain loss to the full weighting, as training goes on."""

from __future__ import annotations

import math

from torch import nn

from undimix_plugins.checks import check_choice, check_number
from undimix_plugins.weighted_loss import WARMING_UP, WeightedLoss


def hardness_share(
    step: int, total: float, *, steps: float | None = None, share: float | None = None, shape: str = "linear"
) -> float:
    """The share of the full hardness at a step of a warm-up, for `Weighting.softened`.

        linear: x,    cosine: (1 - cos(pi * x)) / 2,    x = min(step / steps, 1)

    The toolkits' `HardnessWarmup` follows it. In a loop of one's own, each step begins with
    `loss.weighting = full.softened(hardness_share(step, total, share=0.1))`.

    Args:
        step: How many steps were made before this one, at least 0.
        total: How many steps the whole training has; with `share` alone it is used, and has to be finite and above 0.
        steps: How many steps the warm-up takes, at least 1.
        share: How much of the training it takes instead, above 0 and at most 1: `steps = share * total`.
        shape: "linear" or "cosine".

    Returns:
        From 0 at the first step to 1 when the warm-up is over and from then on; it never falls.

    Raises:
        ValueError: For arguments out of these ranges, both or neither of `steps` and `share`, another `shape`.

    Examples:
        >>> [hardness_share(step, 100, share=0.04) for step in range(6)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    check_warmup(steps, share, shape)
    check_number("step", step, at_least=0)
    if share is not None:
        if not 0 < total < math.inf:
            raise ValueError(
                f"share: expected a training whose number of steps is known, got {total!r}; give the warm-up's `steps`"
            )
        steps = share * total
    assert steps is not None
    done = min(step / steps, 1.0)
    return done if shape == "linear" else (1 - math.cos(math.pi * done)) / 2


def check_warmup(steps: float | None, share: float | None, shape: str) -> None:
    """Raises a ValueError for settings that `hardness_share` refuses, before there is a training."""
    if (steps is None) == (share is None):
        raise ValueError(f"steps, share: expected one of the two, got steps={steps!r} and share={share!r}")
    if steps is not None:
        check_number("steps", steps, at_least=1)
    if share is not None and check_number("share", share, above=0) > 1:
        raise ValueError(f"share: expected a number above 0 and at most 1, got {share!r}")
    check_choice("shape", shape, ("linear", "cosine"))


def weighted_losses(module: nn.Module) -> list[WeightedLoss]:
    """All weighted losses in a module, which may be one itself, but none inside another, whose weighting is its own."""
    if isinstance(module, WeightedLoss):
        return [module]
    found = [loss for child in module.children() for loss in weighted_losses(child)]
    return list(dict.fromkeys(found))


def set_hardness(loss: WeightedLoss, share: float) -> None:
    """Sets a loss's weighting to a share of its full one; below 1 the loss keeps that beside it.

    It is kept in the loss, so that wherever that goes, to a pickle, a copy or another training, the next call knows the
    full weighting. A weighting that was set in between is the full one from then on.

    Args:
        loss: Whose weighting is set.
        share: From 0, the plain loss, to 1, the full weighting.

    Raises:
        ValueError: For a share that is no number from 0 to 1.

    Examples:
        >>> class MyLoss(WeightedLoss):
        ...     weighting = UnDiMix(hardness=2.0)
        >>> loss = MyLoss()
        >>> set_hardness(loss, 0.25)
        >>> loss.weighting.hardness
        0.5
        >>> set_hardness(loss, 1.0)
        >>> loss.weighting.hardness
        2.0
    """
    kept = vars(loss)
    full, softened = kept.get(WARMING_UP, (None, None))
    if loss.weighting is not softened:
        full = loss.weighting
    loss.weighting = full.softened(share)
    kept[WARMING_UP] = (full, loss.weighting)
    if share == 1:
        loss.weighting = full
        del kept[WARMING_UP]
