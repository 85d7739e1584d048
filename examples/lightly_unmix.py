"""MoCo with lightly and PyTorch Lightning, with and without Un-Mix.

Un-Mix (arXiv 2003.05438) mixes the batch with itself in reversed order, and adds two losses of the mixtures. Data,
backbone and score are those of `lightly_moco.py`.

    python examples/lightly_unmix.py
    python examples/lightly_unmix.py --data CIFAR10 --epochs 10
"""

from __future__ import annotations

from typing import Any

from lightly.loss import NTXentLoss
from torch import Tensor

from _shared import lightly_training
from _shared.compare import compare
from _shared.images import DATA
from undimix_plugins import UnMix


class MoCo(lightly_training.MoCo):
    """lightly's MoCo, whose queries are also mixed or not."""

    def __init__(self, mixed: bool, data: str = "MNIST") -> None:
        super().__init__(data)
        self.criterion = NTXentLoss(temperature=0.2, memory_bank_size=(self.bank_size, 128))
        self.mix = UnMix(beta=1.0, P=0.5) if mixed else None

    def training_step(self, batch: lightly_training.Batch, batch_idx: int) -> Tensor:
        if self.mix is None:
            return super().training_step(batch, batch_idx)
        query, key = self.query_and_key(batch)
        (x_query, _), _, _ = batch
        mixed = self.mix(x_query)
        # `undimix(self.criterion)` would weight the negatives of all three losses.
        return self.mix.loss(self.criterion, query, self(mixed.inputs), key, mixed)


def train(mixed: bool, *, epochs: int = 2, **options: Any) -> tuple[MoCo, float, float]:
    """Trains MoCo with `seed`, `data`, `max_steps` and `progress` as `lightly_training.fit` takes them."""
    return lightly_training.fit(lambda data: MoCo(mixed, data), epochs=epochs, **options)


def main() -> None:
    compare(
        str(__doc__),
        train,
        score="k-NN accuracy",
        plain="NTXentLoss",
        method="Un-Mix",
        data=DATA,
    )


if __name__ == "__main__":
    main()
