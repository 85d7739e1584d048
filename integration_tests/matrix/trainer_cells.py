"""The machinery that transformers' and sentence-transformers' Trainers have in common."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import Trainer, TrainerCallback

from integration_tests.matrix.cells import BF16, FP16, Machinery, Run, in_a_process, in_processes, kill, vector_of
from undimix_plugins import UnDiMix, Uniform

STEPS, MIDDLE = 4, 2
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "max_steps": STEPS,
    "learning_rate": 0.05,
    "max_grad_norm": 0.0,  # which would hide a factor
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
SAVING = {"save_strategy": "steps", "save_steps": MIDDLE}


@contextmanager
def in_double() -> Iterator[None]:
    """What a Trainer loads from a checkpoint is else in float32, but for transformers' models."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Recording(Trainer):
    """Keeps each step's loss, of which the log has four digits."""

    def training_step(self, *arguments: Any, **further: Any) -> Tensor:
        loss: Tensor = super().training_step(*arguments, **further)
        vars(self).setdefault("seen", []).append(loss.detach().clone())
        return loss


class Toolkit(NamedTuple):
    """What differs between the two.

    Attributes:
        module: Where it is found, as `TOOLKIT`.
        rows: Its losses.
        make: From a row, a kind, a dropout and whether to gather, to a model in float64 and its loss.
        trainer: From a row, a model, its loss, a folder and settings, to a Trainer that records.
        step: From a row, a model and its loss, to the loss of a batch, for a loop of one's own.
        saved: From a Trainer and a folder, to what the host writes down of the loss there.
    """

    module: str
    rows: dict[str, Any]
    make: Callable[..., tuple[nn.Module, Any]]
    trainer: Callable[..., Trainer]
    step: Callable[..., Tensor]
    saved: Callable[..., Any]


def run_of(trainer: Any, model: nn.Module, start: Tensor, **further: Any) -> Run:
    return Run(torch.stack(trainer.seen), vector_of(model) - start, **further)


def train(toolkit: Toolkit, row: Any, model: nn.Module, loss: Any, root: Path, **settings: Any) -> Trainer:
    resume = settings.pop("resume", None)
    trainer = toolkit.trainer(row, model, loss, root, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trained(
    toolkit: Toolkit, row: Any, kind: str, root: Path, dtype: torch.dtype = torch.float64, **settings: Any
) -> Run:
    model, loss = toolkit.make(row, kind)
    model.to(dtype)
    start = vector_of(model)
    return run_of(train(toolkit, row, model, loss, root, **settings), model, start)


def fp16(toolkit: Toolkit, row: Any, kind: str, root: Path) -> Run:
    """The Trainers leave it out on a CPU: a loop of one's own."""
    model, loss = toolkit.make(row, kind)
    model.float()
    assert not toolkit.trainer(row, model, loss, root, fp16=True).accelerator.native_amp
    return looped(toolkit, row, model, loss, torch.amp.GradScaler("cpu", 2.0**10))


def looped(toolkit: Toolkit, row: Any, model: nn.Module, loss: Any, scaler: torch.amp.GradScaler | None) -> Run:
    optimizer, start, losses = torch.optim.SGD(model.parameters(), lr=0.05), vector_of(model), []
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16, enabled=scaler is not None):
            value = toolkit.step(row, model, loss)
        losses.append(value.detach())
        if scaler is None:
            value.backward()
            optimizer.step()
            continue
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**10  # no step is left out
    return Run(torch.stack(losses), vector_of(model) - start)


def single_loop(toolkit: Toolkit, row: Any, kind: str, root: Path) -> Run:
    model, loss = toolkit.make(row, kind)
    return looped(toolkit, row, model.float(), loss, None)


# What of a row's model and loss is compiled, and what the host raises where both are.
BOTH, LOSS, MODEL = "both", "loss", "model"
REFUSED = {
    LOSS: (AssertionError, "is already tracked for mutation"),
    MODEL: (RuntimeError, "backward through the graph a second time"),
}


