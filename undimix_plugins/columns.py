"""Functions of listed columns of the pool: integers [n, k], padded with -1."""

from __future__ import annotations

import torch
from torch import Tensor

from undimix_plugins.blocks import is_wide


def is_not_among(columns: Tensor, width: int) -> Tensor:
    """Returns which of `width` columns are not listed in a row of `columns`.

    Args:
        columns: Integers [n, k], padded with -1.
        width: The number of columns of the pool.

    Returns:
        A mask, bool [n, width], False where `columns` lists the column.

    Examples:
        >>> is_not_among(torch.tensor([[0, -1], [2, 1]]), width=3)
        tensor([[False,  True,  True],
                [ True, False, False]])
    """
    # Padding goes to one more column, which is cut off again.
    columns = torch.where(columns < 0, width, columns)
    marks = torch.ones(len(columns), width + 1, dtype=torch.bool, device=columns.device)
    return marks.scatter(1, columns, False)[:, :width]


def sum_of_rows(rows: Tensor, columns: Tensor) -> Tensor:
    """Returns the sum of `rows[columns]` for each row of `columns`.

    Args:
        rows: Rows [m, d], floating point.
        columns: Integers [n, k], each at most once in a row, padded with -1.

    Returns:
        Sums [n, d], same dtype as `rows`; 0 for a row that lists no column.

    Examples:
        >>> sum_of_rows(torch.eye(3), torch.tensor([[0, 2], [1, -1]]))
        tensor([[1., 0., 1.],
                [0., 1., 0.]])
    """
    if is_wide(columns):
        return (~is_not_among(columns, len(rows))).to(rows.dtype) @ rows
    return torch.cat([rows, torch.zeros_like(rows[:1])])[columns].sum(dim=1)


def mean_of_rows(rows: Tensor, columns: Tensor) -> Tensor:
    """Returns the mean of `rows[columns]` for each row of `columns`.

    Args:
        rows: Rows [m, d], floating point.
        columns: Integers [n, k], each at most once in a row, padded with -1.

    Returns:
        Means [n, d], same dtype as `rows`; 0 for a row that lists no column.

    Examples:
        >>> mean_of_rows(torch.eye(2), torch.tensor([[0, 1], [-1, -1]]))
        tensor([[0.5000, 0.5000],
                [0.0000, 0.0000]])
    """
    return sum_of_rows(rows, columns) / (columns >= 0).sum(dim=1, keepdim=True).clamp(min=1)


def distinct(columns: Tensor) -> Tensor:
    """Removes repeated columns from each row, so that rows can be summed over the columns.

    Args:
        columns: Integers [n, k], padded with -1.

    Returns:
        The same shape, in ascending order. A repetition becomes -1.

    Examples:
        >>> distinct(torch.tensor([[2, 0, 2]]))
        tensor([[ 0,  2, -1]])
    """
    if columns.shape[1] < 2:
        return columns
    ordered = columns.sort(dim=1).values
    first = torch.zeros_like(ordered[:, :1], dtype=torch.bool)
    return ordered.masked_fill(torch.cat([first, ordered[:, 1:] == ordered[:, :-1]], dim=1), -1)
