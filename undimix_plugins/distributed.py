"""Gathering across processes, and checks before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor

from undimix_plugins.checks import FLOATS

Checked = TypeVar("Checked")

REFUSED = -1  # the count of a batch that a process has refused


def processes() -> int:
    """Returns the number of processes of the default process group.

    Returns:
        The world size, or 1 if torch.distributed is not initialised.

    Examples:
        >>> processes()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_equal_batches(
    name: str, check: Callable[[], Checked], rows: Callable[[Checked], Tensor], *, labels: Tensor | None = None
) -> Checked:
    """Checks the batches of all processes before a collective.

    A collective would hang or abort if one process raised an error or if shapes differed. So an error on one process
    raises an error on all processes. Sizes are exchanged between the CPUs: no process waits for its device. All
    processes have to call it.

    Args:
        name: The name of the batch, for error messages.
        check: Checks this process's batch and returns the checked batch, or raises an error.
        rows: A function from the checked batch to its rows [n, ...].
        labels: Labels that are gathered together with the rows, or None. All processes must have labels, or none.

    Returns:
        What `check` returned.

    Raises:
        ValueError: On every process, if the numbers of rows, or the widths or dtypes of embeddings, differ, if only
            some processes have labels, or if `check` raised an error on another process.
        Exception: What `check` raised on this process.

    Examples:
        >>> (z0,) = check_equal_batches("out0", lambda: unit_rows(out0=torch.randn(8, 4)), lambda checked: checked[0])
        >>> z0.shape
        torch.Size([8, 4])
    """
    if processes() == 1:
        return check()
    try:
        checked = check()
    except Exception:
        _of_all(REFUSED, 0, 0, 0)  # tells the others
        raise
    batch = rows(checked)
    embeds = batch.is_floating_point() and batch.dim() > 1  # other batches, such as tokens, may differ in width
    width, dtype = (batch.shape[-1], FLOATS.index(batch.dtype)) if embeds else (0, 0)
    counts, labelled, widths, dtypes = _of_all(len(batch), int(labels is not None), width, dtype)
    if REFUSED in counts:
        refused = [rank for rank, count in enumerate(counts) if count == REFUSED]
        raise ValueError(
            f"{name}: expected a batch on every process, since negatives are gathered, got none on {refused}, whose "
            "own error says why"
        )
    if len(set(counts)) > 1:
        raise ValueError(
            f"{name}: expected as many rows on every process, since negatives are gathered, got {counts}; "
            "drop the last, incomplete batch (drop_last=True), or do without gathering"
        )
    if len(set(widths)) > 1 or len(set(dtypes)) > 1:
        came = [f"{width} of {FLOATS[dtype]}" for width, dtype in zip(widths, dtypes, strict=True)]
        raise ValueError(
            f"{name}: expected one width and dtype on every process, since negatives are gathered, got {came}"
        )
    if len(set(labelled)) > 1:
        those = [rank for rank, given in enumerate(labelled) if given]
        raise ValueError(
            f"labels: expected some on every process or on none, since they are gathered, got some on {those} alone"
        )
    return checked


def _of_all(*numbers: int) -> list[list[int]]:
    """Returns the numbers of all processes: for each number a list by rank."""
    of_ranks = [torch.zeros(len(numbers), dtype=torch.long, device="cpu") for _ in range(processes())]
    dist.all_gather(of_ranks, torch.tensor(numbers, device="cpu"), group=_between_hosts())
    by_number: list[list[int]] = torch.stack(of_ranks, dim=1).tolist()
    return by_number


# Keys and values are weak references, since a DDP module may hold the default group longer than torch does. The threads
# of a group that outlives destroy_process_group may abort the process when it ends.
_OF_WORLD: WeakKeyDictionary[dist.ProcessGroup, ref[dist.ProcessGroup]] = WeakKeyDictionary()


def _between_hosts() -> dist.ProcessGroup:
    """Returns a group that can send CPU tensors: the default group if it can, otherwise a new one, made once."""
    world = dist.group.WORLD
    assert world is not None
    if "gloo" in str(dist.get_backend_config(world)):
        return world
    known = _OF_WORLD.get(world)
    if known is not None and (group := known()) is not None:
        return group
    made = dist.new_group(backend="gloo")
    assert isinstance(made, dist.ProcessGroup)
    _OF_WORLD[world] = ref(made)
    return made


def gather_constants(rows: Tensor) -> Tensor:
    """Gathers rows from all processes, without gradient. All processes have to call it.

    Args:
        rows: This process's rows [n, ...]. The shape and dtype must be the same on all processes.

    Returns:
        The rows of all processes [processes * n, ...], in order of their ranks. With one process, `rows` itself.

    Examples:
        >>> gather_constants(torch.arange(3))
        tensor([0, 1, 2])
    """
    if processes() == 1:
        return rows
    rows = rows.detach().contiguous()
    parts = [torch.empty_like(rows) for _ in range(processes())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def gather_parts(rows: Tensor, parts: int) -> Tensor:
    """Gathers rows that consist of equal parts (such as views), without gradient. All processes have to call it.

    Args:
        rows: This process's rows [parts * n, k]: the n rows of the first part, then the n rows of the next part, and
            so on. The shape and dtype must be the same on all processes.
        parts: The number of parts.

    Returns:
        [parts * processes * n, k]: the rows of the first part from all processes, then those of the next part, and so
        on.

    Examples:
        >>> gather_parts(torch.arange(4.0)[:, None], parts=2).shape
        torch.Size([4, 1])
    """
    gathered = gather_constants(rows)
    by_process = gathered.view(-1, parts, len(rows) // parts, *rows.shape[1:])
    return by_process.transpose(0, 1).reshape(gathered.shape)
