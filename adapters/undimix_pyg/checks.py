"""What the models and losses of this package check alike."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from undimix_plugins import as_full_precision
from undimix_plugins.checks import check_embeddings, check_same_length


def check_width(name: str, width: int) -> None:
    """Raises a ValueError for a width below 1."""
    if width < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {width}")


def check_labels(labels: Tensor | None, rows: Tensor, of: str) -> None:
    """Raises a ValueError unless there is a label on the rows' device for each of them (`of` says what), or None."""
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.shape != rows.shape[:1]:
        came = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels: expected one for each {of}, of shape [{len(rows)}], got {came}")
    if labels.device != rows.device:
        raise ValueError(f"labels: expected device {rows.device}, as the embeddings have, got {labels.device}")


def checked_views(z1: Tensor, z2: Tensor, labels: Tensor | None, of: str) -> tuple[Tensor, Tensor]:
    """Two views' projections [rows, width] at length 1, in full precision; a ValueError for bad ones, or labels."""
    check_embeddings(z1=z1, z2=z2)
    check_same_length(z1=z1, z2=z2)
    check_labels(labels, z1, of)
    return normalize(as_full_precision(z1), dim=1), normalize(as_full_precision(z2), dim=1)