def compiled(toolkit: Toolkit, row: Any, kind: str, root: Path) -> Run:
    """The model as the Trainer compiles it, and the loss; or what the host lets compile of the two."""
    if row.compiles != BOTH and kind == "plain":
        error, match = REFUSED[row.compiles]
        with pytest.raises(error, match=match):
            train_compiled(toolkit, row, kind, root, BOTH)
    return train_compiled(toolkit, row, kind, root, row.compiles)


def train_compiled(toolkit: Toolkit, row: Any, kind: str, root: Path, what: str) -> Run:
    torch._dynamo.reset()
    counters["graph_break"].clear()
    model, loss = toolkit.make(row, kind)
    start = vector_of(model)
    if what != MODEL and loss is not None:
        loss.compile(backend="aot_eager")
    settings = {} if what == LOSS else {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer = train(toolkit, row, model, loss, root, max_steps=MIDDLE, **settings)
    return run_of(trainer, model, start, breaks=sum(counters["graph_break"].values()))


def copied(toolkit: Toolkit, copies: Callable[[Any], Any], row: Any, kind: str, root: Path) -> Run:
    """Model and loss, together, between two trainings."""
    pair = toolkit.make(row, kind)
    start = vector_of(pair[0])
    train(toolkit, row, *pair, root, max_steps=MIDDLE)
    other = copies(pair)
    assert other[0] is not pair[0]
    trainers = [train(toolkit, row, *one, root, max_steps=MIDDLE) for one in (pair, other)]
    return run_of(trainers[1], other[0], start, kept=torch.equal(vector_of(pair[0]), vector_of(other[0])))


def pickled(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


def settings_saved(toolkit: Toolkit, row: Any, kind: str, root: Path) -> Run:
    """What the host writes of the plain loss, and the weighting where it writes the loss's settings."""
    written = []
    for one in ("plain", kind):
        model, loss = toolkit.make(row, one)
        start = vector_of(model)
        trainer = train(toolkit, row, model, loss, root)
        trainer.save_model(str(root / "saved"))
        args = torch.load(root / "saved" / "training_args.bin", weights_only=False)
        assert args.to_json_string() == trainer.args.to_json_string()
        settings = {**args.to_dict(), "logging_dir": ""}  # whose name has the time
        written.append({**toolkit.saved(trainer, root / "saved"), "args": str(settings)})
    of_plain, of_kind = written
    told, weighting = of_kind.pop("weighting", None), repr(UnDiMix() if kind == "undimix" else Uniform())
    for name, value in of_kind.items():  # of a loss inside another, the card has its settings in a row
        if isinstance(value, str) and value != of_plain[name]:
            of_kind[name], told = value.replace(f", weighting={weighting!r}", ""), weighting
    assert of_kind == of_plain
    tells = kind != "plain" and re.search(r"\b(scale|temperature)\b", str(of_plain)) is not None
    assert told == (weighting if tells else None)
    return run_of(trainer, model, start)


def states(toolkit: Toolkit, row: Any, kind: str, root: Path) -> Run:
    """Plain states of model and loss into weighted ones and back, strictly; training goes on."""
    plain, ours = toolkit.make(row, "plain"), toolkit.make(row, kind)
    start = vector_of(ours[0])
    train(toolkit, row, *plain, root, max_steps=MIDDLE)
    for one, other in ((plain, ours), (ours, plain)):
        for of_one, of_other in zip(one, other, strict=True):
            if of_one is not None and of_other is not None:
                assert list(of_one.state_dict()) == list(of_other.state_dict())
                of_other.load_state_dict(of_one.state_dict(), strict=True)
        assert torch.equal(vector_of(one[0]), vector_of(other[0]))
        if one is plain:
            trainer = train(toolkit, row, *ours, root, max_steps=MIDDLE)
    return run_of(trainer, ours[0], start)


def resumed(toolkit: Toolkit, row: Any, kind: str, root: Path) -> Run:
    """With dropout, whose random state is in the checkpoint."""
    (model, loss), whole = toolkit.make(row, kind, dropout=0.1), toolkit.make(row, kind, dropout=0.1)
    start = vector_of(model)
    train(toolkit, row, *whole, root, **SAVING)
    with in_double():
        again = train(toolkit, row, model, loss, root, **SAVING, resume=str(root / f"checkpoint-{MIDDLE}"))
    assert len(again.seen) == STEPS - MIDDLE
    return run_of(again, model, start, kept=torch.equal(vector_of(model), vector_of(whole[0])))


class Killer(TrainerCallback):
    """Ends the process at the step after the checkpoint."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == MIDDLE + 1:
            kill()


def train_alone(module: str, name: str, kind: str, root: Path, folder: str, killed: bool, resume: bool) -> None:
    toolkit: Toolkit = importlib.import_module(module).TOOLKIT
    row = toolkit.rows[name]
    model, loss = toolkit.make(row, kind, dropout=0.1)
    start = vector_of(model)
    callbacks = [Killer()] if killed else []
    with in_double():
        trainer = train(toolkit, row, model, loss, root / folder, callbacks=callbacks, resume=resume, **SAVING)
    torch.save(tuple(run_of(trainer, model, start)), root / f"{folder}.pt")


def name_of(toolkit: Toolkit, row: Any) -> str:
    return next(name for name in toolkit.rows if toolkit.rows[name] is row)


def killed(toolkit: Toolkit, row: Any, kind: str, root: Path) -> Run:
    """A process that is killed, one that goes on from its checkpoint, and one that was let be."""
    given = toolkit.module, name_of(toolkit, row), kind, root
    in_a_process(train_alone, *given, "killed", True, False, killed=True)
    assert not (root / "killed.pt").exists()
    in_a_process(train_alone, *given, "killed", False, True)
    in_a_process(train_alone, *given, "whole", False, False)
    again, whole = (Run(*torch.load(root / f"{folder}.pt")) for folder in ("killed", "whole"))
    same = torch.equal(again.moved, whole.moved) and torch.equal(again.losses, whole.losses[MIDDLE:])
    return again._replace(kept=same)


def train_on_a_rank(module: str, name: str, kind: str, root: Path, port: int, rank: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    toolkit: Toolkit = importlib.import_module(module).TOOLKIT
    row = toolkit.rows[name]
    model, loss = toolkit.make(row, kind, gather=True)
    start = vector_of(model)
    trainer = train(toolkit, row, model, loss, root)
    torch.save(tuple(run_of(trainer, model, start)), root / f"{rank}.pt")
    dist.destroy_process_group()


def distributed(toolkit: Toolkit, row: Any, kind: str, root: Path) -> Run:
    """Two processes of the Trainer, negatives of both where the host gathers them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    given = toolkit.module, name_of(toolkit, row), kind, root, port
    in_processes(train_on_a_rank, *((*given, rank) for rank in range(2)))
    runs = [Run(*torch.load(root / f"{rank}.pt")) for rank in range(2)]
    assert torch.equal(runs[0].moved, runs[1].moved)
    assert not torch.equal(runs[0].losses, runs[1].losses)  # each has a batch of its own
    return runs[0]


def machinery(toolkit: Toolkit) -> dict[str, Machinery]:
    def column(run: Callable[..., Run], *given: Any, **settings: Any) -> Callable[[Any, str, Path], Run]:
        return partial(run, toolkit, *given, **settings)

    single = {"dtype": torch.float32, "max_steps": 3}
    return {
        "bf16": Machinery(column(trained, **single, bf16=True), BF16, beside=column(trained, **single)),
        "fp16": Machinery(column(fp16), FP16, beside=column(single_loop)),
        "accumulation": Machinery(column(trained, gradient_accumulation_steps=2, max_steps=MIDDLE)),
        "checkpointing": Machinery(column(trained, gradient_checkpointing=True)),
        "compile": Machinery(column(compiled)),
        "pickle": Machinery(column(copied, pickled)),
        "deepcopy": Machinery(column(copied, copy.deepcopy)),
        "settings saved": Machinery(column(settings_saved)),
        "state_dict": Machinery(column(states)),
        "resume": Machinery(column(resumed)),
        "SIGKILL": Machinery(column(killed)),
        "DDP": Machinery(column(distributed)),
    }
