"""Settings that go wherever a training puts its hyperparameters: copies, logs, checkpoints."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

Class = TypeVar("Class", bound=type)


def loadable(cls: Class) -> Class:
    """Lets `torch.load(..., weights_only=True)` read objects of a class, which is returned as it is.

    Examples:
        >>> @loadable
        ... class MyWeighting(Uniform):
        ...     pass
        >>> MyWeighting in torch.serialization.get_safe_globals()
        True
    """
    torch.serialization.add_safe_globals([cls])
    return cls


def constant(cls: Class) -> Class:
    """Makes a frozen dataclass one that hyperparameters may hold: `loadable`, and set to what it holds already.

    Lightning copies hyperparameters field by field, and refuses dataclasses that are not to be written to at all.

    Examples:
        >>> import dataclasses
        >>> @constant
        ... @dataclasses.dataclass(frozen=True)
        ... class MyWeighting(Uniform):
        ...     strength: float = 1.0
        >>> weighting = MyWeighting()
        >>> weighting.strength = 1.0
        >>> weighting.strength = 2.0
        Traceback (most recent call last):
        dataclasses.FrozenInstanceError: cannot assign to field 'strength'
    """
    frozen: Any = cls.__setattr__

    def set_to_the_same(self: Any, name: str, value: Any) -> None:
        held = vars(self).get(name, ...)
        if held is not value and repr(held) != repr(value):  # a copy may be equal without comparing so
            frozen(self, name, value)

    cls.__setattr__ = set_to_the_same  # type: ignore[assignment, method-assign]
    return loadable(cls)
