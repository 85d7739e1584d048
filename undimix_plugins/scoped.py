"""What holds inside of a `with` block, in one thread or task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

Value = TypeVar("Value")


@dataclass(eq=False)
class _Block(Generic[Value]):
    value: Value | None
    over: bool = False


class Scoped(Generic[Value]):
    """Values that hold inside of `with` blocks, whose ends need not be in the order of their beginnings.

    A block in a generator is left when that is closed, which may be long after a later block has begun.

    Args:
        name: What a debugger is to show.

    Examples:
        >>> current = Scoped[int]("current")
        >>> with current.holding(1), current.holding(2):
        ...     current.values()
        [1, 2]
        >>> current.values()
        []
    """

    def __init__(self, name: str) -> None:
        self._blocks: ContextVar[tuple[_Block[Value], ...]] = ContextVar(name, default=())

    def values(self) -> list[Value]:
        """What holds here, that of the innermost block last."""
        return [cast(Value, block.value) for block in self._blocks.get() if not block.over]

    @contextmanager
    def holding(self, value: Value) -> Iterator[None]:
        """Holds a value too, as long as the context lasts."""
        own = _Block(value)
        self._blocks.set((*self._blocks.get(), own))
        try:
            yield
        finally:
            own.over, own.value = True, None  # in whichever context a generator is closed
            self._blocks.set(tuple(block for block in self._blocks.get() if not block.over))

    @contextmanager
    def holding_nothing(self) -> Iterator[None]:
        """Holds none of the values, as long as the context lasts."""
        before = self._blocks.set(())
        try:
            yield
        finally:
            self._blocks.reset(before)
