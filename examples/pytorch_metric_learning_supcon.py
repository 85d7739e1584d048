"""Supervised metric learning with pytorch-metric-learning, with and without UnDiMix: one line apart.

The loss, the sampler of classes and the score are pytorch-metric-learning's. The training data are the digits 0 to 4,
with their labels. The score is the MAP@R of the digits 5 to 9, which were not trained on: how many of the R nearest
neighbours of a digit are of its class, where R is the number of those in its class. The data need no download.

    python examples/pytorch_metric_learning_supcon.py
    python examples/pytorch_metric_learning_supcon.py --data CIFAR10 --epochs 10
"""

from __future__ import annotations

import time

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import SupConLoss
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from tqdm import tqdm

from _shared.compare import compare
from _shared.images import DATA, FEATURES, images, small_backbone
from undimix_plugins import undimix

SEEN = 5  # classes; the others are for the score


def of_classes(data: str, train: bool, seen: bool) -> Subset[tuple[Tensor, int]]:
    """Returns the images of the classes that are trained on, or of the others."""
    whole = images(data, train, transforms.ToTensor())
    return Subset(whole, [place for place, label in enumerate(whole.targets) if (int(label) < SEEN) == seen])


@torch.no_grad()
def mean_average_precision(model: nn.Module, data: str) -> float:
    """Returns the MAP@R of held-out images of the unseen classes."""
    model.eval()
    batches = [(model(x), y) for x, y in DataLoader(of_classes(data, train=False, seen=False), batch_size=500)]
    embeddings, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    calculator = AccuracyCalculator(
        include=("mean_average_precision_at_r",), k="max_bin_count", knn_func=CustomKNN(CosineSimilarity())
    )
    return float(calculator.get_accuracy(embeddings, labels)["mean_average_precision_at_r"])


def train(
    weighted: bool,
    *,
    seed: int = 0,
    data: str = "MNIST",
    epochs: int = 3,
    max_steps: int = -1,
    progress: bool = True,
) -> tuple[nn.Module, float, float]:
    """Trains an encoder; returns it, the MAP@R of the unseen classes and the seconds of training."""
    torch.manual_seed(seed)
    model = nn.Sequential(small_backbone(data), nn.Linear(FEATURES, 64))
    criterion = SupConLoss()  # its temperature is .1
    if weighted:
        criterion = undimix(criterion)  # the one line
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)

    digits = of_classes(data, train=True, seen=True)
    labels = [int(digits.dataset.targets[place]) for place in digits.indices]
    sampler = MPerClassSampler(labels, m=16, length_before_new_iter=len(labels))
    start, steps = time.perf_counter(), 0
    for _ in range(epochs):
        for x, y in tqdm(DataLoader(digits, batch_size=80, sampler=sampler, drop_last=True), disable=not progress):
            if steps == max_steps:
                break
            model.train()
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            steps += 1
    seconds = time.perf_counter() - start
    return model, mean_average_precision(model, data), seconds


def main() -> None:
    compare(
        str(__doc__),
        train,
        score="MAP@R of unseen classes",
        plain="SupConLoss",
        method="undimix(SupConLoss)",
        data=DATA,
    )


if __name__ == "__main__":
    main()
