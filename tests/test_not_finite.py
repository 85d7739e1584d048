"""Where values are not looked at, here in a compiled forward, what is not finite makes the loss NaN."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from undimix_plugins import HCL, Contrast, UnDiMix, Uniform, Weighting, info_nce

WEIGHTINGS: dict[str, Weighting] = {"Uniform": Uniform(), "UnDiMix": UnDiMix(), "HCL": HCL()}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["anchors", "positives", "pool"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_loss_is_nan(weighting: str, where: str, value: float) -> None:
    rows = {"anchors": torch.ones(3, 4), "positives": torch.ones(3, 4), "pool": -torch.rand(5, 4)}

    @torch.compile(backend="eager", fullgraph=True)
    def loss(anchors: Tensor, positives: Tensor, pool: Tensor) -> Tensor:
        return info_nce(Contrast.of(anchors, positives, pool, None, 0.5), WEIGHTINGS[weighting])

    assert loss(**rows).isfinite()
    rows[where][1, 2] = value
    assert loss(**rows).isnan()
