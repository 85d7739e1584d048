"""A schedule of the temperature: up and down between two values, along a cosine (Kukleva et al. 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from undimix_plugins.checks import check_number, check_temperature
from undimix_plugins.methods.adco import AdCo
from undimix_plugins.weighted_loss import WeightedLoss

SHARE = 0.2  # of the training: the paper's 400 of 2,000 epochs
NAMES = ("temperature", "scale")  # a loss divides similarities by the first, or multiplies them by the second


def cosine_temperature(time: float, period: float, low: float = 0.1, high: float = 1.0) -> float:
    """Returns the temperature at a time of a cosine schedule.

        t(time) = (high - low) * (1 + cos(2 pi * time / period)) / 2 + low

    It is `high` at the start, `low` after half a period, and `high` again after a period. The toolkits'
    `TemperatureSchedule` uses it. In your own training loop, begin each step or epoch with
    `loss.temperature = cosine_temperature(epoch, 20)`. For a loss with a scale, it is
    `loss.scale = 1 / cosine_temperature(epoch, 20)`.

    Args:
        time: The number of steps or epochs before this one, at least 0.
        period: The length of a period, in the unit of `time`, above 0.
        low: The lowest temperature, at least 1e-10.
        high: The highest temperature, at least `low`.

    Returns:
        The temperature, from `low` to `high`.

    Raises:
        ValueError: If an argument is out of its range.

    Warns:
        UserWarning: If a temperature is above 2.

    References:
        Kukleva, Böhle, Schiele, Kuehne, Rupprecht: Temperature Schedules for Self-Supervised Contrastive Methods on
        Long-Tail Data, ICLR 2023, arXiv 2303.13664. The authors train on CIFAR-10-LT for 2,000 epochs, with a period
        of 400 epochs and temperatures from .1 to 1. They count epochs from 1, and the temperature is constant within
        an epoch.

    Examples:
        >>> [round(cosine_temperature(epoch, 8), 2) for epoch in range(9)]
        [1.0, 0.87, 0.55, 0.23, 0.1, 0.23, 0.55, 0.87, 1.0]
    """
    check_number("time", time, at_least=0)
    check_number("period", period, above=0)
    check_range(low, high)
    above_low = (high - low) * (1 + math.cos(2 * math.pi * math.fmod(time, period) / period)) / 2
    return min(above_low + low, high)  # rounding may exceed it


def check_range(low: float, high: float) -> None:
    """Checks the lowest and the highest temperature of a schedule.

    Args:
        low: The lowest temperature, at least 1e-10.
        high: The highest temperature, at least `low`.

    Raises:
        ValueError: If one is out of its range.

    Warns:
        UserWarning: If a temperature is above 2.

    Examples:
        >>> check_range(low=0.5, high=0.1)
        Traceback (most recent call last):
        ValueError: low, high: expected low at most high, got low=0.5 and high=0.1
    """
    if check_temperature("low", low) > check_temperature("high", high):
        raise ValueError(f"low, high: expected low at most high, got low={low!r} and high={high!r}")


@dataclass(frozen=True)
class TemperatureCycle:
    """The settings of a toolkit's `TemperatureSchedule`.

    Args:
        low: The lowest temperature, at least 1e-10.
        high: The highest temperature, at least `low`.
        epochs: The length of a period in epochs, above 0.
        steps: The length of a period in steps of the optimiser, above 0.
        share: The length of a period as a share of the training, above 0. Pass at most one of the three; with none,
            `share` is 0.2.

    Raises:
        ValueError: If a setting is out of its range, or if more than one length is given.

    Examples:
        >>> TemperatureCycle(low=0.1, high=0.5, steps=100).at(step=50, epoch=1, total=1000)
        0.1
    """

    low: float = 0.1
    high: float = 1.0
    epochs: float | None = None
    steps: float | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        check_range(self.low, self.high)
        given = {name: value for name in ("epochs", "steps", "share") if (value := getattr(self, name)) is not None}
        if len(given) > 1:
            came = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise ValueError(f"epochs, steps, share: expected at most one of the three, got {came}")
        for name, value in given.items():
            check_number(name, value, above=0)

    def at(self, *, step: int, epoch: int, total: float) -> float:
        """Returns the temperature.

        Args:
            step: The number of the optimiser's steps before this one.
            epoch: The number of epochs before this one.
            total: The number of steps of the whole training. Only used with `share`. It must then be finite and above
                0.

        Raises:
            ValueError: If the period is a share of a training whose number of steps is unknown.
        """
        if self.epochs is not None:
            return cosine_temperature(epoch, self.epochs, self.low, self.high)
        if self.steps is not None:
            return cosine_temperature(step, self.steps, self.low, self.high)
        if not 0 < total < math.inf:
            raise ValueError(
                f"share: expected a training whose number of steps is known, got {total!r}; give the period's `steps` "
                "or `epochs`"
            )
        return cosine_temperature(step, (SHARE if self.share is None else self.share) * total, self.low, self.high)


def losses_with_temperature(
    module: nn.Module, hosts: tuple[type[nn.Module], ...] = (), *, given: bool = False
) -> list[nn.Module]:
    """Returns the contrastive losses in a module that hold their temperature as a number.

    These are weighted losses, the toolkits' losses in `hosts`, and `AdCo`, with an attribute `temperature` or `scale`.

    Args:
        module: A loss, or a module that contains losses.
        hosts: The toolkit's own loss classes.
        given: Whether the user passed the module as the one that has the temperature. Then it may be any module with
            such an attribute.

    Returns:
        The losses, each once. Empty if there is no contrastive loss.

    Raises:
        ValueError: If a contrastive loss has no such attribute, or if the attribute is a tensor.

    Examples:
        >>> class MyLoss(WeightedLoss):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weighting, self.temperature = UnDiMix(), 0.5
        >>> loss = MyLoss()
        >>> losses_with_temperature(torch.nn.ModuleList([loss, torch.nn.Linear(2, 2)])) == [loss]
        True
    """
    if given and temperature_name(module):
        return [module]
    kinds = (WeightedLoss, AdCo, *hosts)
    found: list[nn.Module] = []
    for loss in (part for part in module.modules() if isinstance(part, kinds)):
        # The temperature of a cached loss may be that of the toolkit's plain loss inside it.
        inside = None if temperature_name(loss) else getattr(loss, "loss", None)
        parts = [part for part in loss.modules() if isinstance(part, kinds) or part is inside]
        with_one = [part for part in parts if temperature_name(part)]
        if not with_one:
            raise ValueError(
                "TemperatureSchedule: expected losses with a number as their attribute `temperature` or `scale`, got "
                f"{type(loss).__name__} without one; if its model learns the temperature, no schedule can set it"
            )
        found += with_one
    return list(dict.fromkeys(found))


def temperature_name(loss: nn.Module) -> str | None:
    """Returns the name of the attribute that holds a loss's temperature as a number, or None if there is none.

    Args:
        loss: A loss.

    Returns:
        "temperature", or "scale" (the inverse of a temperature), or None.

    Raises:
        ValueError: If the attribute is a tensor, such as a learned temperature.

    Examples:
        >>> loss = torch.nn.Module()
        >>> loss.scale = 20.0
        >>> temperature_name(loss)
        'scale'
    """
    for name in NAMES:
        if any(isinstance(of.get(name), Tensor) for of in (vars(loss), loss._parameters, loss._buffers)):
            raise ValueError(
                f"TemperatureSchedule: expected a number as {type(loss).__name__}.{name}, got a tensor; a temperature "
                "that is learned has no schedule"
            )
        if isinstance(vars(loss).get(name), (int, float)):
            return name
    return None


def set_temperature(loss: nn.Module, temperature: float) -> None:
    """Sets the temperature of a loss, or its scale.

    Args:
        loss: A loss that `losses_with_temperature` returned.
        temperature: The temperature. A scale becomes `1 / temperature`.

    Examples:
        >>> loss = torch.nn.Module()
        >>> loss.scale = 20.0
        >>> set_temperature(loss, 0.25)
        >>> loss.scale
        4.0
    """
    name = temperature_name(loss)
    assert name is not None
    setattr(loss, name, 1 / temperature if name == "scale" else temperature)
