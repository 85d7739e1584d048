"""What gathering across processes needs beside the hosts' own collectives."""

from __future__ import annotations

from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor


def check_equal_batches(name: str, count: int) -> None:
    """Checks that all processes have batches of one size, before a collective on them would hang or abort.

    Sizes travel between hosts alone, so that no device is waited for. Nothing is checked with one process.

    Args:
        name: What an error is to call the batch.
        count: This process's number of rows.

    Raises:
        ValueError: On every process, where they differ.

    Examples:
        >>> check_equal_batches("out0", 8)
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    _check(name, count)


def _check(name: str, count: int) -> None:
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([count]), group=_between_hosts(dist.group.WORLD))
    counts = [int(size) for size in sizes]
    if len(set(counts)) > 1:
        raise ValueError(
            f"{name}: expected as many rows on every process, since negatives are gathered, got {counts}; "
            "drop the last, incomplete batch (drop_last=True), or do without gathering"
        )


@cache
def _between_hosts(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group that sends tensors of the CPU: the default one where it can, else one of its own."""
    if "gloo" in str(dist.get_backend_config(world)):
        return world
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def gather_constants(rows: Tensor) -> Tensor:
    """All processes' rows [processes * n, ...], without gradient; as they are with one process.

    Examples:
        >>> gather_constants(torch.arange(3))
        tensor([0, 1, 2])
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    rows = rows.detach().contiguous()
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)
