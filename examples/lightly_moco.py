"""MoCo with lightly and PyTorch Lightning, with and without UnDiMix: one line apart.

The negatives come from the loss's memory bank, and UnDiMix weights them. Data, backbone and score are those of
`lightly_simclr.py`.

    python examples/lightly_moco.py
    python examples/lightly_moco.py --data CIFAR10 --epochs 10
"""

from __future__ import annotations

from typing import Any

from lightly.loss import NTXentLoss

from _shared import lightly_training
from _shared.compare import compare
from _shared.images import DATA
from undimix_plugins import undimix


class MoCo(lightly_training.MoCo):
    """lightly's MoCo, with its loss or with `undimix` of it."""

    def __init__(self, weighted: bool, data: str = "MNIST") -> None:
        super().__init__(data)
        self.criterion = NTXentLoss(temperature=0.2, memory_bank_size=(self.bank_size, 128))
        if weighted:
            self.criterion = undimix(self.criterion)  # the one line


def train(weighted: bool, *, epochs: int = 3, **options: Any) -> tuple[MoCo, float, float]:
    """Trains MoCo with `seed`, `data`, `max_steps` and `progress` as `lightly_training.fit` takes them."""
    return lightly_training.fit(lambda data: MoCo(weighted, data), epochs=epochs, **options)


def main() -> None:
    compare(
        str(__doc__),
        train,
        score="k-NN accuracy",
        plain="NTXentLoss",
        method="undimix(NTXentLoss)",
        data=DATA,
    )


if __name__ == "__main__":
    main()
