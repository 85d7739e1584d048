"""SimCLR with lightly and PyTorch Lightning, with and without UnDiMix: one line apart.

The data are digits that need no download. The backbone trains on a CPU in seconds. The score is the k-NN accuracy of
the backbone's features on held-out images. The module without its loss, and its training, are in
`_shared/lightly_training.py`.

    python examples/lightly_simclr.py
    python examples/lightly_simclr.py --data CIFAR10 --epochs 10
"""

from __future__ import annotations

from typing import Any

from lightly.loss import NTXentLoss

from _shared import lightly_training
from _shared.compare import compare
from _shared.images import DATA
from undimix_plugins import undimix


class SimCLR(lightly_training.SimCLR):
    """lightly's SimCLR, with its loss or with `undimix` of it."""

    def __init__(self, weighted: bool, data: str = "MNIST") -> None:
        super().__init__(data)
        self.criterion = NTXentLoss()  # its temperature is .5
        if weighted:
            self.criterion = undimix(self.criterion)  # the one line


def train(weighted: bool, *, epochs: int = 3, **options: Any) -> tuple[SimCLR, float, float]:
    """Trains SimCLR with `seed`, `data`, `max_steps` and `progress` as `lightly_training.fit` takes them."""
    return lightly_training.fit(lambda data: SimCLR(weighted, data), epochs=epochs, **options)


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
