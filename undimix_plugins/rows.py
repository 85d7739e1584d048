"""Rows of embeddings: their precision, their length, and when they are worked on."""

from __future__ import annotations

import torch
from torch import Tensor

from undimix_plugins.checks import check_embeddings, check_same_length


def as_full_precision(rows: Tensor) -> Tensor:
    """The rows in float32 where they came in half precision, else as they are.

    Normalise after this, not before: in half precision the length of a tiny row is 0, or its square underflows.

    Examples:
        >>> as_full_precision(torch.zeros(2, 4, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


def unit_rows(**embeddings: Tensor) -> list[Tensor]:
    """Brings embeddings to length 1, in full precision.

    Args:
        embeddings: One or more tensors [rows, width], by the names that errors use.

    Returns:
        Each of them [rows, width], as `torch.nn.functional.normalize` gives them. A row without a direction (zeros, or
        a length below 1e-12) gets gradient 0.

    Raises:
        ValueError: For tensors that are no matrices of finite floats, or that differ in length, width, dtype or device.

    Examples:
        >>> unit_rows(out0=torch.tensor([[3.0, 4.0]]))
        [tensor([[0.6000, 0.8000]])]
    """
    check_embeddings(**embeddings)
    check_same_length(**embeddings)
    return [to_length_one(rows) for rows in embeddings.values()]


def to_length_one(rows: Tensor) -> Tensor:
    """Brings rows to length 1, in full precision, as `torch.nn.functional.normalize` does.

    A row without a direction, of zeros or of a length below 1e-12 or the least normal number of its dtype (6.1e-5 in
    float16), gets gradient 0. Otherwise the gradient is divided by next to nothing, and is infinite in half precision.

    Args:
        rows: Embeddings [..., width], floating point.

    Returns:
        The same shape, float32 for half precision; rows of zeros stay.

    Examples:
        >>> rows = torch.zeros(2, 4, dtype=torch.float16, requires_grad=True)
        >>> torch.autograd.grad(to_length_one(rows).sum(), rows)[0].count_nonzero()
        tensor(0)
    """
    # In half precision a row of zeros, or a tiny one, would be divided by 0.
    full = as_full_precision(rows)
    directed = torch.linalg.vector_norm(full.detach(), dim=-1, keepdim=True) >= least_length(rows.dtype)
    return torch.nn.functional.normalize(torch.where(directed, full, full.detach()), dim=-1)


def least_length(dtype: torch.dtype) -> float:
    """The length from which on a row has a direction."""
    return max(float(torch.finfo(dtype).tiny), 1e-12)


def in_backward() -> bool:
    """Whether a backward pass is running, in which activation checkpointing runs a forward again."""
    return int(torch._C._current_graph_task_id()) != -1  # as torch's own checkpointing asks


def full_precision(like: Tensor) -> torch.autocast:
    """A context in which autocast leaves matrix products alone: logits over a small temperature need all digits."""
    return torch.autocast(like.device.type, enabled=False)
