"""What every input is checked for: each error names the argument, what came and what was expected.

Shapes, dtypes and devices are checked everywhere. Values (finite rows, column numbers in range) are checked on
the CPU alone, since reading them on another device would make it wait for the host. There, a non-finite embedding
surfaces as a loss of NaN: nothing on the way replaces it.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor


def values_are_free(tensor: Tensor) -> bool:
    """Whether reading a tensor's values costs no device-host synchronisation and no graph break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_embeddings(**embeddings: Tensor) -> None:
    """Checks that the named tensors are matrices of finite floats of one width, dtype and device.

    Args:
        embeddings: One or more tensors [rows, width], by the name that an error is to use.

    Raises:
        ValueError: For a rank other than 2, no rows, no columns, a dtype that is no float, widths, dtypes or devices
            that differ, or (on the CPU) a row that is not finite.

    Examples:
        >>> check_embeddings(out0=torch.zeros(4, 8), out1=torch.zeros(4, 9))
        Traceback (most recent call last):
        ValueError: out1: expected width 8, as out0 has, got shape [4, 9]
    """
    first_name, first = next(iter(embeddings.items()))
    for name, rows in embeddings.items():
        if not isinstance(rows, Tensor) or rows.dim() != 2:
            came = f"shape {list(rows.shape)}" if isinstance(rows, Tensor) else f"{type(rows).__name__}"
            raise ValueError(f"{name}: expected a tensor of shape [rows, width], got {came}")
        if rows.numel() == 0:
            raise ValueError(f"{name}: expected at least one row and one column, got shape {list(rows.shape)}")
        if not rows.is_floating_point():
            raise ValueError(f"{name}: expected floating-point embeddings, got {rows.dtype}")
        if rows.shape[1] != first.shape[1]:
            raise ValueError(
                f"{name}: expected width {first.shape[1]}, as {first_name} has, got shape {list(rows.shape)}"
            )
        if rows.dtype != first.dtype:
            raise ValueError(f"{name}: expected {first.dtype}, as {first_name} has, got {rows.dtype}")
        if rows.device != first.device:
            raise ValueError(f"{name}: expected device {first.device}, as {first_name} has, got {rows.device}")
        if values_are_free(rows):
            finite = rows.isfinite().all(dim=1)
            if not finite.all():
                row = int((~finite).nonzero()[0, 0])
                raise ValueError(f"{name}: expected finite embeddings, got a non-finite value in row {row}")


def check_same_length(**tensors: Tensor) -> None:
    """Checks that the named tensors have equally many rows; a ValueError names the first that differs."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if len(tensor) != len(first):
            raise ValueError(f"{name}: expected {len(first)} rows, as {first_name} has, got {len(tensor)}")


def check_number(
    name: str,
    value: float,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """Checks that `value` is a finite real number in a range, and returns it as a float.

    Raises:
        ValueError: Naming the argument, what came and what was expected.

    Examples:
        >>> check_number("temperature", 0.0, above=0)
        Traceback (most recent call last):
        ValueError: temperature: expected a finite number above 0, got 0.0
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not (is_number and at_least <= value < below and value > above):
        bounds = [
            f"{word} {bound:g}"
            for word, bound in (("at least", at_least), ("above", above), ("below", below))
            if math.isfinite(bound)
        ]
        expected = " ".join(["a finite number", " and ".join(bounds)]).strip()
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return float(value)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Checks that `value` is one of `choices`; a ValueError names the argument and lists them."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
