"""Benchmarks of image embeddings, trained with lightly and Lightning: SimCLR and MoCo on CIFAR-10 and CIFAR-10-LT.

    python -m benchmarks.embeddings.vision --jobs 2
    python -m benchmarks.embeddings.vision --recipe SimCLR --weighting "UnDiMix(hardness=2.0)"

The encoder trains on 10,000 images without labels. lightly's evaluation scores its features with a weighted k-NN
classifier and a linear probe, which train on the same images with labels. Validation, for choosing settings, is on
5,000 other training images. Test is on the 10,000 test images. CIFAR-10-LT is a long-tailed subset of the training
images that CIFAR-10 leaves. Other images of these, as many of each class, train the classifiers, validate and test.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightly.data import LightlyDataset
from lightly.data.multi_view_collate import MultiViewCollate
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead, SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.simclr_transform import SimCLRTransform
from lightly.utils.benchmarking import KNNClassifier, LinearClassifier
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.datasets import CIFAR10, VisionDataset
from torchvision.models import resnet18
from torchvision.transforms import ToTensor

from benchmarks.embeddings.command_line import main
from benchmarks.embeddings.files import atomic_path
from benchmarks.embeddings.geometry import geometry
from benchmarks.embeddings.protocol import Benchmark
from benchmarks.embeddings.trials import Trial, quarters
from undimix_lightly import HardnessWarmup, NegativeStatistics, TemperatureSchedule
from undimix_plugins import undimix

Range = tuple[int, int]


@dataclass(frozen=True)
class Scale:
    """The size of a training, and which images are for what.

    CIFAR-10 trains on the first `images` training images, with validation on the range `validation`. CIFAR-10-LT trains
    on images of the range `pool`; the ranges `known`, `chosen_on` and `reported_on` are for the classifiers, for
    validation and for test. All are ranges of training images, and none but `images` is in two roles.
    """

    images: int
    validation: Range
    test: int
    epochs: int
    tail_epochs: int  # of CIFAR-10-LT, which has fewer images
    bank: int  # MoCo's memory bank
    pool: Range
    known: Range
    chosen_on: Range
    reported_on: Range
    keeps_views: bool = True
    resnet: bool = False
    workers: int = 0


# The training images that CIFAR-10 leaves at the scale "small".
LONG_TAILED = {
    "pool": (10_000, 30_000),
    "known": (30_000, 37_500),
    "chosen_on": (37_500, 40_000),
    "reported_on": (40_000, 45_000),
}
TINY = {"pool": (0, 512), "known": (512, 768), "chosen_on": (768, 896), "reported_on": (896, 1024)}
SCALES = {
    "tiny": Scale(512, (512, 1024), 512, 1, 1, 256, **TINY),
    "small": Scale(10_000, (45_000, 50_000), 10_000, 6, 12, 2048, **LONG_TAILED),
    "full": Scale(
        45_000, (45_000, 50_000), 10_000, 200, 400, 4096, **LONG_TAILED, keeps_views=False, resnet=True, workers=8
    ),
}
# The most frequent class of CIFAR-10-LT has this many times the images of the least frequent one (Cui et al. 2019).
IMBALANCE = 100
STEPS_BETWEEN_STATISTICS = 15
PAIRS = 1000  # images whose two views are compared


# On a CPU, making views takes three times as long as training on them. All losses with one seed share the same views.
KEPT_VIEWS = Path("datasets/views")


class Images(VisionDataset):
    """Images in memory with their classes, as a torchvision data set."""

    def __init__(self, images: list[tuple[Any, int]], transform: Any = None) -> None:
        super().__init__(transform=transform)
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.images[index]
        return self.transform(image) if self.transform else image, label


@cache
def cifar10(train: bool, first: int, stop: int, data_dir: Path | None) -> list[tuple[Any, int]]:
    """PIL images of 32 by 32 pixels with their classes."""
    path = None if data_dir is None else data_dir / "cifar10" / f"cifar10_{'train' if train else 'test'}_jpeg.npz"
    if path is None or not path.exists():
        dataset = CIFAR10("datasets/cifar10", train=train, download=True)
        return [dataset[index] for index in range(first, stop)]
    with np.load(path) as packed:  # JPEGs, one after the other
        jpeg, offsets, labels = packed["jpeg"].tobytes(), packed["offsets"], packed["labels"].tolist()
    images = (Image.open(io.BytesIO(jpeg[offsets[index] : offsets[index + 1]])) for index in range(first, stop))
    return [(image.convert("RGB"), labels[first + place]) for place, image in enumerate(images)]


def long_tailed(images: list[tuple[Any, int]]) -> list[tuple[Any, int]]:
    """The first images of each class: all of class 0, a hundredth of class 9, and an exponential profile between."""
    most, kept, count = min(Counter(label for _, label in images).values()), list[tuple[Any, int]](), Counter[int]()
    for image, label in images:
        if count[label] < max(2, round(most * IMBALANCE ** (-label / 9))):
            kept.append((image, label))
            count[label] += 1
    return kept


@cache
def trained_on(data: str, scale: Scale, data_dir: Path | None) -> list[tuple[Any, int]]:
    """The images that train an encoder, with their classes."""
    if data == "CIFAR-10":
        return cifar10(True, 0, scale.images, data_dir)
    return long_tailed(cifar10(True, *scale.pool, data_dir))


def epochs_of(trial: Trial) -> int:
    scale = SCALES[trial.scale]
    return scale.epochs if trial.data == "CIFAR-10" else scale.tail_epochs


def evaluated_on(trial: Trial) -> tuple[tuple[bool, int, int], tuple[bool, int, int]]:
    """The images that train the classifiers, and those that are classified: part and range, as for `cifar10`."""
    scale, validates = SCALES[trial.scale], trial.split == "validation"
    if trial.data == "CIFAR-10":
        told = (True, *scale.validation) if validates else (False, 0, scale.test)
        return (True, 0, scale.images), told
    return (True, *scale.known), (True, *(scale.chosen_on if validates else scale.reported_on))


def transform() -> SimCLRTransform:
    return SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0, normalize=None)


class KeptViews(Dataset[Any]):
    """Two views of each image for each epoch, made once for each seed and then read from a file.

    An item has lightly's form: a list of two views, the class and a file name. `epoch` selects the epoch's views.
    """

    def __init__(self, trial: Trial, data_dir: Path | None) -> None:
        scale = SCALES[trial.scale]
        images, epochs = trained_on(trial.data, scale, data_dir), epochs_of(trial)
        self.labels, self.epoch = [label for _, label in images], 0
        source = trial.data if data_dir is None else f"{trial.data}-local"
        path = KEPT_VIEWS / f"{source}-{len(images)}-{epochs}-{trial.seed}.npy"
        if not path.exists():
            pl.seed_everything(trial.seed, verbose=False)
            views, view = np.empty((epochs, len(images), 2, 3, 32, 32), dtype=np.uint8), transform()
            for of_epoch in views:
                for place, (image, _) in enumerate(images):
                    of_epoch[place] = (torch.stack(view(image)) * 255).round().byte().numpy()
            with atomic_path(path) as part, part.open("wb") as file:
                np.save(file, views)
        try:
            self.views = np.load(path, mmap_mode="r")
        except (EOFError, ValueError) as error:
            raise ValueError(f"{path}: expected kept views, got {error}; delete the file to make them again") from error

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int, str]:
        views = torch.from_numpy(self.views[self.epoch, index].astype(np.float32)) / 255
        return [views[0], views[1]], self.labels[index], str(index)


@cache
def two_views(train: bool, first: int, stop: int, data_dir: Path | None) -> tuple[TensorDataset, TensorDataset]:
    """Two views of each of the first images, the same ones for all trials."""
    pl.seed_everything(0, verbose=False)
    images, view = cifar10(train, first, min(stop, first + PAIRS), data_dir), transform()
    pairs = [view(image) for image, _ in images]
    labels = torch.tensor([label for _, label in images])
    one, other = (TensorDataset(torch.stack(views), labels) for views in zip(*pairs, strict=True))
    return one, other


@cache
def pixels(train: bool, first: int, stop: int, data_dir: Path | None) -> TensorDataset:
    """Images [n, 3, 32, 32] without augmentation, and classes [n]."""
    images, labels = zip(*cifar10(train, first, stop, data_dir), strict=True)
    return TensorDataset(torch.stack([ToTensor()(image) for image in images]), torch.tensor(labels))


def backbone_of(scale: Scale) -> tuple[nn.Module, int]:
    """An encoder of images of 32 by 32 pixels, and its number of features."""
    if scale.resnet:
        resnet = resnet18()
        resnet.conv1, resnet.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        return nn.Sequential(*list(resnet.children())[:-1], nn.Flatten()), 512
    layers: list[nn.Module] = []
    widths = (3, 32, 64, 128)
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten()), 4 * widths[-1]


class SimCLR(pl.LightningModule):
    def __init__(self, trial: Trial, criterion: nn.Module) -> None:
        super().__init__()
        self.backbone, width = backbone_of(SCALES[trial.scale])
        self.projection_head = SimCLRProjectionHead(width, 256, 128)
        self.criterion = criterion
        self.batch_size, self.class_known = trial.batch_size, trial.class_known
        self.seen: list[dict[str, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x.contiguous(memory_format=torch.channels_last)))

    def training_step(self, batch: tuple[list[Tensor], Tensor, list[str]], batch_idx: int) -> Tensor:
        (x0, x1), classes, _ = batch
        return self.criterion(self(x0), self(x1), classes if self.class_known else None)

    def on_train_epoch_start(self) -> None:
        self.trainer.train_dataloader.dataset.epoch = self.current_epoch

    def on_train_batch_end(self, *args: Any) -> None:
        logged = {
            name.removeprefix("negatives/"): value
            for name, value in self.trainer.callback_metrics.items()
            if name.startswith("negatives/")
        }
        if logged and self.trainer.global_step % STEPS_BETWEEN_STATISTICS == 0:
            self.seen.append({name: float(value) for name, value in logged.items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.06 * self.batch_size / 256, momentum=0.9, weight_decay=5e-4)


class MoCo(SimCLR):
    """MoCo. The keys fill the loss's memory bank, which holds the negatives."""

    def __init__(self, trial: Trial, criterion: nn.Module) -> None:
        super().__init__(trial, criterion)
        _, width = backbone_of(SCALES[trial.scale])
        # Batch norm as in MoCo v3: without it, embeddings of so small a backbone are almost identical at first.
        self.projection_head = MoCoProjectionHead(width, 256, 128, batch_norm=True)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def training_step(self, batch: tuple[list[Tensor], Tensor, list[str]], batch_idx: int) -> Tensor:
        update_momentum(self.backbone, self.backbone_momentum, m=0.99)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.99)
        (query, key), _, _ = batch
        with torch.no_grad():
            keys = self.projection_head_momentum(
                self.backbone_momentum(key.contiguous(memory_format=torch.channels_last))
            )
        return self.criterion(self(query), keys)


