"""Values that are set inside a `with` block, for one thread or asyncio task."""

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
    """Values that are set inside `with` blocks, for one thread or asyncio task.

    Blocks may end in any order. For example, a block in a generator ends when the generator is closed, and a later
    block may have begun before that.

    Args:
        name: The name of the context variable, which a debugger shows.

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
        """Returns the values of all open blocks, the innermost last."""
        return [cast(Value, block.value) for block in self._blocks.get() if not block.over]

    @contextmanager
    def holding(self, value: Value) -> Iterator[None]:
        """Context manager that adds a value.

        Args:
            value: The value that `values` returns inside the block, after those of the outer blocks.
        """
        own = _Block(value)
        self._blocks.set((*self._blocks.get(), own))
        try:
            yield
        finally:
            own.over, own.value = True, None  # also if a generator is closed in another context
            self._blocks.set(tuple(block for block in self._blocks.get() if not block.over))

    @contextmanager
    def holding_nothing(self) -> Iterator[None]:
        """Context manager that hides the values of all outer blocks.

        Examples:
            >>> current = Scoped[int]("current")
            >>> with current.holding(1), current.holding_nothing():
            ...     current.values()
            []
        """
        before = self._blocks.set(())
        try:
            yield
        finally:
            self._blocks.reset(before)
