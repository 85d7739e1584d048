"""SimCLR with stable-pretraining, with and without UnDiMix: one line apart.

The module, its forward function and the data module are stable-pretraining's. The data are digits that need no
download. The score is the k-NN accuracy of the backbone's features on held-out images.

    python examples/stable_pretraining_simclr.py
    python examples/stable_pretraining_simclr.py --data CIFAR10 --epochs 10
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import lightning as pl
import stable_pretraining as spt
from stable_pretraining.forward import simclr
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from _shared.compare import compare
from _shared.images import DATA, FEATURES, digit_views, images, knn_accuracy, small_backbone
from undimix_plugins import undimix

PROJECTED = 64  # the width of the projections


class Views(Dataset[dict[str, Any]]):
    """Images as stable-pretraining's forward functions take them: two views with a label, or one image."""

    def __init__(self, data: str, train: bool) -> None:
        crops = transforms.Compose([transforms.RandomResizedCrop(32, (0.2, 1.0)), transforms.ToTensor()])
        views = digit_views() if data == "MNIST" else lambda image: [crops(image), crops(image)]
        self.data, self.train = images(data, train, views if train else transforms.ToTensor()), train

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.data[index]
        return (
            {"views": [{"image": view, "label": label} for view in image]}
            if self.train
            else {"image": image, "label": label}
        )


def train(
    weighted: bool,
    *,
    seed: int = 0,
    data: str = "MNIST",
    epochs: int = 3,
    max_steps: int = -1,
    progress: bool = True,
) -> tuple[nn.Module, float, float]:
    """Trains SimCLR; returns the backbone, its k-NN accuracy and the seconds of training."""
    pl.seed_everything(seed, verbose=False)
    loss = spt.losses.NTXEntLoss()  # its temperature is .5
    if weighted:
        loss = undimix(loss)  # the one line
    module = spt.Module(
        forward=simclr,
        backbone=small_backbone(data),
        projector=nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, PROJECTED)),
        simclr_loss=loss,
        optim={
            "optimizer": {"type": "AdamW", "lr": 0.001},
            "scheduler": {"type": "ConstantLR", "factor": 1.0},
            "interval": "epoch",
        },
    )
    loaders = {
        part: DataLoader(Views(data, part == "train"), batch_size=256, shuffle=part == "train", drop_last=True)
        for part in ("train", "val")
    }
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"progress_bar": progress, "logging": False, "env_dump": False}
        spt.set(cache_dir=folder, verbose="WARNING", default_callbacks=quiet)
        trainer = pl.Trainer(
            max_epochs=epochs,
            max_steps=max_steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        start = time.perf_counter()
        trainer.fit(module, spt.data.DataModule(**loaders))
        seconds = time.perf_counter() - start
    return module.backbone, knn_accuracy(module.backbone, data), seconds


def main() -> None:
    compare(
        str(__doc__),
        train,
        score="k-NN accuracy",
        plain="NTXEntLoss",
        method="undimix(NTXEntLoss)",
        data=DATA,
    )


if __name__ == "__main__":
    main()
