"""Columns of the pool that are listed for each row, integers [n, k] padded with -1."""

from __future__ import annotations

import torch
from torch import Tensor

from undimix_plugins.blocks import is_wide


def is_not_among(columns: Tensor, width: int) -> Tensor:
    """Which of so many columns a row of `columns` [n, k], padded with -1, does not name: bool [n, width]."""
    # Padding goes to a column of its own, which is cut off again: no mask has to be read.
    columns = torch.where(columns < 0, width, columns)
    marks = torch.ones(len(columns), width + 1, dtype=torch.bool, device=columns.device)
    return marks.scatter(1, columns, False)[:, :width]


def sum_of_rows(rows: Tensor, columns: Tensor) -> Tensor:
    """The sum of `rows[columns]` per row of `columns`; -1 picks nothing (a row of zeros put last)."""
    if is_wide(columns):
        return (~is_not_among(columns, len(rows))).to(rows.dtype) @ rows
    return torch.cat([rows, torch.zeros_like(rows[:1])])[columns].sum(dim=1)


def distinct(columns: Tensor) -> Tensor:
    """Keeps a column that stands twice in a row once, so that rows can be summed over the columns."""
    if columns.shape[1] < 2:
        return columns
    ordered = columns.sort(dim=1).values
    first = torch.zeros_like(ordered[:, :1], dtype=torch.bool)
    return ordered.masked_fill(torch.cat([first, ordered[:, 1:] == ordered[:, :-1]], dim=1), -1)
