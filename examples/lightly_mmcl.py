"""SimCLR with lightly and PyTorch Lightning, with NT-Xent and with the max-margin loss MMCL.

MMCL takes two views, as lightly's own losses do. Data, backbone and score are those of `lightly_simclr.py`.

    python examples/lightly_mmcl.py
    python examples/lightly_mmcl.py --data CIFAR10 --epochs 10
"""

from __future__ import annotations

import math
from typing import Any

from lightly.loss import NTXentLoss

from _shared import lightly_training
from _shared.compare import compare
from _shared.images import DATA
from undimix_plugins import MMCL


class SimCLR(lightly_training.SimCLR):
    """lightly's SimCLR, with NT-Xent or with MMCL."""

    def __init__(self, max_margin: bool, data: str = "MNIST") -> None:
        super().__init__(data)
        self.criterion = NTXentLoss(temperature=0.2)
        if max_margin:
            # The authors' kernel width on ImageNet. With the default of .07, only near copies of a view count.
            self.criterion = MMCL(sigma=10.0, C=math.inf)


def train(max_margin: bool, *, epochs: int = 1, **options: Any) -> tuple[SimCLR, float, float]:
    """Trains SimCLR with `seed`, `data`, `max_steps` and `progress` as `lightly_training.fit` takes them."""
    return lightly_training.fit(lambda data: SimCLR(max_margin, data), epochs=epochs, **options)


def main() -> None:
    compare(
        str(__doc__),
        train,
        score="k-NN accuracy",
        plain="NTXentLoss",
        method="MMCL",
        data=DATA,
    )


if __name__ == "__main__":
    main()
