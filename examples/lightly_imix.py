"""SimCLR with lightly and PyTorch Lightning, with and without i-Mix.

i-Mix (arXiv 2010.08887) encodes mixtures of the first views. Each mixture has two positives, with the shares of the
mixture. You can weight its negatives too. Data, backbone and score are those of `lightly_simclr.py`.

    python examples/lightly_imix.py
    python examples/lightly_imix.py --data CIFAR10 --epochs 10
"""

from __future__ import annotations

from typing import Any

from lightly.loss import NTXentLoss
from torch import Tensor

from _shared import lightly_training
from _shared.compare import compare
from _shared.images import DATA
from undimix_plugins import IMix


class SimCLR(lightly_training.SimCLR):
    """lightly's SimCLR, whose first views are mixed or not."""

    def __init__(self, mixed: bool, data: str = "MNIST") -> None:
        super().__init__(data)
        self.criterion = NTXentLoss(temperature=0.2)
        self.mix = IMix(alpha=1.0) if mixed else None

    def training_step(self, batch: lightly_training.Batch, batch_idx: int) -> Tensor:
        if self.mix is None:
            return super().training_step(batch, batch_idx)
        (x0, x1), _, _ = batch
        mixed = self.mix(x0)
        # `weighting=UnDiMix()` weights the negatives of both labels.
        return self.mix.n_pair(self(mixed.inputs), self(x1), mixed, temperature=0.2)


def train(mixed: bool, *, epochs: int = 2, **options: Any) -> tuple[SimCLR, float, float]:
    """Trains SimCLR with `seed`, `data`, `max_steps` and `progress` as `lightly_training.fit` takes them."""
    return lightly_training.fit(lambda data: SimCLR(mixed, data), epochs=epochs, **options)


def main() -> None:
    compare(
        str(__doc__),
        train,
        score="k-NN accuracy",
        plain="NTXentLoss",
        method="i-Mix",
        data=DATA,
    )


if __name__ == "__main__":
    main()
