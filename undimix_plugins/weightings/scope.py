"""Which negatives a method acts on: all, the in-batch ones, or the explicit hard ones."""

from __future__ import annotations

from torch import Tensor

from undimix_plugins.contrast import Contrast

#: The names are those of sentence-transformers' `hardness_mode`.
SCOPES = ("all_negatives", "in_batch_negatives", "hard_negatives")


def check_in_scope(contrast: Contrast, scope: str) -> None:
    """Raises a ValueError if the scope is the explicit hard negatives, and the contrast has none.

    A contrast whose `hard_negative_columns` are empty passes: its loss has explicit hard negatives, in other contrasts.

    Args:
        contrast: The anchors, positives and candidates.
        scope: One of `SCOPES`.

    Examples:
        >>> check_in_scope(two_views(torch.randn(4, 8), torch.randn(4, 8), 0.5), "all_negatives")
    """
    if scope == "hard_negatives" and contrast.hard_negative_columns is None:
        raise ValueError(
            "scope: expected a loss with explicit hard negatives for 'hard_negatives', got a contrast without any "
            "(hard_negative_columns is None). In sentence-transformers, the dataset needs columns of negatives after "
            "the positive. Without such columns, use scope='all_negatives'"
        )


def in_scope(contrast: Contrast, scope: str, rows: slice) -> Tensor | None:
    """Returns which columns a scope contains for a block of r anchors.

    Args:
        contrast: The anchors, positives and candidates.
        scope: One of `SCOPES`.
        rows: A block of r anchors.

    Returns:
        A mask, bool [r, m], or None if the scope contains all columns. Values in columns that are not negatives of an
        anchor mean nothing.

    Examples:
        >>> hard = torch.tensor([[1], [2], [0]])
        >>> contrast = in_batch_negatives(torch.eye(3), torch.eye(3), 0.5, hard_negative_columns=hard)
        >>> in_scope(contrast, "in_batch_negatives", slice(0, 1))
        tensor([[ True, False,  True]])
    """
    if scope == "all_negatives" or (scope == "in_batch_negatives" and contrast.hard_negative_columns is None):
        return None
    hard = contrast.is_hard_negative(rows)
    return hard if scope == "hard_negatives" else ~hard
