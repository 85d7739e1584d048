"""Groups of processes: what the core keeps of them. Gathering itself is an integration test."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.releases import needs
from undimix_plugins import distributed

Begin = Callable[[str], None]


@pytest.fixture
def begin(tmp_path: Path) -> Begin:
    """Starts one process alone: a group of its own asks nobody, so that "fake" can stand for a backend of GPUs."""

    def begin(backend: str) -> None:
        if backend == "fake":
            needs("torch", "2.10", "no other group can be made beside this backend")
        dist.init_process_group(backend, init_method=f"file://{tmp_path}/{backend}", rank=0, world_size=1)

    return begin


@pytest.mark.parametrize("backend", ["gloo", "fake"])
def test_no_group_outlives_its_world(backend: str, begin: Begin) -> None:
    """Else its threads hold tensors while the interpreter ends, which aborts the process now and then."""
    begin(backend)
    try:
        group = weakref.ref(distributed._between_hosts())
        gc.collect()
        assert distributed._between_hosts() is group()
        world = weakref.ref(dist.group.WORLD)
        assert (group() is world()) == (backend == "gloo")
    finally:
        dist.destroy_process_group()
    gc.collect()
    assert (group(), world()) == (None, None)


def test_no_group_outlives_a_world_that_is_kept(begin: Begin) -> None:
    """As DistributedDataParallel keeps it."""
    begin("fake")
    try:
        world, group = dist.group.WORLD, weakref.ref(distributed._between_hosts())
    finally:
        dist.destroy_process_group()
    gc.collect()
    assert world is not None
    assert group() is None
