"""SimCLR with lightly and PyTorch Lightning, with NT-Xent and with iSogCLR, which learns a temperature for each image.

The data set gives each image's index in the place of its label. Data, backbone and score are those of
`lightly_simclr.py`.

    python examples/lightly_isogclr.py
    python examples/lightly_isogclr.py --data CIFAR10 --epochs 10
"""

from __future__ import annotations

from typing import Any

from lightly.loss import NTXentLoss
from torch import Tensor

from _shared import lightly_training
from _shared.compare import compare
from _shared.images import DATA
from undimix_plugins import ISogCLR

IMAGES = {"MNIST": 4000, "CIFAR10": 50000}


class SimCLR(lightly_training.SimCLR):
    """lightly's SimCLR, with NT-Xent or with iSogCLR."""

    def __init__(self, individual: bool, data: str = "MNIST") -> None:
        super().__init__(data)
        self.individual = individual
        self.criterion = ISogCLR(IMAGES[data]) if individual else NTXentLoss(temperature=0.2)

    def training_step(self, batch: lightly_training.Batch, batch_idx: int) -> Tensor:
        if not self.individual:
            return super().training_step(batch, batch_idx)
        (x0, x1), index, _ = batch
        return self.criterion(self(x0), self(x1), index)


def train(individual: bool, *, epochs: int = 1, **options: Any) -> tuple[SimCLR, float, float]:
    """Trains SimCLR with `seed`, `data`, `max_steps` and `progress` as `lightly_training.fit` takes them."""
    return lightly_training.fit(lambda data: SimCLR(individual, data), indexed=True, epochs=epochs, **options)


def main() -> None:
    compare(
        str(__doc__),
        train,
        score="k-NN accuracy",
        plain="NTXentLoss",
        method="iSogCLR",
        data=DATA,
    )


if __name__ == "__main__":
    main()
