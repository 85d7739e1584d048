"""MoCo with lightly and PyTorch Lightning, with and without non-semantic negatives.

Beside the entries of the memory bank, each query has a negative that is made of its own image, tiled with patches of
itself (arXiv 2110.14189). Data, backbone and score are those of `lightly_moco.py`.

    python examples/lightly_non_semantic.py
    python examples/lightly_non_semantic.py --data CIFAR10 --epochs 10
"""

from __future__ import annotations

from typing import Any

from lightly.loss import NTXentLoss
from torch import Tensor

from _shared import lightly_training
from _shared.compare import compare
from _shared.images import DATA
from undimix_lightly.non_semantic import NonSemanticNegatives, NonSemanticTransform, non_semantic_columns
from undimix_plugins import undimix


class MoCo(lightly_training.MoCo):
    """lightly's MoCo, whose queries have a non-semantic negative or not."""

    def __init__(self, non_semantic: bool, data: str = "MNIST") -> None:
        super().__init__(data)
        self.criterion = NTXentLoss(temperature=0.2, memory_bank_size=(self.bank_size, 128))
        self.non_semantic = None
        if non_semantic:
            self.non_semantic = NonSemanticTransform("patch")
            # With UnDiMix's weights on the bank's entries: compose(UnDiMix(), NonSemanticNegatives(alpha=2.0)).
            self.criterion = undimix(self.criterion, NonSemanticNegatives(alpha=2.0))

    def training_step(self, batch: lightly_training.Batch, batch_idx: int) -> Tensor:
        if self.non_semantic is None:
            return super().training_step(batch, batch_idx)
        query, key = self.query_and_key(batch)
        (x_query, _), _, _ = batch
        with non_semantic_columns(self.forward_momentum(self.non_semantic(x_query))):
            return self.criterion(query, key)


def train(non_semantic: bool, *, epochs: int = 2, **options: Any) -> tuple[MoCo, float, float]:
    """Trains MoCo with `seed`, `data`, `max_steps` and `progress` as `lightly_training.fit` takes them."""
    return lightly_training.fit(lambda data: MoCo(non_semantic, data), epochs=epochs, **options)


def main() -> None:
    compare(
        str(__doc__),
        train,
        score="k-NN accuracy",
        plain="NTXentLoss",
        method="with non-semantic negatives",
        data=DATA,
    )


if __name__ == "__main__":
    main()
