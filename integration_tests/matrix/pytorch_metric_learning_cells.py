"""pytorch-metric-learning's losses in a plain loop, as its manual has it, on real digits with their labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from sklearn.datasets import load_digits
from torch import nn

from integration_tests.matrix import plain_loop
from integration_tests.matrix.cells import LOGITS, TEMPERATURE, Lack, plugged
from integration_tests.matrix.plain_loop import BATCHES

BATCH, WIDTH = 24, 16


class Row(NamedTuple):
    """A loss, or one around it, and the miner of its pairs."""

    make: Callable[[], nn.Module]
    miner: Callable[[], nn.Module] | None = None
    logits: float = LOGITS


ROWS = {
    "NTXentLoss": Row(lambda: losses.NTXentLoss(TEMPERATURE)),
    "NTXentLoss, mined pairs": Row(lambda: losses.NTXentLoss(TEMPERATURE), miners.MultiSimilarityMiner),
    "NTXentLoss, triplets": Row(
        lambda: losses.NTXentLoss(TEMPERATURE), lambda: miners.TripletMarginMiner(type_of_triplets="semihard")
    ),
    "SupConLoss": Row(lambda: losses.SupConLoss(TEMPERATURE)),
    "CrossBatchMemory": Row(lambda: losses.CrossBatchMemory(losses.NTXentLoss(TEMPERATURE), WIDTH, 2 * BATCH)),
    "SelfSupervisedLoss": Row(lambda: losses.SelfSupervisedLoss(losses.NTXentLoss(TEMPERATURE))),
}


class Training(plain_loop.Training):
    rows = ROWS

    def make(self, row: Row, kind: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, WIDTH)).to(dtype)
        self.loss = plugged(row.make(), kind)
        self.miner = row.miner() if row.miner else None
        data = load_digits()
        self.images = torch.tensor(data.data[: BATCH * BATCHES] / 16, dtype=dtype)
        self.labels = torch.tensor(data.target[: BATCH * BATCHES])

    def batches(self, epoch: int) -> list[Any]:
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(epoch))
        return [(self.images[rows], self.labels[rows]) for rows in order.chunk(BATCHES)]

    def given(self, batch: Any, model: Callable[..., Any]) -> tuple[Any, ...]:
        images, labels = batch
        embeddings = model(images)
        if isinstance(self.loss, losses.SelfSupervisedLoss):
            return embeddings, model(images.roll(1, dims=1))
        # Pairs of like images: of embeddings, rounding would now and then choose other pairs.
        return (embeddings, labels) if self.miner is None else (embeddings, labels, self.miner(images, labels))

    def be_rank(self, rank: int) -> None:
        """Embeddings and labels of both processes are compared."""
        self.images, self.labels = self.images[rank::2], self.labels[rank::2]
        if not isinstance(self.loss, losses.SelfSupervisedLoss):
            self.loss = DistributedLossWrapper(self.loss)


MACHINERY = plain_loop.machinery(Training)
NO_PLACE = Lack("the toolkit's checkpoint does not hold how full the memory is, and where the next rows go")
LACKS: dict[tuple[str, str], Lack] = {
    ("CrossBatchMemory", "resume"): NO_PLACE,
    ("CrossBatchMemory", "SIGKILL"): NO_PLACE,
}
OUTSIDE = "the model is compiled, the loss runs outside of the graph: it depends on the labels how many pairs there are"
NOTES: dict[tuple[str, str], str] = {(row, "compile"): OUTSIDE for row in ROWS}
