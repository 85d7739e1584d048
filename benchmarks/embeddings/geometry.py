"""Alignment and uniformity: how a loss spreads embeddings over the sphere (Wang & Isola 2020, arXiv 2005.10242)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

MOST_ROWS = 2000  # the distances between more rows would take longer than some trainings


def geometry(one: Tensor, other: Tensor, rows: Tensor) -> dict[str, float]:
    """The metrics "alignment" and "uniformity" of embeddings. Both are better if lower.

        alignment:  mean over pairs of |x - y|^2,    uniformity:  log of the mean over all pairs of exp(-2 |x - y|^2)

    of embeddings scaled to length 1. An alignment is from 0 to 4, a uniformity from -8 to 0.

    Args:
        one: Embeddings [pairs, width].
        other: Embeddings [pairs, width] that should be near: row i to row i of `one`.
        rows: Embeddings [n, width], at least two, that should be apart. The first 2,000 are compared.
    """
    one, other, rows = (normalize(part.float(), dim=1) for part in (one, other, rows[:MOST_ROWS]))
    squares = torch.pdist(rows).square()
    return {
        "alignment": float((one - other).square().sum(dim=1).mean()),
        "uniformity": float(squares.mul(-2).exp().mean().log()),
    }