RECIPES = {"SimCLR": SimCLR, "MoCo": MoCo}


def quiet_trainer(epochs: int, callbacks: list[pl.Callback]) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


@torch.no_grad()
def features(backbone: nn.Module, images: TensorDataset) -> TensorDataset:
    device = next(backbone.parameters()).device
    batches = [
        (backbone(x.to(device, memory_format=torch.channels_last)).cpu(), y)
        for x, y in DataLoader(images, batch_size=500)
    ]
    rows, labels = zip(*batches, strict=True)
    return TensorDataset(torch.cat(rows), torch.cat(labels))


def evaluate(backbone: nn.Module, trial: Trial, data_dir: Path | None) -> dict[str, float]:
    """The accuracies of lightly's k-NN classifier and linear probe on the features, and the features' geometry.

    Alignment is that of two views of an image.
    """
    parts = evaluated_on(trial)
    train, evaluation = (features(backbone, pixels(*part, data_dir)) for part in parts)
    mean, deviation = train.tensors[0].mean(dim=0), train.tensors[0].std(dim=0).clamp(min=1e-6)
    pairs = [features(backbone, views).tensors[0] for views in two_views(*parts[1], data_dir)]
    metrics = geometry(*pairs, evaluation.tensors[0])

    nearest = KNNClassifier(nn.Identity(), 10, knn_k=20, knn_t=0.1, train_dataloader_idx=0, val_dataloader_idx=1)
    loaders = [DataLoader(part, batch_size=500) for part in (train, evaluation)]
    metrics["knn"] = top1(quiet_trainer(1, []).validate(nearest, loaders, verbose=False))

    pl.seed_everything(trial.seed, verbose=False)
    train, evaluation = (
        TensorDataset((part.tensors[0] - mean) / deviation, part.tensors[1]) for part in (train, evaluation)
    )
    width = train.tensors[0].shape[1]
    probe = LinearClassifier(nn.Identity(), batch_size_per_device=256, lr=0.1, feature_dim=width, num_classes=10)
    trainer = quiet_trainer(20, [])
    trainer.fit(probe, DataLoader(train, batch_size=256, shuffle=True))
    metrics["linear"] = top1(trainer.validate(probe, DataLoader(evaluation, batch_size=500), verbose=False))
    return metrics


