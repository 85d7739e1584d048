"""MoCo with lightly and PyTorch Lightning, with and without active sampling of the memory bank's entries.

A second bank holds the latest keys, the candidates. The uncertain and diverse ones go into the loss's bank, which is a
quarter as large. Data, backbone and score are those of `lightly_moco.py`.

    python examples/lightly_active_sampling.py
    python examples/lightly_active_sampling.py --data CIFAR10 --epochs 10
"""

from __future__ import annotations

from typing import Any

from lightly.loss import NTXentLoss
from lightly.models.modules.memory_bank import MemoryBankModule
from torch import Tensor
from torch.nn.functional import normalize

from _shared import lightly_training
from _shared.compare import compare
from _shared.images import DATA
from undimix_plugins import ActiveSampling


class ChosenBank(MemoryBankModule):
    """A loss's memory bank that gets the rows given to `enqueue`, and not the loss's own keys."""

    def forward(self, output: Tensor, labels: Tensor | None = None, update: bool = False) -> tuple[Tensor, Tensor]:
        return super().forward(output, labels, update=False)

    def enqueue(self, rows: Tensor) -> None:
        super().forward(rows, update=True)


class MoCo(lightly_training.MoCo):
    """lightly's MoCo, whose bank gets chosen keys or the latest."""

    def __init__(self, active: bool, data: str = "MNIST") -> None:
        super().__init__(data)
        self.active = active
        self.criterion = NTXentLoss(temperature=0.2, memory_bank_size=(self.bank_size // 4, 128))
        if active:
            self.criterion.memory_bank = ChosenBank((self.bank_size // 4, 128))
            self.candidates = MemoryBankModule((self.bank_size, 128), feature_dim_first=False)
            self.choose = ActiveSampling(temperature=0.2)

    def on_train_start(self) -> None:
        if self.active:  # a new bank's rows are random, and random rows are uncertain
            batches = iter(self.trainer.train_dataloader)
            for _ in range(0, self.candidates.size[0], 128):
                (_, x_key), _, _ = next(batches)
                self.candidates(normalize(self.forward_momentum(x_key.to(self.device)), dim=1), update=True)

    def training_step(self, batch: lightly_training.Batch, batch_idx: int) -> Tensor:
        query, key = self.query_and_key(batch)
        if self.active:
            _, candidates = self.candidates(normalize(key, dim=1), update=True)
            chosen = self.choose(normalize(query.detach(), dim=1), candidates)
            self.criterion.memory_bank.enqueue(candidates[chosen])
        return self.criterion(query, key)


def train(active: bool, *, epochs: int = 1, **options: Any) -> tuple[MoCo, float, float]:
    """Trains MoCo with `seed`, `data`, `max_steps` and `progress` as `lightly_training.fit` takes them."""
    return lightly_training.fit(lambda data: MoCo(active, data), epochs=epochs, **options)


def main() -> None:
    score, plain, method = "k-NN accuracy", "NTXentLoss with a bank", "NTXentLoss with ActiveSampling"
    compare(str(__doc__), train, score=score, plain=plain, method=method, data=DATA)


if __name__ == "__main__":
    main()
