"""A warm-up of the hardness: from the plain loss to the full weighting, as training goes on."""

from __future__ import annotations

import math

from torch import nn

from undimix_plugins.checks import check_choice, check_number
from undimix_plugins.weighted_loss import WARMING_UP, WeightedLoss


def hardness_share(
    step: int, total: float, *, steps: float | None = None, share: float | None = None, shape: str = "linear"
) -> float:
    """Returns the share of the full hardness at a step of a warm-up, for `Weighting.softened`.

        linear: x,    cosine: (1 - cos(pi * x)) / 2,    x = min(step / steps, 1)

    The toolkits' `HardnessWarmup` uses it. In your own training loop, begin each step with
    `loss.weighting = full.softened(hardness_share(step, total, share=0.1))`.

    Args:
        step: The number of steps before this one, at least 0.
        total: The number of steps of the whole training. Only used with `share`. It must then be finite and above 0.
        steps: The number of steps of the warm-up, at least 1. Pass either `steps` or `share`.
        share: The share of the training that the warm-up takes, above 0 and at most 1: `steps = share * total`.
        shape: "linear" or "cosine".

    Returns:
        The share, from 0 at the first step to 1 at the end of the warm-up and after it. It never falls.

    Raises:
        ValueError: If an argument is out of its range, if both or neither of `steps` and `share` are given, or if
            `shape` is unknown.

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
    """Checks the settings of `hardness_share` before the training starts.

    Args:
        steps: The number of steps of the warm-up, at least 1, or None.
        share: The share of the training that the warm-up takes, above 0 and at most 1, or None.
        shape: "linear" or "cosine".

    Raises:
        ValueError: If an argument is out of its range, if both or neither of `steps` and `share` are given, or if
            `shape` is unknown.

    Examples:
        >>> check_warmup(steps=None, share=2.0, shape="linear")
        Traceback (most recent call last):
        ValueError: share: expected a number above 0 and at most 1, got 2.0
    """
    if (steps is None) == (share is None):
        raise ValueError(f"steps, share: expected one of the two, got steps={steps!r} and share={share!r}")
    if steps is not None:
        check_number("steps", steps, at_least=1)
    if share is not None and check_number("share", share, above=0) > 1:
        raise ValueError(f"share: expected a number above 0 and at most 1, got {share!r}")
    check_choice("shape", shape, ("linear", "cosine"))


def weighted_losses(module: nn.Module) -> list[WeightedLoss]:
    """Returns all weighted losses in a module, which may be a weighted loss itself.

    Losses inside another weighted loss are left out.

    Args:
        module: The module, such as a LightningModule.

    Returns:
        The losses, each once.

    Examples:
        >>> class MyLoss(WeightedLoss):
        ...     weighting = UnDiMix()
        >>> len(weighted_losses(torch.nn.ModuleList([MyLoss(), torch.nn.Linear(2, 2)])))
        1
    """
    if isinstance(module, WeightedLoss):
        return [module]
    found = [loss for child in module.children() for loss in weighted_losses(child)]
    return list(dict.fromkeys(found))


def set_hardness(loss: WeightedLoss, share: float) -> None:
    """Sets the weighting of a loss to a share of its full weighting.

    While the share is below 1, the loss also stores its full weighting. So the next call knows it, even after the loss
    was copied, pickled or used in another training. If you set another weighting in between, that is the full weighting
    from then on.

    Args:
        loss: The loss.
        share: The share of the full weighting, from 0 (the plain loss) to 1.

    Raises:
        ValueError: If `share` is not a number from 0 to 1.

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
