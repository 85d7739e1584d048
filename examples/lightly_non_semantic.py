"""MoCo with lightly and PyTorch Lightning, with and without non-semantic negatives.

Beside the memory bank's entries, a query has a negative that is made of its own image, tiled with patches of itself
(arXiv 2110.14189). Data, backbone and score are those of `lightly_moco.py`.

    python examples/lightly_non_semantic.py
    python examples/lightly_non_semantic.py --data CIFAR10 --epochs 10
"""

from __future__ import annotations

import copy
import time

import pytorch_lightning as pl
import torch
from compare import compare
from images import DATA, FEATURES, digit_views, images, knn_accuracy, quiet, small_backbone
from lightly.data import LightlyDataset
from lightly.data.multi_view_collate import MultiViewCollate
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.moco_transform import MoCoV2Transform
from torch import Tensor
from torch.utils.data import DataLoader

from undimix_lightly.non_semantic import NonSemanticNegatives, NonSemanticTransform, non_semantic_columns
from undimix_plugins import undimix


class MoCo(pl.LightningModule):
    def __init__(self, non_semantic: bool, data: str = "MNIST") -> None:
        super().__init__()
        self.backbone = small_backbone(data)
        # As in MoCo v3: without it the embeddings of so small a backbone start out almost all alike.
        self.projection_head = MoCoProjectionHead(FEATURES, 256, 128, batch_norm=True)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        # A bank as large as the data (4,000 digits) would hold each query's own image as a negative.
        bank = 4096 if data == "CIFAR10" else 1024
        self.criterion = NTXentLoss(temperature=0.2, memory_bank_size=(bank, 128))
        self.non_semantic = None
        if non_semantic:
            self.non_semantic = NonSemanticTransform("patch")
            # With UnDiMix's weights on the bank's entries: compose(UnDiMix(), NonSemanticNegatives(alpha=2.0)).
            self.criterion = undimix(self.criterion, NonSemanticNegatives(alpha=2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x))

    @torch.no_grad()
    def forward_momentum(self, x: Tensor) -> Tensor:
        return self.projection_head_momentum(self.backbone_momentum(x))

    def training_step(self, batch: tuple[list[Tensor], Tensor, list[str]], batch_idx: int) -> Tensor:
        update_momentum(self.backbone, self.backbone_momentum, m=0.99)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.99)
        (x_query, x_key), _, _ = batch
        query, key = self(x_query), self.forward_momentum(x_key)
        if self.non_semantic is None:
            return self.criterion(query, key)
        with non_semantic_columns(self.forward_momentum(self.non_semantic(x_query))):
            return self.criterion(query, key)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.06, momentum=0.9)


def train(
    non_semantic: bool,
    *,
    seed: int = 0,
    data: str = "MNIST",
    epochs: int = 2,
    max_steps: int = -1,
    progress: bool = True,
) -> tuple[MoCo, float, float]:
    """Trains MoCo.

    Args:
        non_semantic: Whether with non-semantic negatives or plain.
        seed: Of the model, the order of the images and their views.
        data: "MNIST" or "CIFAR10".
        epochs: Passes over the images; 0 leaves the model untrained.
        max_steps: Where to stop before that; -1 for nowhere.
        progress: Whether to show Lightning's progress bar.

    Returns:
        The model, its k-NN accuracy and the seconds of training.
    """
    quiet()
    pl.seed_everything(seed, verbose=False)
    model = MoCo(non_semantic, data)

    transform = digit_views()
    if data == "CIFAR10":
        transform = MoCoV2Transform(input_size=32, cj_strength=0.5, gaussian_blur=0.0, normalize=None)
    dataset = LightlyDataset.from_torch_dataset(images(data, train=True), transform=transform)
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


def main() -> None:
    compare(
        str(__doc__),
        train,
        score="k-NN accuracy",
        plain="NTXentLoss",
        weighted="with non-semantic negatives",
        data=DATA,
        epochs=2,
    )


if __name__ == "__main__":
    main()
