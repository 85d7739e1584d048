"""What weightings state of themselves holds, and the core goes by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contrasts import bank, in_batch, random_rows
from undimix_plugins import (
    ADNCE,
    BCL,
    HCL,
    Contrast,
    Debiased,
    FalseNegativeElimination,
    MoCHi,
    PositiveAware,
    ProGCL,
    Ring,
    SimilarityPenalty,
    UnDiMix,
    Uniform,
    Weighting,
    compose,
    explain,
    importance_weights,
    info_nce,
    two_views,
)
from undimix_plugins.weightings import EqualWeights, Terms, mean_one
from undimix_plugins.weightings.weighting import Softened


class Farther(Weighting):
    """Weights of no particular mean."""

    def log_weights(self, prepared: Contrast, rows: slice) -> Tensor:
        return -prepared.logits(rows).detach()

    def terms(self, prepared: Contrast, rows: slice) -> Terms:
        return Terms({"distance": self.log_weights(prepared, rows)}, of_logarithm=True)


class FartherOnAverage(Farther):
    has_mean_one = True

    def log_weights(self, prepared: Contrast, rows: slice) -> Tensor:
        return mean_one(super().log_weights(prepared, rows), prepared.is_negative(rows))


WEIGHTINGS = [
    ADNCE(),
    ADNCE(0.2, 0.1),
    BCL(),
    Debiased(),
    FalseNegativeElimination(k=2),
    HCL(),
    HCL(beta=0.0),
    HCL(alpha=0.5),
    MoCHi(4, 3, 2),
    PositiveAware(),
    ProGCL(start=1),
    Ring(20, 80),
    SimilarityPenalty(),
    SimilarityPenalty(5.0, "in_batch_negatives"),
    UnDiMix(),
    UnDiMix(mixing="linear"),
    Uniform(),
    Farther(),
    FartherOnAverage(),
    compose(UnDiMix(), Debiased()),
    compose(UnDiMix(), SimilarityPenalty()),
]


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_weights_that_have_mean_one_do(weighting: Weighting) -> None:
    for case in (in_batch(5), bank(4, 9)):
        contrast = case.contrast()
        weights, count = importance_weights(contrast, weighting), weighting.choose(contrast).count
        if weighting.has_mean_one:
            torch.testing.assert_close(weights.sum(dim=1), count, rtol=1e-12, atol=1e-12)


def test_who_has_mean_one() -> None:
    without = {type(weighting).__name__ for weighting in WEIGHTINGS if not weighting.has_mean_one}
    assert without == {"BCL", "SimilarityPenalty", "Farther", "Composed"}
    assert compose(UnDiMix(), Debiased()).has_mean_one
    assert not compose(UnDiMix(), SimilarityPenalty()).has_mean_one


def test_who_debiases() -> None:
    assert [weighting.debiases for weighting in (Debiased(), HCL(), BCL(), compose(Debiased(), Ring()))] == [True] * 4
    assert [weighting.debiases for weighting in (Debiased(0), HCL(tau_plus=0), UnDiMix(), Uniform())] == [False] * 4


def test_who_scales_the_positives_term() -> None:
    assert {weighting.positive_factor for weighting in WEIGHTINGS if weighting != HCL(alpha=0.5)} == {1.0}
    alpha = HCL(tau_plus=0.0, alpha=0.5)
    assert [weighting.positive_factor for weighting in (alpha, compose(UnDiMix(), alpha))] == [0.5, 0.5]


def test_who_needs_the_last_layer() -> None:
    at_weight = UnDiMix(gradient="weight")
    for weighting in (at_weight, compose(at_weight, Ring()), Softened(at_weight, 0.5)):
        assert weighting.needs_last_layer
    for weighting in (UnDiMix(), HCL(), compose(UnDiMix(), Ring())):
        assert not weighting.needs_last_layer


def test_ones_own_weighting_is_debiased_only_where_its_mean_is_known() -> None:
    message = (
        r"expected weights of mean 1 where \w+ debiases, which Farther's are not \(a class of your own whose weights "
        r"average 1 states has_mean_one = True\)"
    )
    for parts in ([Farther(), Debiased()], [Debiased(), Farther()], [Farther(), HCL(beta=0.0)]):
        with pytest.raises(ValueError, match=message):
            compose(*parts)
    assert compose(FartherOnAverage(), Debiased()).debiases
    assert compose(Farther(), Debiased(tau_plus=0)).has_mean_one is False
    assert compose(Farther(), HCL(beta=0.0, tau_plus=0.0)) is not None


@pytest.mark.parametrize("base", [UnDiMix, Uniform, EqualWeights])
def test_a_subclass_that_weighs_otherwise_goes_its_own_way(base: type[Weighting]) -> None:
    own = type("Own", (base,), {"log_weights": lambda self, prepared, rows: Farther().log_weights(prepared, rows)})
    own.prepare = Weighting.prepare  # type: ignore[method-assign]
    contrast = in_batch(4).contrast()
    torch.testing.assert_close(info_nce(contrast, own()), info_nce(contrast, Farther()), rtol=1e-12, atol=1e-12)


def test_explain_tells_ones_own_terms() -> None:
    explanation = explain(in_batch(4).contrast(), Farther(), anchor=2, k=3)
    for negative in explanation.most:
        assert negative.parts["distance"] == pytest.approx(torch.tensor(negative.weight).log().item(), abs=1e-6)
    assert explanation.rest == pytest.approx(0, abs=1e-12)
    assert "log(weight) = distance" in str(explanation)
    explanation.plot().figure.clear()


def test_a_contrast_is_made_by_of() -> None:
    rows: Any = random_rows(4, 3, seed=0)
    with pytest.raises(TypeError, match="positional argument"):
        Contrast(rows, rows, rows, None, 0.5)  # type: ignore[call-arg, misc]
    contrast = two_views(rows, rows.flip(0), 0.5)
    assert contrast.excluded.dtype == torch.long
    assert contrast.positives_in_pool is True
