"""What a `with` block holds is one thread's or task's, and blocks may end in any order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
from torch import Tensor

from tests.contrasts import random_rows
from undimix_lightly import NonSemanticNegatives, non_semantic_columns
from undimix_plugins import (
    HCL,
    Contrast,
    FalseNegativeElimination,
    Uniform,
    Weighting,
    info_nce,
    support_set,
    two_views,
    watch,
)
from undimix_plugins.scoped import Scoped

Block = Callable[[Tensor], AbstractContextManager[None]]
BLOCKS = [
    pytest.param(support_set, FalseNegativeElimination(2, 0.2), id="support_set"),
    pytest.param(non_semantic_columns, NonSemanticNegatives(), id="non_semantic_columns"),
]


def loss_of(weighting: Weighting) -> float:
    return info_nce(two_views(random_rows(6, 4, 0), random_rows(6, 4, 1), 0.5), weighting).item()


def rows(seed: int) -> Tensor:
    return random_rows(6, 4, seed)


@pytest.mark.parametrize(("block", "weighting"), BLOCKS)
def test_two_threads_have_their_own(block: Block, weighting: Weighting) -> None:
    wanted = {}
    for seed in (7, 8):
        with block(rows(seed)):
            wanted[seed] = loss_of(weighting)
    assert wanted[7] != wanted[8]
    both, first_has_left = threading.Barrier(2, timeout=10), threading.Event()
    got: dict[int, list[float]] = {7: [], 8: []}

    def work(seed: int) -> None:
        if seed == 8:
            both.wait()  # until the other is inside
        with block(rows(seed)):
            if seed == 7:
                both.wait()
            both.wait()  # until both are
            got[seed].append(loss_of(weighting))
            if seed == 8:
                first_has_left.wait(10)
                got[seed].append(loss_of(weighting))
        first_has_left.set()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (7, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {7: [wanted[7]], 8: [wanted[8]] * 2}


@pytest.mark.parametrize(("block", "weighting"), BLOCKS)
def test_a_generator_that_is_left_early(block: Block, weighting: Weighting) -> None:
    def steps(seed: int) -> Iterator[float]:
        with block(rows(seed)):
            while True:
                yield loss_of(weighting)

    without = loss_of(weighting) if block is support_set else None
    with block(rows(8)):
        wanted = loss_of(weighting)
    generator = steps(7)
    of_generator = next(generator)
    assert of_generator != wanted
    with block(rows(8)):
        assert loss_of(weighting) == wanted
        generator.close()  # begun before, and over before
        assert loss_of(weighting) == wanted
    if block is support_set:
        assert loss_of(weighting) == without != of_generator
    else:
        with pytest.raises(ValueError, match="got no columns"):
            loss_of(weighting)


def test_a_block_that_another_thread_ends_is_over() -> None:
    current = Scoped[int]("current")
    block = current.holding(1)
    block.__enter__()
    assert current.values() == [1]
    thread = threading.Thread(target=block.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert current.values() == []


def test_an_observer_may_work_out_losses() -> None:
    differences = []

    def observe(contrast: Contrast, weighting: Weighting) -> None:
        differences.append((info_nce(contrast, weighting) - info_nce(contrast, Uniform())).item())

    seen: list[Weighting] = []
    with watch(observe), watch(lambda contrast, weighting: seen.append(weighting)):
        for _ in range(2):
            loss_of(HCL())
    assert differences == [loss_of(HCL()) - loss_of(Uniform())] * 2
    assert seen == [HCL()] * 2


def test_another_threads_losses_are_not_watched() -> None:
    seen: list[Weighting] = []
    with watch(lambda contrast, weighting: seen.append(weighting)):
        thread = threading.Thread(target=loss_of, args=(HCL(),))
        thread.start()
        thread.join()
        loss_of(Uniform())
    assert seen == [Uniform()]
