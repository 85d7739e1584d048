"""What the models and losses of this package check alike."""

from __future__ import annotations


def check_width(name: str, width: int) -> None:
    """Raises a ValueError for a width below 1."""
    if width < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {width}")
