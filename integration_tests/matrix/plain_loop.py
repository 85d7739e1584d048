"""Machinery of a loop that a script writes itself, for toolkits that have no trainer of their own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from integration_tests.matrix.cells import (
    BF16,
    FP16,
    Machinery,
    Run,
    in_a_process,
    in_processes,
    kill,
    vector_of,
)

EPOCHS, BATCHES = 2, 3


class Training:
    """A model, its loss and an optimiser, as a script holds them. A toolkit's subclass makes them and the batches.

    Attributes:
        rows: The losses of the toolkit, by name.
        model: Made from a seed.
        loss: Plain, with `Uniform()` or with `UnDiMix()`.
    """

    rows: ClassVar[Mapping[str, Any]]
    model: nn.Module
    loss: nn.Module

    def __init__(self, row: Any, kind: str, dtype: torch.dtype = torch.float64) -> None:
        self.make(row, kind, dtype)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.start = vector_of(self.model)
        self.losses: list[Tensor] = []

    def make(self, row: Any, kind: str, dtype: torch.dtype) -> None:
        """Sets the model, the loss and what the batches are made of."""
        raise NotImplementedError

    def batches(self, epoch: int) -> list[Any]:
        """The batches of an epoch, always the same, and a seed for what is drawn in it."""
        raise NotImplementedError

    def given(self, batch: Any, model: Callable[..., Any]) -> tuple[Any, ...]:
        """The arguments of the loss."""
        raise NotImplementedError

    def compile(self, **settings: Any) -> None:
        """Compiles the model, or a part of it, and the loss."""
        self.model.compile(**settings)
        self.loss.compile(**settings)

    def be_rank(self, rank: int) -> None:
        """Trains on as one of two processes, with data of its own."""
        raise NotImplementedError

    def value(self, batch: Any, model: Callable[..., Any] | None = None) -> Tensor:
        loss: Tensor = self.loss(*self.given(batch, model or self.model))
        return loss

    def train(self, epochs: Any = range(EPOCHS), every: int = 1, value: Callable[[Any], Tensor] | None = None) -> None:
        """An optimiser's step after every so many batches."""
        for epoch in epochs:
            for number, batch in enumerate(self.batches(epoch)):
                loss = (value or self.value)(batch)
                (loss / every).backward()
                self.losses.append(loss.detach())
                if (number + 1) % every == 0:
                    self.optimizer.step()
                    self.optimizer.zero_grad()

    def save(self, file: Path) -> None:
        parts = self.model, self.loss, self.optimizer
        torch.save([part.state_dict() for part in parts], file)

    def load(self, file: Path) -> None:
        parts = self.model, self.loss, self.optimizer
        for part, state in zip(parts, torch.load(file), strict=True):
            part.load_state_dict(state)

    def run(self, **further: Any) -> Run:
        return Run(torch.stack(self.losses), vector_of(self.model) - self.start, **further)


Cls = type[Training]


def single(cls: Cls, row: Any, kind: str, root: Path) -> Run:
    training = cls(row, kind, torch.float32)
    training.train(range(1))
    return training.run()


