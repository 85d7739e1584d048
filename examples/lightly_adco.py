"""MoCo with lightly and PyTorch Lightning, with a memory bank and with AdCo, whose negatives are trained.

The pool of negatives is filled with encoded keys before training. After each loss the pool takes its own step, against
the encoder. Data, backbone and score are those of `lightly_moco.py`.

    python examples/lightly_adco.py
    python examples/lightly_adco.py --data CIFAR10 --epochs 10
"""

from __future__ import annotations

from typing import Any

from lightly.loss import NTXentLoss
from torch import Tensor

from _shared import lightly_training
from _shared.compare import compare
from _shared.images import DATA
from undimix_plugins import AdCo


class MoCo(lightly_training.MoCo):
    """lightly's MoCo, with its loss or with AdCo. The optimizer is the encoder's: AdCo's pool is no parameter."""

    def __init__(self, adversarial: bool, data: str = "MNIST") -> None:
        super().__init__(data)
        self.adversarial = adversarial
        # Temperatures a little above the paper's, as the authors set them for a smaller pool.
        self.criterion = (
            AdCo(128, self.bank_size, temperature=0.2, memory_temperature=0.03)
            if adversarial
            else NTXentLoss(temperature=0.2, memory_bank_size=(self.bank_size, 128))
        )

    def on_train_start(self) -> None:
        if self.adversarial:
            batches = iter(self.trainer.train_dataloader)
            self.criterion.fill(self.forward_momentum(views[1].to(self.device)) for views, _, _ in batches)

    def training_step(self, batch: lightly_training.Batch, batch_idx: int) -> Tensor:
        query, key = self.query_and_key(batch)
        loss = self.criterion(query, key)
        if self.adversarial:
            self.criterion.step(query, key)
        return loss


def train(adversarial: bool, *, epochs: int = 1, **options: Any) -> tuple[MoCo, float, float]:
    """Trains MoCo with `seed`, `data`, `max_steps` and `progress` as `lightly_training.fit` takes them."""
    return lightly_training.fit(lambda data: MoCo(adversarial, data), epochs=epochs, **options)


def main() -> None:
    compare(
        str(__doc__),
        train,
        score="k-NN accuracy",
        plain="NTXentLoss with a bank",
        method="AdCo",
        data=DATA,
    )


if __name__ == "__main__":
    main()
