"""Decorators for settings that are copied, logged and saved with the hyperparameters of a training."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

Class = TypeVar("Class", bound=type)


def loadable(cls: Class) -> Class:
    """Class decorator that lets `torch.load(..., weights_only=True)` load objects of the class.

    Args:
        cls: The class.

    Returns:
        The class itself.

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
    """Class decorator for frozen dataclasses that are used as hyperparameters.

    The class becomes `loadable`, and a field can be set to the value that it already has. Lightning needs this: it
    copies hyperparameters field by field, and fails for a dataclass that allows no assignment.

    Args:
        cls: A frozen dataclass.

    Returns:
        The class itself. Setting a field to another value still raises `dataclasses.FrozenInstanceError`.

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
