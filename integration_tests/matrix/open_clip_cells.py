"""open_clip's losses in a plain loop, on real digits with their names; its own loop has tests of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from open_clip import loss as host
from torch import Tensor, nn

from integration_tests.matrix import plain_loop
from integration_tests.matrix.cells import Lack, plugged
from integration_tests.matrix.plain_loop import BATCHES
from integration_tests.multimodal.tiny_clip import SCALE, clip, digits

BATCH = 12


class Row(NamedTuple):
    """A loss, and its settings on several processes."""

    make: Callable[..., nn.Module]
    gathering: dict[str, bool] | None = None
    logits: float = SCALE


def coca(**kind: Any) -> nn.Module:
    """With little of the captioning part, which no weight changes."""
    return host.CoCaLoss(caption_loss_weight=0.1, clip_loss_weight=1.0, **kind)


ROWS = {
    "ClipLoss": Row(host.ClipLoss),
    "ClipLoss, local_loss": Row(host.ClipLoss, {"local_loss": True, "gather_with_grad": True}),
    "CoCaLoss": Row(coca),
}


class Training(plain_loop.Training):
    rows = ROWS

    def make(self, row: Row, kind: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.row, self.kind = row, kind
        self.model = clip().to(dtype)
        self.loss = plugged(row.make(cache_labels=True), kind)
        images, self.texts = digits(BATCH * BATCHES)
        self.images = images.to(dtype)

    def batches(self, epoch: int) -> list[Any]:
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(epoch))
        return [(self.images[rows], self.texts[rows]) for rows in order.chunk(BATCHES)]

    def given(self, batch: Any, model: Callable[..., Any]) -> tuple[Any, ...]:
        images, texts = batch
        outputs = model(images, texts)
        image, text, scale = (outputs[name] for name in ("image_features", "text_features", "logit_scale"))
        return (
            (image, text, *self.captions(image), scale)
            if isinstance(self.loss, host.CoCaLoss)
            else (image, text, scale)
        )

    def captions(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The logits and labels of a caption of one word, for the other part of CoCa's loss."""
        return image[:, None], torch.arange(1, len(image) + 1, device=image.device)[:, None] % image.shape[1]

    def value(self, batch: Any, model: Callable[..., Any] | None = None) -> Tensor:
        parts = self.loss(*self.given(batch, model or self.model))
        loss: Tensor = sum(parts) if isinstance(parts, tuple) else parts
        return loss

    def be_rank(self, rank: int) -> None:
        """Pairs of both processes are compared."""
        self.images, self.texts = self.images[rank::2], self.texts[rank::2]
        gathering = {**(self.row.gathering or {}), "rank": rank, "world_size": dist.get_world_size()}
        self.loss = plugged(self.row.make(cache_labels=True, **gathering), self.kind)


MACHINERY = plain_loop.machinery(Training)
LACKS: dict[tuple[str, str], Lack] = {}
NOTES: dict[tuple[str, str], str] = {}
