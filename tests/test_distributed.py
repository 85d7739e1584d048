"""Groups of processes: what the core keeps of them. Gathering itself is tested in the matrix of integration tests."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch.distributed as dist

from undimix_plugins import distributed


@pytest.mark.parametrize("backend", ["gloo", "fake"])
def test_no_group_outlives_its_world(backend: str, tmp_path: Path) -> None:
    """Else its threads hold tensors while the interpreter ends, which aborts the process now and then."""
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        group = distributed._between_hosts()
        assert distributed._between_hosts() is group
        assert (group is dist.group.WORLD) == (backend == "gloo")
        kept = [weakref.ref(group), weakref.ref(dist.group.WORLD)]
    finally:
        dist.destroy_process_group()
    del group
    gc.collect()
    assert [reference() for reference in kept] == [None, None]