def top1(found: list[Any]) -> float:
    return next(float(value) for part in found for name, value in part.items() if "top1" in name)


def quiet() -> None:
    """Silences Lightning's messages about devices and workers."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for message in (".*does not have many workers.*", ".*LeafSpec.*", ".*val_dataloader.*", ".*lr_scheduler.*"):
        warnings.filterwarnings("ignore", message=message)


def training_images(trial: Trial, data_dir: Path | None) -> Dataset[Any]:
    scale = SCALES[trial.scale]
    if scale.keeps_views:
        return KeptViews(trial, data_dir)
    images = Images(trained_on(trial.data, scale, data_dir))
    return LightlyDataset.from_torch_dataset(images, transform=transform())


def train(trial: Trial, data_dir: Path | None) -> dict[str, Any]:
    quiet()
    scale, images = SCALES[trial.scale], training_images(trial, data_dir) if trial.trains else None
    pl.seed_everything(trial.seed, verbose=False)
    bank = {"memory_bank_size": (scale.bank, 128)} if trial.recipe == "MoCo" else {}
    criterion = NTXentLoss(temperature=trial.temperature if trial.trains else 0.5, **bank)
    if trial.trains:
        criterion = undimix(criterion, trial.loss_weighting())
    model = RECIPES[trial.recipe](trial, criterion).to(memory_format=torch.channels_last)
    if images is not None:
        loader = DataLoader(
            images,
            batch_size=trial.batch_size,
            collate_fn=MultiViewCollate(),
            shuffle=True,
            drop_last=True,
            num_workers=scale.workers,
        )
        labels = None if bank else lambda batch: batch[1]  # entries of a memory bank have no labels
        callbacks: list[pl.Callback] = [] if trial.brief else [NegativeStatistics(STEPS_BETWEEN_STATISTICS, labels)]
        if trial.warmup:
            callbacks.append(HardnessWarmup(share=trial.warmup))
        if trial.highest:
            callbacks.append(TemperatureSchedule(trial.temperature, trial.highest))
        quiet_trainer(epochs_of(trial), callbacks).fit(model, loader)
    else:  # so that it has the data's batch statistics, as a trained encoder has
        images_alone = Images(trained_on(trial.data, scale, data_dir), ToTensor())
        update_bn(DataLoader(images_alone, batch_size=trial.batch_size), model.backbone)
    model.eval()
    return {"metrics": evaluate(model.backbone, trial, data_dir), "statistics": quarters(model.seen)}


SMALL = [Trial("vision", recipe, "CIFAR-10", "UnDiMix()", 0.2, 256, 0) for recipe in RECIPES]
LIGHTLY = 0.5  # NTXentLoss's temperature, also in lightly's scripts of SimCLR and MoCo
BENCHMARKS = [
    Benchmark(SMALL[0], "knn", LIGHTLY, ("linear",), batch_sizes=(64, 128, 256, 512)),
    Benchmark(SMALL[1], "knn", LIGHTLY, ("linear",), explores=False),
    Benchmark(
        replace(SMALL[0], data="CIFAR-10-LT", batch_size=128),
        "knn",
        LIGHTLY,
        ("linear",),
        explores=False,
        stages=("host_test",),
    ),
]

if __name__ == "__main__":
    main(str(__doc__), train, BENCHMARKS)
