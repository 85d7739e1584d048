"""Weightings and other settings as hyperparameters: copied field by field, saved, loaded with weights alone."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
import torch

from tests.contrasts import random_rows
from undimix_plugins import (
    ADNCE,
    BCL,
    HCL,
    ActiveSampling,
    Debiased,
    FalseNegativeAttraction,
    FalseNegativeElimination,
    IMix,
    MoCHi,
    PositiveAware,
    ProGCL,
    Ring,
    SimilarityPenalty,
    UnDiMix,
    Uniform,
    UnMix,
    compose,
    two_views,
)

SETTINGS = [
    UnDiMix(hardness=2.0),
    HCL(beta=0.5),
    HCL(alpha=0.5),
    ADNCE(),
    PositiveAware(),
    Debiased(),
    Ring(),
    BCL(),
    SimilarityPenalty(),
    SimilarityPenalty(5.0, "hard_negatives"),
    FalseNegativeElimination(k=3),
    FalseNegativeAttraction(k=3),
    MoCHi(N=4),
    Uniform(),
    Ring().softened(0.5),
    BCL().softened(0.5),
    compose(UnDiMix(), Debiased(), FalseNegativeElimination(k=8)),
    IMix(),
    UnMix(),
    ActiveSampling(8),
]


def loaded(what: Any) -> Any:
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: type(settings).__name__)
def test_are_loaded_with_weights_alone(settings: object) -> None:
    assert loaded({"weighting": settings})["weighting"] == settings


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: type(settings).__name__)
def test_may_be_set_to_what_they_are_and_to_nothing_else(settings: Any) -> None:
    for field in dataclasses.fields(settings) if dataclasses.is_dataclass(settings) else ():
        before = getattr(settings, field.name)
        setattr(settings, field.name, before)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings, field.name, "something else")
        assert getattr(settings, field.name) == before


def test_a_fitted_mixture_is_loaded_too() -> None:
    weighting = ProGCL(start=1)
    weighting.fit(two_views(random_rows(6, 4, 0), random_rows(6, 4, 1), 0.5))
    again = loaded(weighting)
    assert repr(again) == repr(weighting)
    assert torch.equal(again.mixture.alphas, weighting.mixture.alphas)  # type: ignore[union-attr]
