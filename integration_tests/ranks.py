"""How a process of a test with several leaves them."""

from __future__ import annotations

import gc
import weakref

import torch.distributed as dist


def leave_group() -> None:
    """Ends the process group. If something kept it, its threads would abort the process now and then, as it ends."""
    world = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    gc.collect()
    assert world() is None
