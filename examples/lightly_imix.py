"""SimCLR with lightly and PyTorch Lightning, with and without i-Mix.

i-Mix (arXiv 2010.08887) encodes mixtures of the first views and gives each two positives, by its shares. Its negatives
can be weighted too. Data, backbone and score are those of `lightly_simclr.py`.

    python examples/lightly_imix.py
    python examples/lightly_imix.py --data CIFAR10 --epochs 10
"""

from __future__ import annotations

import time

import pytorch_lightning as pl
import torch
from compare import compare
from images import DATA, FEATURES, digit_views, images, knn_accuracy, quiet, small_backbone
from lightly.data import LightlyDataset
from lightly.data.multi_view_collate import MultiViewCollate
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms.simclr_transform import SimCLRTransform
from torch import Tensor
from torch.utils.data import DataLoader

from undimix_plugins.mixing import IMix


class SimCLR(pl.LightningModule):
    def __init__(self, mixed: bool, data: str = "MNIST") -> None:
        super().__init__()
        self.backbone = small_backbone(data)
        self.projection_head = SimCLRProjectionHead(FEATURES, 256, 128)
        self.criterion = NTXentLoss(temperature=0.2)
        self.mix = IMix(alpha=1.0) if mixed else None

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x))

    def training_step(self, batch: tuple[list[Tensor], Tensor, list[str]], batch_idx: int) -> Tensor:
        (x0, x1), _, _ = batch
        if self.mix is None:
            return self.criterion(self(x0), self(x1))
        mixed = self.mix(x0)
        # With `weighting=UnDiMix()`, the negatives of both labels are weighted.
        return self.mix.n_pair(self(mixed.inputs), self(x1), mixed, temperature=0.2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.06, momentum=0.9)


def train(
    mixed: bool,
    *,
    seed: int = 0,
    data: str = "MNIST",
    epochs: int = 2,
    max_steps: int = -1,
    progress: bool = True,
) -> tuple[SimCLR, float, float]:
    """Trains SimCLR.

    Args:
        mixed: Whether with i-Mix or plain.
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
    model = SimCLR(mixed, data)

    transform = digit_views()
    if data == "CIFAR10":
        transform = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0, normalize=None)
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
        weighted="i-Mix",
        data=DATA,
        epochs=2,
    )


if __name__ == "__main__":
    main()
