"""What a cell of the matrix is: a host's loss in a machinery, plain, with Uniform() and with UnDiMix()."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Mapping
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from undimix_plugins import Uniform, undimix

KINDS = ("plain", "uniform", "undimix")
TEMPERATURE = 0.2
LOGITS = 1 / TEMPERATURE  # the largest, of cosines
EXACT, BF16, FP16 = 1e-9, torch.finfo(torch.bfloat16).eps, torch.finfo(torch.float16).eps


class Run(NamedTuple):
    """What a training comes to.

    Attributes:
        losses: Of each step.
        moved: How far each parameter of the model has come.
        kept: Whether an interrupted training came to the numbers of one that was not.
        breaks: Where it was compiled, how many breaks the graph has.
    """

    losses: Tensor
    moved: Tensor
    kept: bool = True
    breaks: int | None = None


class Lack(NamedTuple):
    """Why the host itself does not have a cell.

    Attributes:
        words: In the table.
        error: What it raises; None where it trains on, but not as an uninterrupted training.
        match: A part of the error's message.
    """

    words: str
    error: type[Exception] | None = None
    match: str = ""


class Machinery(NamedTuple):
    """A column.

    Attributes:
        run: Trains a row's loss of one of the kinds, in a folder of its own.
        tolerance: How far Uniform may be from plain, relative. In half precision it is that of a number, and the first
            loss may be off by that of the largest logit; training adds up what is rounded.
        beside: In half precision, the same in full: Uniform may be twice as far from plain as that is (what is rounded
            in the model), and the tolerance of the largest logit (what is rounded in the loss).
    """

    run: Callable[[Any, str, Path], Run]
    tolerance: float = EXACT
    beside: Callable[[Any, str, Path], Run] | None = None


def plugged(loss: nn.Module, kind: str) -> nn.Module:
    """A host's loss as it is, or as `undimix()` gives it back."""
    return loss if kind == "plain" else undimix(loss, Uniform() if kind == "uniform" else None)


def vector_of(model: nn.Module) -> Tensor:
    """All parameters."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def apart(one: Tensor, other: Tensor) -> float:
    """How far one is from the other, relative to that."""
    assert one.shape == other.shape
    return float(torch.linalg.vector_norm(one.double() - other.double()) / torch.linalg.vector_norm(other.double()))


def check(machinery: Machinery, row: Any, root: Path, lack: Lack | None) -> Run | None:
    """Asserts that plain and Uniform train alike and UnDiMix otherwise; or that all lack what the host lacks.

    Returns:
        The run with UnDiMix, where there is one.
    """
    runs: dict[str, Run] = {}
    for kind in KINDS:
        folder = root / kind
        folder.mkdir()
        if lack is not None and lack.error is not None:
            refusal = _refusal(lambda folder=folder, kind=kind: machinery.run(row, kind, folder), lack.error)
            assert lack.match in refusal, f"{kind}: {refusal}"
            continue
        runs[kind] = machinery.run(row, kind, folder)
    if not runs:
        return None
    plain, uniform, weighted = runs.values()
    tolerances = {"losses": machinery.tolerance, "moved": machinery.tolerance}
    if machinery.beside is not None:
        (root / "full").mkdir()
        full, rounded = machinery.beside(row, "plain", root / "full"), machinery.tolerance * row.logits
        first = abs(float(uniform.losses.flatten()[0] - plain.losses.flatten()[0]))
        assert first <= rounded, f"first loss: Uniform is {first:.1e} from plain, expected {rounded:.1e} at most"
        tolerances = {part: 2 * apart(getattr(full, part), getattr(plain, part)) + rounded for part in tolerances}
    for part, tolerance in tolerances.items():
        of_plain, of_uniform, of_weighted = (getattr(run, part) for run in (plain, uniform, weighted))
        same, other = apart(of_uniform, of_plain), apart(of_weighted, of_plain)
        assert same <= tolerance, f"{part}: Uniform is {same:.1e} from plain, expected {tolerance:.1e} at most"
        assert of_weighted.isfinite().all(), part
        assert other > max(2 * same, 1e-3), f"{part}: UnDiMix is {other:.1e} from plain"
    for kind, run in runs.items():
        assert run.kept == (lack is None), f"{kind}: expected kept={lack is None}"
        allowed = max(1, plain.breaks or 0)  # one is deliberate: what is not yet known has to be looked at
        assert (run.breaks or 0) <= allowed, f"{kind}: {run.breaks} graph breaks, plain has {plain.breaks}"
    return weighted


def _refusal(run: Callable[[], Run], error: type[Exception]) -> str:
    with pytest.raises(error) as came:
        run()
    assert came.type is error
    return str(came.value)


def cells(
    rows: Mapping[str, Any], columns: Mapping[str, Any], every: bool, left_out: Iterable[str] = ()
) -> list[tuple[str, str]]:
    """All cells, or a few that have each row and each column (but those left out): the diagonal, again and again."""
    if every:
        return [(row, column) for row in rows for column in columns]
    columns = [column for column in columns if column not in left_out]
    return list(islice(zip(cycle(rows), cycle(columns), strict=False), max(len(rows), len(columns))))


# --- processes of their own


def processes() -> Any:
    """Where they are started from: a server that has imported the toolkits, so that a start takes no seconds."""
    context = multiprocessing.get_context("forkserver")
    toolkits = [
        *("lightly", "open_clip", "pyg", "pytorch_metric_learning", "sentence_transformers", "stable_pretraining"),
        "transformers",
    ]
    context.set_forkserver_preload([f"integration_tests.matrix.{toolkit}_cells" for toolkit in toolkits])
    return context


def in_processes(work: Callable[..., Any], *arguments: tuple[Any, ...], killed: bool = False) -> None:
    """Does work in a process for each tuple of arguments; all have to end as expected. Raises the first error."""
    errors = processes().SimpleQueue()
    started = [processes().Process(target=_alone, args=(errors, work, *given)) for given in arguments]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if not errors.empty():
        raise errors.get()
    assert {process.exitcode for process in started} == {-signal.SIGKILL if killed else 0}


def in_a_process(work: Callable[..., Any], *arguments: Any, killed: bool = False) -> None:
    """Does work in a process of its own, which has to end as expected."""
    in_processes(work, arguments, killed=killed)


def _alone(errors: Any, work: Callable[..., Any], *arguments: Any) -> None:
    torch.set_num_threads(1)
    try:
        work(*arguments)
    except Exception as error:
        traceback.print_exc()
        errors.put(error)


def kill() -> None:
    """Ends this process as the system does that is out of memory: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)
