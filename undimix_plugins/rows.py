"""Precision and normalisation of the rows of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from undimix_plugins.checks import check_embeddings, check_same_length


def as_full_precision(rows: Tensor) -> Tensor:
    """Converts rows in half precision to float32, and returns others unchanged.

    Normalise after the conversion, not before. In half precision the square of a small row underflows, so that its
    length is 0.

    Args:
        rows: A tensor of any shape and dtype.

    Returns:
        The same shape, in float32 for float16 and bfloat16, otherwise the tensor itself.

    Examples:
        >>> as_full_precision(torch.zeros(2, 4, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


def unit_rows(**embeddings: Tensor) -> list[Tensor]:
    """Checks embeddings and normalises their rows to length 1, in full precision.

    Args:
        embeddings: One or more tensors [rows, width], floating point. Pass each by name; error messages use the names.

    Returns:
        A list of the normalised tensors [rows, width], in the order of the arguments, in float32 for half precision,
        otherwise in the dtype of the embeddings. The values are those of `torch.nn.functional.normalize`. A row without
        a direction (zeros, or a length below 1e-12; in float16 below 6.1e-5) gets gradient 0.

    Raises:
        ValueError: If a tensor is not a matrix of floats, if lengths, widths, dtypes or devices differ, or (on the CPU)
            if a value is not finite.

    Examples:
        >>> unit_rows(out0=torch.tensor([[3.0, 4.0]]))
        [tensor([[0.6000, 0.8000]])]
    """
    check_embeddings(**embeddings)
    check_same_length(**embeddings)
    return [to_length_one(rows) for rows in embeddings.values()]


def to_length_one(rows: Tensor) -> Tensor:
    """Normalises rows to length 1, in full precision, like `torch.nn.functional.normalize`.

    A row without a direction gets gradient 0. Its length is 0, or below 1e-12, or below the smallest normal number of
    its dtype (6.1e-5 in float16). Its true gradient would be huge, and infinite in half precision.

    Args:
        rows: Embeddings [..., width], floating point.

    Returns:
        The same shape, in float32 for half precision, otherwise in the same dtype. Rows of zeros stay zeros.

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
    """Returns the smallest length of a row that has a direction, for embeddings of this dtype.

    Examples:
        >>> least_length(torch.float32)
        1e-12
    """
    return max(float(torch.finfo(dtype).tiny), 1e-12)


def in_backward() -> bool:
    """Whether a backward pass is running. Activation checkpointing then runs a forward pass again.

    Examples:
        >>> in_backward()
        False
    """
    return int(torch._C._current_graph_task_id()) != -1  # as torch's own checkpointing asks


def full_precision(like: Tensor) -> torch.autocast:
    """Returns a context with autocast disabled on a tensor's device.

    Logits at a low temperature need matrix products in full precision.

    Args:
        like: A tensor on the device.

    Examples:
        >>> rows = torch.eye(2)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), full_precision(rows):
        ...     (rows @ rows).dtype
        torch.float32
    """
    return torch.autocast(like.device.type, enabled=False)
