"""What gathering across processes needs beside the hosts' own collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor

Checked = TypeVar("Checked")

REFUSED = -1  # the count of a batch that a process has refused


def processes() -> int:
    """How many processes there are, 1 where none have been started.

    Examples:
        >>> processes()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_equal_batches(
    name: str, check: Callable[[], Checked], rows: Callable[[Checked], Tensor], *, labels: Tensor | None = None
) -> Checked:
    """Checks a batch on all processes at once, before a collective on it would hang or abort.

    An error of one process is an error on all: else the others would wait for it. Sizes travel between hosts alone, so
    that no device is waited for.

    Args:
        name: What an error is to call the batch.
        check: Checks this process's batch and returns what is made of it; raises what is wrong with it.
        rows: From what `check` returned to this process's rows [n, ...].
        labels: What is gathered beside the rows where it is given, which every process has to have then, or none.

    Returns:
        What `check` returned.

    Raises:
        ValueError: On every process, where sizes differ, labels are given on some alone, or another process's `check`
            raised; what this process's own raised is raised on as it is.

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
        _of_all(REFUSED, 0)  # tells the others
        raise
    counts, labelled = _of_all(len(rows(checked)), int(labels is not None))
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
    if len(set(labelled)) > 1:
        those = [rank for rank, given in enumerate(labelled) if given]
        raise ValueError(
            f"labels: expected some on every process or on none, since they are gathered, got some on {those} alone"
        )
    return checked


def _of_all(*numbers: int) -> list[list[int]]:
    """All processes' numbers: for each a list by rank."""
    of_ranks = [torch.zeros(len(numbers), dtype=torch.long, device="cpu") for _ in range(processes())]
    dist.all_gather(of_ranks, torch.tensor(numbers, device="cpu"), group=_between_hosts())
    by_number: list[list[int]] = torch.stack(of_ranks, dim=1).tolist()
    return by_number


# Weak on both sides, as a DDP module may hold the world for longer than torch: threads of a group that outlives
# destroy_process_group may abort the process as it ends.
_OF_WORLD: WeakKeyDictionary[dist.ProcessGroup, ref[dist.ProcessGroup]] = WeakKeyDictionary()


def _between_hosts() -> dist.ProcessGroup:
    """A group that sends tensors of the CPU: the default one where it can, else one of its own, made once."""
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
    """All processes' rows [processes * n, ...], without gradient; as they are with one process.

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
    """All processes' rows without gradient, of each of a number of equal parts (views, columns) together.

    Args:
        rows: This process's rows of the first part, then those of the next, ... [parts * n, k].
        parts: How many parts there are.

    Returns:
        All processes' rows of the first part, then those of the next, ... [parts * processes * n, k].

    Examples:
        >>> gather_parts(torch.arange(4.0)[:, None], parts=2).shape
        torch.Size([4, 1])
    """
    gathered = gather_constants(rows)
    by_process = gathered.view(-1, parts, len(rows) // parts, *rows.shape[1:])
    return by_process.transpose(0, 1).reshape(gathered.shape)
