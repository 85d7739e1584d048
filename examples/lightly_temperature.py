"""SimCLR with lightly and PyTorch Lightning, at one temperature and with a schedule that moves it along a cosine.

The schedule is a callback. It sets the temperature of the loss at each step. Data, backbone and score are those of
`lightly_simclr.py`.

    python examples/lightly_temperature.py
    python examples/lightly_temperature.py --data CIFAR10 --epochs 10
"""

from __future__ import annotations

from typing import Any

from lightly.loss import NTXentLoss
from pytorch_lightning import Callback

from _shared import lightly_training
from _shared.compare import compare
from _shared.images import DATA
from undimix_lightly import TemperatureSchedule


class SimCLR(lightly_training.SimCLR):
    """lightly's SimCLR, with or without a schedule of the temperature."""

    def __init__(self, scheduled: bool, data: str = "MNIST") -> None:
        super().__init__(data)
        self.scheduled = scheduled
        self.criterion = NTXentLoss(temperature=0.2)

    def configure_callbacks(self) -> list[Callback]:
        # Five periods, as the paper's 2,000 epochs have. You can also pass the callback to the Trainer.
        return [TemperatureSchedule(low=0.1, high=1.0, share=0.2)] if self.scheduled else []


def train(scheduled: bool, *, epochs: int = 1, **options: Any) -> tuple[SimCLR, float, float]:
    """Trains SimCLR with `seed`, `data`, `max_steps` and `progress` as `lightly_training.fit` takes them."""
    return lightly_training.fit(lambda data: SimCLR(scheduled, data), epochs=epochs, **options)


def main() -> None:
    compare(
        str(__doc__),
        train,
        score="k-NN accuracy",
        plain="NTXentLoss",
        method="scheduled",
        data=DATA,
    )


if __name__ == "__main__":
    main()
