"""stable-pretraining's losses in a plain loop, on real digits; its own module and callbacks have tests of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from stable_pretraining.losses import CLIPLoss, NTXEntLoss
from stable_pretraining.losses.joint_embedding import InfoNCELoss
from torch import nn

from integration_tests.matrix import plain_loop
from integration_tests.matrix.cells import LOGITS, TEMPERATURE, Lack, plugged
from integration_tests.matrix.plain_loop import BATCHES

BATCH, WIDTH = 24, 16


class Row(NamedTuple):
    """A loss."""

    make: Callable[[], nn.Module]
    logits: float = LOGITS


ROWS = {
    "NTXEntLoss": Row(lambda: NTXEntLoss(TEMPERATURE)),
    "CLIPLoss": Row(lambda: CLIPLoss(TEMPERATURE)),
    "InfoNCELoss": Row(lambda: InfoNCELoss(TEMPERATURE)),
}


class Training(plain_loop.Training):
    rows = ROWS

    def make(self, row: Row, kind: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, WIDTH)).to(dtype)
        self.loss = plugged(row.make(), kind)
        self.images = torch.tensor(load_digits().data[: BATCH * BATCHES] / 16, dtype=dtype)

    def batches(self, epoch: int) -> list[Any]:
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(epoch))
        return [self.images[rows] for rows in order.chunk(BATCHES)]

    def given(self, batch: Any, model: Callable[..., Any]) -> tuple[Any, ...]:
        views = model(batch), model(batch.roll(1, dims=1))
        # The other two are kinds of InfoNCELoss, which know their targets.
        return views if isinstance(self.loss, (NTXEntLoss, CLIPLoss)) else (*views, torch.arange(len(batch)))

    def be_rank(self, rank: int) -> None:
        """Views of both processes are compared, but by InfoNCELoss, which gathers nothing."""
        self.images = self.images[rank::2]


MACHINERY = plain_loop.machinery(Training)
LACKS: dict[tuple[str, str], Lack] = {}
NOTES: dict[tuple[str, str], str] = {}