def bf16(cls: Cls, row: Any, kind: str, root: Path) -> Run:
    training = cls(row, kind, torch.float32)

    def value(batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return training.value(batch)

    training.train(range(1), value=value)
    return training.run()


def fp16(cls: Cls, row: Any, kind: str, root: Path) -> Run:
    training, scaler = cls(row, kind, torch.float32), torch.amp.GradScaler("cpu", 2.0**10)
    for batch in training.batches(0):
        training.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = training.value(batch)
        scaler.scale(loss).backward()
        scaler.step(training.optimizer)
        scaler.update()
        training.losses.append(loss.detach())
    assert scaler.get_scale() == 2.0**10  # no step was left out
    return training.run()


def accumulation(cls: Cls, row: Any, kind: str, root: Path) -> Run:
    training = cls(row, kind)
    training.train(every=3)
    return training.run()


def checkpointing(cls: Cls, row: Any, kind: str, root: Path) -> Run:
    """Random views, if any, are drawn again in the backward pass."""
    training = cls(row, kind)
    training.train(value=lambda batch: training.value(batch, partial(checkpoint, training.model, use_reentrant=False)))
    return training.run()


def compiled(cls: Cls, row: Any, kind: str, root: Path) -> Run:
    """The model, and the loss."""
    torch._dynamo.reset()
    training = cls(row, kind)
    given = training.given(training.batches(0)[0], training.model)
    reasons = torch._dynamo.explain(training.loss)(*given).break_reasons
    breaks = len({(reason.user_stack[-1].filename, reason.user_stack[-1].lineno) for reason in reasons})
    training = cls(row, kind)
    training.compile(backend="aot_eager", dynamic=True)
    training.train(range(1))
    return training.run(breaks=breaks)


def copied(copies: Callable[[Any], Any], cls: Cls, row: Any, kind: str, root: Path) -> Run:
    training = cls(row, kind)
    training.train(range(1))
    other = copies(training)
    training.train(range(1, 2))
    other.train(range(1, 2))
    return other.run(kept=torch.equal(other.run().moved, training.run().moved))


def pickled(training: Training) -> Training:
    again: Training = pickle.loads(pickle.dumps(training))
    return again


def states(cls: Cls, row: Any, kind: str, root: Path) -> Run:
    """Plain states into weighted ones and back, strictly; training goes on."""
    plain, ours = cls(row, "plain"), cls(row, kind)
    plain.train(range(1))
    assert list(ours.loss.state_dict()) == list(plain.loss.state_dict())
    plain.save(root / "plain.pt")
    ours.load(root / "plain.pt")
    ours.train(range(1, 2))
    ours.save(root / "ours.pt")
    plain.load(root / "ours.pt")
    assert torch.equal(vector_of(plain.model), vector_of(ours.model))
    return ours.run()


def resumed(cls: Cls, row: Any, kind: str, root: Path) -> Run:
    whole, training, again = (cls(row, kind) for _ in range(3))
    whole.train()
    training.train(range(1))
    training.save(root / "middle.pt")
    again.load(root / "middle.pt")
    again.train(range(1, 2))
    return again.run(kept=torch.equal(again.run().moved, whole.run().moved))


def train_alone(cls: Cls, name: str, kind: str, root: Path, folder: str, killed: bool, resume: bool) -> None:
    training, file = cls(cls.rows[name], kind), root / f"{folder}.ckpt"
    if resume:
        training.load(file)
    for epoch in range(1 if resume else 0, EPOCHS):
        if killed and epoch:
            training.value(training.batches(epoch)[0]).backward()
            kill()
        training.train(range(epoch, epoch + 1))
        training.save(file)
    torch.save(tuple(training.run()), root / f"{folder}.pt")


def name_of(cls: Cls, row: Any) -> str:
    return next(name for name in cls.rows if cls.rows[name] is row)


def killed(cls: Cls, row: Any, kind: str, root: Path) -> Run:
    """A process that is killed, one that goes on from its checkpoint, and one that was let be."""
    given = cls, name_of(cls, row), kind, root
    in_a_process(train_alone, *given, "killed", True, False, killed=True)
    assert not (root / "killed.pt").exists()
    in_a_process(train_alone, *given, "killed", False, True)
    in_a_process(train_alone, *given, "whole", False, False)
    again, whole = (Run(*torch.load(root / f"{folder}.pt")) for folder in ("killed", "whole"))
    same = torch.equal(again.moved, whole.moved) and torch.equal(again.losses, whole.losses[BATCHES:])
    return again._replace(kept=same)


def train_on_a_rank(cls: Cls, name: str, kind: str, root: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root}/init", rank=rank, world_size=2)
    training = cls(cls.rows[name], kind)
    module = DistributedDataParallel(training.model)
    training.be_rank(rank)
    training.train(value=lambda batch: training.value(batch, module))
    torch.save(tuple(training.run()), root / f"{rank}.pt")
    dist.destroy_process_group()


def distributed(cls: Cls, row: Any, kind: str, root: Path) -> Run:
    in_processes(train_on_a_rank, *((cls, name_of(cls, row), kind, root, rank) for rank in range(2)))
    runs = [Run(*torch.load(root / f"{rank}.pt")) for rank in range(2)]
    assert torch.equal(runs[0].moved, runs[1].moved)
    return runs[0]


def machinery(cls: Cls) -> dict[str, Machinery]:
    """The columns of a toolkit."""
    beside = partial(single, cls)
    return {
        "bf16": Machinery(partial(bf16, cls), BF16, beside=beside),
        "fp16": Machinery(partial(fp16, cls), FP16, beside=beside),
        "accumulation": Machinery(partial(accumulation, cls)),
        "checkpointing": Machinery(partial(checkpointing, cls)),
        "compile": Machinery(partial(compiled, cls)),
        "pickle": Machinery(partial(copied, pickled, cls)),
        "deepcopy": Machinery(partial(copied, copy.deepcopy, cls)),
        "state_dict": Machinery(partial(states, cls)),
        "resume": Machinery(partial(resumed, cls)),
        "SIGKILL": Machinery(partial(killed, cls)),
        "DDP": Machinery(partial(distributed, cls)),
    }
