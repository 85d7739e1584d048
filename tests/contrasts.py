"""What the tests compare on: small contrasts spelled out anchor by anchor, in float64."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from undimix_plugins import Contrast, checks
from undimix_plugins.toolkit import LastLayerInputs


def make_every_look_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device whose values cannot be read without waiting for it: the core decides nothing by them."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "undimix_plugins" and hasattr(module, "values_are_free"):
            monkeypatch.setattr(module, "values_are_free", lambda tensor: False)
    # The first time, what a warning is about is looked at although that costs.
    monkeypatch.setattr(checks, "LOOKED", {"negatives", "debiasing"})


class Case(NamedTuple):
    """A contrast in plain lists, from which both the `Contrast` and the slow references are made."""

    anchors: Tensor
    positives: Tensor
    pool: Tensor
    temperature: float
    own_columns: list[int]  # each anchor's own column of the pool, -1 for none
    excluded: list[list[int]]  # further columns that are no negatives, of any length
    positives_in_pool: bool
    anchor_inputs: Tensor | None = None
    pool_inputs: Tensor | None = None

    @property
    def last_layer(self) -> LastLayerInputs | None:
        if self.anchor_inputs is None or self.pool_inputs is None:
            return None
        return LastLayerInputs(self.anchor_inputs, self.pool_inputs)

    def negatives(self, i: int) -> list[int]:
        return [j for j in range(len(self.pool)) if j != self.own_columns[i] and j not in self.excluded[i]]

    def is_negative(self) -> Tensor:
        marks = torch.zeros(len(self.anchors), len(self.pool), dtype=torch.bool)
        for i in range(len(self.anchors)):
            marks[i, self.negatives(i)] = True
        return marks

    def padded(self) -> Tensor:
        """`excluded` [n, k] with -1 for padding, in front too for every second anchor: its place must not matter."""
        width = max(map(len, self.excluded)) + 1
        front = [[-1] * (i % 2) + row for i, row in enumerate(self.excluded)]
        return torch.tensor([row + [-1] * (width - len(row)) for row in front])

    def contrast(self) -> Contrast:
        one_batch = self.anchors is self.pool
        return Contrast.of(
            self.anchors,
            self.positives,
            self.pool,
            self.padded() if any(self.excluded) else None,
            self.temperature,
            own_columns=None if one_batch else torch.tensor(self.own_columns),  # of one batch, the default is meant
            positives_in_pool=None if one_batch else self.positives_in_pool,
            last_layer=self.last_layer,
        )


def random_rows(count: int, width: int, seed: int, *, unit: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random rows, of length 1 or of lengths around 1."""
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (normalize(rows, dim=1) if unit else rows / width**0.5).to(dtype)


def in_batch(pairs: int, width: int = 5, *, temperature: float = 0.5, seed: int = 0, unit: bool = True) -> Case:
    """SimCLR: first views then second, everybody else's views as negatives."""
    n = 2 * pairs
    views = random_rows(n, width, seed, unit=unit)
    other = [(i + pairs) % n for i in range(n)]
    inputs = random_rows(n, 3, seed + 1, unit=False)
    return Case(
        views, views[other], views, temperature, list(range(n)), [[j] for j in other], True, inputs, inputs.clone()
    )


def bank(n: int, entries: int, width: int = 5, *, temperature: float = 0.5, seed: int = 0, unit: bool = True) -> Case:
    """MoCo: the pool is a memory bank, which holds neither the anchors nor their positives."""
    rows = random_rows(2 * n + entries, width, seed, unit=unit)
    inputs = random_rows(n + entries, 3, seed + 1, unit=False)
    anchors, positives, pool = rows[:n], rows[n : 2 * n], rows[2 * n :]
    return Case(anchors, positives, pool, temperature, [-1] * n, [[] for _ in range(n)], False, inputs[:n], inputs[n:])


def rectangular(
    n: int, m: int, offset: int, width: int = 5, *, temperature: float = 0.5, seed: int = 0, unit: bool = True
) -> Case:
    """A part of a pool: anchor i is its row offset + i, its positive the row after, and some have false negatives."""
    pool = random_rows(m, width, seed, unit=unit)
    inputs = random_rows(m, 3, seed + 1, unit=False)
    own = list(range(offset, offset + n))
    positive = [(j + 1) % m for j in own]
    # Every second anchor has a known false negative, named twice; every third no column of its own.
    excluded = [[j, (j + 2) % m, (j + 2) % m] if i % 2 else [j] for i, j in enumerate(positive)]
    own_columns = [j if i % 3 else -1 for i, j in enumerate(own)]
    return Case(
        pool[own].clone(), pool[positive], pool, temperature, own_columns, excluded, True, inputs[own].clone(), inputs
    )


# Contrasts of each form, of odd sizes, for a weighting's equation against a loop.
SHAPES = {
    "in-batch-2": in_batch(1),
    "in-batch-10": in_batch(5, temperature=0.2),
    "in-batch-6-raw": in_batch(3, unit=False),
    "bank-4x9": bank(4, 9, temperature=0.1),
    "bank-1x1": bank(1, 1),
    "rectangular-5x9": rectangular(5, 9, offset=2),
    "rectangular-6x7-raw": rectangular(6, 7, offset=1, unit=False),
}
