"""What tests do on several processes: work on each of them, and leave their group."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # imported once there is a process group, it would keep it
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(work: Callable[..., Any], ranks: int, root: Path, *given: Any) -> list[Any]:
    """Returns what `work(rank, ranks, *given)` returned on each process of a group, in a folder of its own."""
    mp.spawn(_on_a_rank, (work, ranks, root, given), nprocs=ranks)
    return [torch.load(root / f"{rank}.pt") for rank in range(ranks)]


def _on_a_rank(rank: int, work: Callable[..., Any], ranks: int, root: Path, given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/init", rank=rank, world_size=ranks)
    torch.save(work(rank, ranks, *given), root / f"{rank}.pt")
    leave_group()


def leave_group() -> None:
    """Ends the process group. If something kept it, its threads would abort the process now and then, as it ends."""
    world = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    gc.collect()
    assert world() is None
