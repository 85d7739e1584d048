"""This package's losses for PyG in a plain loop, on real graphs; their control is the published loss."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch_geometric import seed_everything
from torch_geometric.datasets import KarateClub
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCN, GIN

from integration_tests.matrix.cells import (
    BF16,
    FP16,
    LOGITS,
    TEMPERATURE,
    Lack,
    Machinery,
    Run,
    in_a_process,
    in_processes,
    kill,
    plugged,
    vector_of,
)
from integration_tests.matrix.plain_losses import PlainGRACE, PlainGraphCL, PlainInfoGraph
from integration_tests.molecules import mutag
from undimix_plugins import Uniform
from undimix_pyg import GRACE, GRACELoss, GraphCL, GraphCLLoss, InfoGraph, InfoGraphLoss

WIDTH = 16
EPOCHS, BATCHES = 2, 3


class Row(NamedTuple):
    """The published loss, ours, and a model and data for them."""

    plain: Callable[[float], nn.Module]
    ours: Callable[..., nn.Module]
    model: Callable[[], nn.Module]
    graphs: Callable[[], list[Any]]
    logits: float = LOGITS


@cache
def molecules() -> list[Any]:
    return list(mutag()[: 16 * BATCHES])


@cache
def club() -> list[Any]:
    return [KarateClub()[0]] * BATCHES


def gin() -> GIN:
    return GIN(7, WIDTH, num_layers=2, norm="batch_norm")


def grace() -> GRACE:
    model = GRACE(GCN(34, WIDTH, num_layers=2), WIDTH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # the projections of an untrained model are all but one point
    return model


ROWS = {
    "GraphCLLoss": Row(PlainGraphCL, GraphCLLoss, lambda: GraphCL(gin(), WIDTH), molecules),
    "InfoGraphLoss": Row(PlainInfoGraph, InfoGraphLoss, lambda: InfoGraph(gin(), WIDTH), molecules),
    "GRACELoss": Row(PlainGRACE, GRACELoss, grace, club),
}


class Training:
    """A model, its loss and an optimiser, as a script holds them."""

    def __init__(self, row: Row, kind: str, dtype: torch.dtype = torch.float64) -> None:
        seed_everything(0)
        self.model = row.model().to(dtype)
        ours = row.ours(TEMPERATURE, weighting=Uniform())
        self.loss = row.plain(TEMPERATURE) if kind == "plain" else plugged(ours, kind)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.graphs = [graph.clone().update({"x": graph.x.to(dtype)}) for graph in row.graphs()]
        self.start = vector_of(self.model)
        self.losses: list[Tensor] = []

    def batches(self, epoch: int) -> list[Any]:
        seed_everything(epoch)
        return list(DataLoader(self.graphs, batch_size=len(self.graphs) // BATCHES, shuffle=True))

    def value(self, batch: Any) -> Tensor:
        loss: Tensor = self.loss(*self.model(batch))
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


def single(row: Row, kind: str, root: Path) -> Run:
    training = Training(row, kind, torch.float32)
    training.train(range(1))
    return training.run()


def bf16(row: Row, kind: str, root: Path) -> Run:
    training = Training(row, kind, torch.float32)

    def value(batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return training.value(batch)

    training.train(range(1), value=value)
    return training.run()


def fp16(row: Row, kind: str, root: Path) -> Run:
    training, scaler = Training(row, kind, torch.float32), torch.amp.GradScaler("cpu", 2.0**10)
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


def accumulation(row: Row, kind: str, root: Path) -> Run:
    training = Training(row, kind)
    training.train(every=3)
    return training.run()


def checkpointing(row: Row, kind: str, root: Path) -> Run:
    """The random views too are drawn again in the backward pass."""
    training = Training(row, kind)
    training.train(value=lambda batch: training.loss(*checkpoint(training.model, batch, use_reentrant=False)))
    return training.run()


def compiled(row: Row, kind: str, root: Path) -> Run:
    """The encoder, and the loss; augmentations draw graphs of many sizes."""
    torch._dynamo.reset()
    training = Training(row, kind)
    given = training.model(training.batches(0)[0])
    reasons = torch._dynamo.explain(training.loss)(*given).break_reasons
    breaks = len({(reason.user_stack[-1].filename, reason.user_stack[-1].lineno) for reason in reasons})
    training = Training(row, kind)
    training.model.encoder.compile(backend="aot_eager", dynamic=True)
    training.loss.compile(backend="aot_eager", dynamic=True)
    training.train(range(1))
    return training.run(breaks=breaks)


def copied(copies: Callable[[Any], Any], row: Row, kind: str, root: Path) -> Run:
    training = Training(row, kind)
    training.train(range(1))
    other = copies(training)
    training.train(range(1, 2))
    other.train(range(1, 2))
    return other.run(kept=torch.equal(other.run().moved, training.run().moved))


def pickled(training: Training) -> Training:
    again: Training = pickle.loads(pickle.dumps(training))
    return again


def states(row: Row, kind: str, root: Path) -> Run:
    """Plain states into weighted ones and back, strictly; training goes on."""
    plain, ours = Training(row, "plain"), Training(row, kind)
    plain.train(range(1))
    assert list(ours.loss.state_dict()) == list(plain.loss.state_dict())
    plain.save(root / "plain.pt")
    ours.load(root / "plain.pt")
    ours.train(range(1, 2))
    ours.save(root / "ours.pt")
    plain.load(root / "ours.pt")
    assert torch.equal(vector_of(plain.model), vector_of(ours.model))
    return ours.run()


def resumed(row: Row, kind: str, root: Path) -> Run:
    whole, training, again = (Training(row, kind) for _ in range(3))
    whole.train()
    training.train(range(1))
    training.save(root / "middle.pt")
    again.load(root / "middle.pt")
    again.train(range(1, 2))
    return again.run(kept=torch.equal(again.run().moved, whole.run().moved))


def train_alone(name: str, kind: str, root: Path, folder: str, killed: bool, resume: bool) -> None:
    training, file = Training(ROWS[name], kind), root / f"{folder}.ckpt"
    if resume:
        training.load(file)
    for epoch in range(1 if resume else 0, EPOCHS):
        if killed and epoch:
            training.value(training.batches(epoch)[0]).backward()
            kill()
        training.train(range(epoch, epoch + 1))
        training.save(file)
    torch.save(tuple(training.run()), root / f"{folder}.pt")


def name_of(row: Row) -> str:
    return next(name for name in ROWS if ROWS[name] is row)


def killed(row: Row, kind: str, root: Path) -> Run:
    """A process that is killed, one that goes on from its checkpoint, and one that was let be."""
    given = name_of(row), kind, root
    in_a_process(train_alone, *given, "killed", True, False, killed=True)
    assert not (root / "killed.pt").exists()
    in_a_process(train_alone, *given, "killed", False, True)
    in_a_process(train_alone, *given, "whole", False, False)
    again, whole = (Run(*torch.load(root / f"{folder}.pt")) for folder in ("killed", "whole"))
    same = torch.equal(again.moved, whole.moved) and torch.equal(again.losses, whole.losses[BATCHES:])
    return again._replace(kept=same)


def train_on_a_rank(name: str, kind: str, root: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root}/init", rank=rank, world_size=2)
    training = Training(ROWS[name], kind)
    module = DistributedDataParallel(training.model)
    training.graphs = training.graphs[:: -1 if rank else 1]
    training.train(value=lambda batch: training.loss(*module(batch)))
    torch.save(tuple(training.run()), root / f"{rank}.pt")
    dist.destroy_process_group()


def distributed(row: Row, kind: str, root: Path) -> Run:
    """Negatives are a process's own."""
    in_processes(train_on_a_rank, *((name_of(row), kind, root, rank) for rank in range(2)))
    runs = [Run(*torch.load(root / f"{rank}.pt")) for rank in range(2)]
    assert torch.equal(runs[0].moved, runs[1].moved)
    return runs[0]


MACHINERY = {
    "bf16": Machinery(bf16, BF16, beside=single),
    "fp16": Machinery(fp16, FP16, beside=single),
    "accumulation": Machinery(accumulation),
    "checkpointing": Machinery(checkpointing),
    "compile": Machinery(compiled),
    "pickle": Machinery(partial(copied, pickled)),
    "deepcopy": Machinery(partial(copied, copy.deepcopy)),
    "state_dict": Machinery(states),
    "resume": Machinery(resumed),
    "SIGKILL": Machinery(killed),
    "DDP": Machinery(distributed),
}
LACKS: dict[tuple[str, str], Lack] = {}
NOTES: dict[tuple[str, str], str] = {}
