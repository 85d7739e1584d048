"""What lightly's examples share: SimCLR and MoCo as lightly's own examples have them, and how they are trained."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

import pytorch_lightning as pl
import torch
from lightly.data import LightlyDataset
from lightly.data.multi_view_collate import MultiViewCollate
from lightly.models.modules import MoCoProjectionHead, SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.moco_transform import MoCoV2Transform
from lightly.transforms.simclr_transform import SimCLRTransform
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .images import FEATURES, digit_views, images, knn_accuracy, small_backbone

Batch = tuple[list[Tensor], Tensor, list[str]]  # lightly's: the views, the labels, the files' names


class SimCLR(pl.LightningModule):
    """A backbone and a projection head. A subclass sets the loss: `self.criterion`."""

    photo_transform = SimCLRTransform
    criterion: nn.Module

    def __init__(self, data: str) -> None:
        super().__init__()
        self.backbone = small_backbone(data)
        self.projection_head = SimCLRProjectionHead(FEATURES, 256, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        (x0, x1), _, _ = batch
        return self.criterion(self(x0), self(x1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.06, momentum=0.9)


class MoCo(pl.LightningModule):
    """An encoder and its momentum encoder. A subclass sets the loss: `self.criterion`."""

    photo_transform = MoCoV2Transform
    criterion: nn.Module

    def __init__(self, data: str) -> None:
        super().__init__()
        self.backbone = small_backbone(data)
        # As in MoCo v3: without batch norm, the embeddings of so small a backbone start out almost all alike.
        self.projection_head = MoCoProjectionHead(FEATURES, 256, 128, batch_norm=True)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        # A bank as large as the data (4,000 digits) would hold each query's own image as a negative.
        self.bank_size = 4096 if data == "CIFAR10" else 1024

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x))

    @torch.no_grad()
    def forward_momentum(self, x: Tensor) -> Tensor:
        return self.projection_head_momentum(self.backbone_momentum(x))

    def query_and_key(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Updates the momentum encoder and encodes both views."""
        update_momentum(self.backbone, self.backbone_momentum, m=0.99)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.99)
        (x_query, x_key), _, _ = batch
        return self(x_query), self.forward_momentum(x_key)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        query, key = self.query_and_key(batch)
        return self.criterion(query, key)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.06, momentum=0.9)


Model = TypeVar("Model", SimCLR, MoCo)


def fit(
    make_model: Callable[[str], Model],
    *,
    seed: int = 0,
    data: str = "MNIST",
    epochs: int,
    max_steps: int = -1,
    progress: bool = True,
    indexed: bool = False,
) -> tuple[Model, float, float]:
    """Trains a model on two views of each image, and scores its backbone.

    Args:
        make_model: Makes the model for a data set.
        seed: The seed of the model, the order of the images and their views.
        data: "MNIST" or "CIFAR10".
        epochs: Passes over the images; 0 leaves the model untrained.
        max_steps: Steps after which training stops; -1 for no limit.
        progress: Whether to show Lightning's progress bar.
        indexed: Whether each image has its index in the place of its label.

    Returns:
        The model, its k-NN accuracy and the seconds of training.
    """
    quiet()
    pl.seed_everything(seed, verbose=False)
    model = make_model(data)

    transform = digit_views()
    if data == "CIFAR10":
        transform = model.photo_transform(input_size=32, cj_strength=0.5, gaussian_blur=0.0, normalize=None)
    labelled = images(data, train=True)
    if indexed:
        labelled.targets = list(range(len(labelled)))
    dataset = LightlyDataset.from_torch_dataset(labelled, transform=transform)
    collate_fn = MultiViewCollate()
    dataloader = DataLoader(dataset, batch_size=128, collate_fn=collate_fn, shuffle=True, drop_last=True)

    trainer = pl.Trainer(
        max_epochs=epochs,
        max_steps=max_steps,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
    )
    start = time.perf_counter()
    trainer.fit(model, dataloader)
    seconds = time.perf_counter() - start
    return model, knn_accuracy(model.backbone, data), seconds


def quiet() -> None:
    """Keeps Lightning's progress bar, and silences its messages about devices and workers."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for message in (".*does not have many workers.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", message=message)
