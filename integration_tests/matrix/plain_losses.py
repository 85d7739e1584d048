"""The published losses of what PyG and transformers have no loss for: the control of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, one_hot


class Plain(nn.Module):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def logits(self, rows: Tensor, columns: Tensor) -> Tensor:
        return cosine_similarity(rows[:, None], columns[None], dim=2) / self.temperature


class PlainGraphCL(Plain):
    """arXiv 2010.13902, equation 3: the positive is not in the denominator."""

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        logits = self.logits(z1, z2)
        others = logits.masked_fill(torch.eye(len(z1), dtype=torch.bool), -torch.inf)
        return (others.logsumexp(dim=1) - logits.diagonal()).mean()


class PlainGRACE(Plain):
    """arXiv 2006.04131, equations 1 and 2."""

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        both, count = torch.cat([z1, z2]), len(z1)
        logits = self.logits(both, both).masked_fill(torch.eye(2 * count, dtype=torch.bool), -torch.inf)
        return cross_entropy(logits, torch.arange(2 * count).roll(count))


class PlainInfoGraph(Plain):
    """The mean over a graph's nodes of the cross-entropy of each among all nodes."""

    def forward(self, graphs: Tensor, nodes: Tensor, batch: Tensor) -> Tensor:
        surprise = -self.logits(graphs, nodes).log_softmax(dim=1)
        own = one_hot(batch, len(graphs)).T.to(surprise)
        return ((surprise * own).sum(dim=1) / own.sum(dim=1)).mean()


class PlainSimCSE(Plain):
    """arXiv 2104.08821, equations 4 and 5, as the Trainer calls a loss."""

    def __init__(self, temperature: float, rows_per_example: int) -> None:
        super().__init__(temperature)
        self.rows_per_example = rows_per_example

    def forward(self, outputs: Any, labels: Tensor | None = None, num_items_in_batch: Any = None) -> Tensor:
        first, *others = (
            outputs.last_hidden_state[i :: self.rows_per_example, 0] for i in range(self.rows_per_example)
        )
        return cross_entropy(self.logits(first, torch.cat(others)), torch.arange(len(first)))
