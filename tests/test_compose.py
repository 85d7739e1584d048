"""Several methods at once are one after the other, and what every one of the new ones has to do in all places."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from tests import references
from tests.contrasts import in_batch, make_every_look_cost, random_rows
from tests.releases import needs, only_before
from tests.test_debiased import published
from tests.test_false_negatives import (
    FORMS,
    SEVERAL,
    Form,
    as_lists,
    assert_same,
    by_equation,
    made,
    of_case,
    of_in_batch_negatives,
    of_several,
    of_two_views,
    plain_info_nce,
    plain_log_sums,
    slow_found,
)
from tests.test_fast import HarderHalf, Waits, blocks, total
from tests.test_ring import outside
from undimix_plugins import (
    BCL,
    HCL,
    Contrast,
    Debiased,
    FalseNegativeAttraction,
    FalseNegativeElimination,
    MoCHi,
    ProGCL,
    Ring,
    SimilarityPenalty,
    UnDiMix,
    Uniform,
    Weighting,
    compose,
    decoupled,
    effective_number,
    explain,
    importance_weights,
    info_nce,
    negative_statistics,
    support_set,
    two_views,
    watch,
)
from undimix_plugins.toolkit import log_sums
from undimix_plugins.weightings.compose import Composed
from undimix_plugins.weightings.weighting import Softened

RING, FEWER, MORE = Ring(20, 80), FalseNegativeElimination(2, 0.2), FalseNegativeAttraction(2, 0.2)


@dataclass(frozen=True)
class Scaled(Weighting):
    """A user's own that changes the sum."""

    factor: float

    def combine(self, contrast: Contrast, positives: Tensor, negatives: Tensor, count: Tensor) -> Tensor:
        return negatives * self.factor

    log_weights = Uniform.log_weights


@dataclass(frozen=True)
class Added(Weighting):
    """Another."""

    number: float

    def combine(self, contrast: Contrast, positives: Tensor, negatives: Tensor, count: Tensor) -> Tensor:
        return negatives + self.number

    log_weights = Uniform.log_weights


SINGLE: dict[str, Weighting] = {
    "debiased": Debiased(0.1),
    "ring": RING,
    "elimination": FEWER,
    "attraction": MORE,
}
COMPOSED: dict[str, Weighting] = {
    "undimix-debiased": compose(UnDiMix(), Debiased(0.1)),
    "undimix-ring": compose(UnDiMix(), RING),
    "linear-elimination": compose(UnDiMix(mixing="linear"), FEWER),
    "undimix-attraction": compose(UnDiMix(), MORE),
    "ring-attraction": compose(RING, MORE),
    "elimination-ring-debiased": compose(FEWER, RING, Debiased(0.05)),
    "undimix-hcl": compose(UnDiMix(), HCL(0.5, 0.0)),
    "undimix-hcl-elimination": compose(UnDiMix(distance="euclidean"), HCL(0.5, 0.0), FEWER),
    "undimix-attraction-debiased": compose(UnDiMix(), MORE, Debiased(0.05)),
    "penalty-ring": compose(SimilarityPenalty(2.0), RING),
    "bcl-undimix": compose(BCL(), UnDiMix()),
}
ALL = SINGLE | COMPOSED
each = pytest.mark.parametrize("name", ALL)
each_composed = pytest.mark.parametrize("name", COMPOSED)
each_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(params=[True, False], ids=["kept", "by-block"], autouse=True)
def small(request: pytest.FixtureRequest) -> Iterator[None]:
    with blocks(kept=request.param):
        yield


once = pytest.mark.parametrize("small", [True], ids=["kept"], indirect=True)


def slow_log_weights(weighting: Weighting, contrast: Contrast) -> Tensor:
    """A part's own log-weights [n, m] by its plain path, constant."""
    every = slice(0, len(contrast.anchors))
    return weighting.log_weights(weighting.prepare(contrast), every).detach()


# What is equal to what.


@each
@pytest.mark.parametrize("form", ["ring-9-raw", "pair", "bank-5x11", "rectangular-5x9", "two-views-14"])
def test_equals_the_plain_path(form: str, name: str) -> None:
    of, weighting = made(form), ALL[name]
    assert_same(info_nce(of.contrast, weighting), plain_info_nce(of.contrast, weighting), of.inputs)
    if "attraction" not in name:
        got, want = total(log_sums(of.contrast, weighting)), plain_log_sums(of.contrast, weighting)
        assert_same(got, want, of.inputs)


@each_form
def test_undimix_on_those_that_are_left(form: str) -> None:
    of = made(form)
    for loss in (info_nce, decoupled):
        for chooser, changed in ((FEWER, of.contrast.without), (MORE, of.contrast.with_positives)):
            got = loss(of.contrast, compose(UnDiMix(), chooser))
            assert_same(got, loss(changed(chooser.found(of.contrast)), UnDiMix()), of.inputs)


@pytest.mark.parametrize("form", ["in-batch-10", "bank-5x11", "rectangular-5x9"])
def test_undimix_and_elimination_against_the_loop(form: str) -> None:
    of = made(form)
    found = slow_found(of, 2, 0.2)
    assert any(found)
    left = of.case._replace(excluded=[[*row, *gone] for row, gone in zip(of.case.excluded, found, strict=True)])
    weights = references.log_weights(left, UnDiMix()).exp().nan_to_num()
    want = by_equation(of, left_out=found, weights=weights.detach())
    torch.testing.assert_close(info_nce(of.contrast, compose(UnDiMix(), FEWER)), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", [*FORMS, *SEVERAL])
def test_all_three_at_once_against_the_loop(form: str) -> None:
    """A ring, then attraction among it, debiased by the mean of what is positive then."""
    of = made(form)
    weighting = compose(Debiased(0.1), RING, MORE)
    gone = outside(of, 20, 80)
    rest = of._replace(case=of.case._replace(excluded=[[*a, *b] for a, b in zip(of.case.excluded, gone, strict=True)]))
    found = slow_found(rest, 2, 0.2)
    case, t, losses = rest.case, rest.case.temperature, []
    for i in range(len(case.anchors)):
        columns = [*(of.listed[i] if of.listed else []), *found[i]]
        logits = [case.anchors[i] @ case.pool[j] / t for j in columns]
        logits += [case.anchors[i] @ case.positives[i] / t] if of.listed is None else []
        one = torch.stack([case.anchors[i] @ case.pool[j] / t for j in range(len(case.pool))])
        negatives = [j for j in case.negatives(i) if j not in columns]
        if not logits:
            losses.append(torch.zeros((), dtype=torch.float64))
            continue
        positives = torch.stack(logits).exp()
        estimate = torch.zeros((), dtype=torch.float64)
        if negatives:
            number = len(negatives)
            estimate = (one[negatives].exp().sum() - 0.1 * number * positives.mean()) / 0.9
            estimate = estimate.clamp(min=number * torch.tensor(-1 / t, dtype=torch.float64).exp())
        losses.append((positives.sum() + estimate).log() - torch.stack(logits).mean())
    assert_same(info_nce(of.contrast, weighting), torch.stack(losses).mean(), of.inputs)


@each_form
def test_choosing_is_in_the_order_given(form: str) -> None:
    of = made(form)
    gone = outside(of, 20, 80)
    rest = of._replace(case=of.case._replace(excluded=[[*a, *b] for a, b in zip(of.case.excluded, gone, strict=True)]))
    of_rest = [[*a, *b] for a, b in zip(gone, slow_found(rest, 2, 0.2), strict=True)]
    assert_same(info_nce(of.contrast, compose(RING, FEWER)), by_equation(of, left_out=of_rest), of.inputs)

    found = slow_found(of, 2, 0.2)
    rest = of._replace(case=of.case._replace(excluded=[[*a, *b] for a, b in zip(of.case.excluded, found, strict=True)]))
    of_rest = [[*a, *b] for a, b in zip(found, outside(rest, 20, 80), strict=True)]
    assert_same(info_nce(of.contrast, compose(FEWER, RING)), by_equation(of, left_out=of_rest), of.inputs)


@once
def test_choosing_in_another_order_differs() -> None:
    contrast = of_two_views(7).contrast
    one, other = (info_nce(contrast, compose(*parts)) for parts in ((RING, FEWER), (FEWER, RING)))
    assert (one - other).abs() > 1e-3


@pytest.mark.parametrize("form", [*FORMS, *SEVERAL])
def test_weights_are_multiplied(form: str) -> None:
    of = made(form)
    parts = UnDiMix(detached=True), SimilarityPenalty(1.5), HarderHalf()
    logs = sum(slow_log_weights(part, of.contrast) for part in parts)
    weights = torch.as_tensor(logs).exp()
    composed = compose(*parts)
    assert_same(info_nce(of.contrast, composed), by_equation(of, weights=weights), of.inputs)
    want = weights.masked_fill(~of.contrast.is_negative(slice(0, len(weights))), 0)
    torch.testing.assert_close(importance_weights(of.contrast, composed), want, rtol=1e-12, atol=1e-12)


@each_form
def test_the_gradient_of_a_product_flows_through_those_that_have_one(form: str) -> None:
    of = made(form)
    case, weights = of.case, references.weights_of(of.case, UnDiMix())
    losses = []
    for i in range(len(case.anchors)):
        negatives = case.negatives(i)
        positive = case.anchors[i] @ case.positives[i] / case.temperature
        scores = [case.anchors[i] @ case.pool[j] / case.temperature for j in negatives]
        if not negatives:
            losses.append(positive * 0)
            continue
        mean = sum((0.5 * score).exp() for score in scores) / len(scores)
        terms = [weights[i, j] * (1.5 * s).exp() / mean for j, s in zip(negatives, scores, strict=True)]
        losses.append((positive.exp() + sum(terms)).log() - positive)
    assert_same(info_nce(of.contrast, compose(UnDiMix(), HCL(0.5, 0.0))), torch.stack(losses).mean(), of.inputs)


@pytest.mark.parametrize("form", ["two-views-14", "bank-5x11"])
def test_sums_change_in_the_order_given(form: str) -> None:
    of = made(form)
    plain = log_sums(of.contrast, RING).negatives
    for parts, want in (
        ((Scaled(2.0), Added(1.0)), 2 * plain + 1),
        ((Added(1.0), Scaled(2.0)), 2 * (plain + 1)),
    ):
        got = log_sums(of.contrast, compose(RING, *parts)).negatives
        assert_same(total((got, got)), total((want, want)), of.inputs)


@pytest.mark.parametrize("form", ["two-views-14", "bank-5x11"])
def test_synthetic_negatives_join_what_is_debiased(form: str) -> None:
    of, weighting = made(form), compose(Debiased(0.1), MoCHi(N=4, s=3, s_prime=2), FEWER)
    compared = FEWER.choose(of.contrast)
    positives, negatives = log_sums(compared, Debiased(0.1))
    torch.manual_seed(0)
    want = MoCHi(N=4, s=3, s_prime=2).combine(compared, positives, negatives, compared.count)
    torch.manual_seed(0)
    got = log_sums(of.contrast, weighting).negatives
    assert (got > negatives).all()
    assert_same(total((got, got)), total((want, want)), of.inputs)


@each_form
def test_debiased_undimix(form: str) -> None:
    """Weights of mean 1, so that with equal ones it is what Debiased is by itself."""
    of = made(form)
    equal = UnDiMix(hardness=0.0)
    got = info_nce(of.contrast, compose(equal, Debiased(0.1)))
    assert_same(got, published(of, 0.1)[0], of.inputs)


# What a composition is.


def test_compose_of_one_is_itself() -> None:
    for part in (*SINGLE.values(), UnDiMix(), Uniform()):
        assert compose(part) is part
        assert compose(Uniform(), part) in (part, Uniform())
    assert compose(Uniform(), RING, Uniform()) is RING
    assert compose(Uniform(), Uniform()) == Uniform()


def test_nested_is_flat() -> None:
    nested = compose(compose(UnDiMix(), RING), Uniform(), compose(Debiased(0.1), FEWER))
    assert nested == compose(UnDiMix(), RING, Debiased(0.1), FEWER)
    assert isinstance(nested, Composed)
    assert nested.parts == (UnDiMix(), RING, Debiased(0.1), FEWER)


def test_equality_and_hash() -> None:
    one, same, other = compose(UnDiMix(), RING), compose(UnDiMix(), Ring(20, 80)), compose(RING, UnDiMix())
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one != compose(UnDiMix(), Ring(20, 81))
    assert one != RING
    assert len({one, same, other}) == 2


def test_repr_is_as_it_is_written() -> None:
    composed = compose(Debiased(0.2), RING, FEWER)
    assert repr(composed) == (
        "compose(Debiased(tau_plus=0.2), Ring(lower=20, upper=80), "
        "FalseNegativeElimination(k=2, threshold=0.2, aggregate='max'))"
    )
    for weighting in ALL.values():
        assert eval(repr(weighting)) == weighting


@each
@once
def test_copies(name: str) -> None:
    weighting, contrast = ALL[name], of_two_views(5).contrast
    for again in (pickle.loads(pickle.dumps(weighting)), copy.deepcopy(weighting), copy.copy(weighting)):
        assert again == weighting
        assert hash(again) == hash(weighting)
        assert torch.equal(info_nce(contrast, again), info_nce(contrast, weighting))


def test_citation() -> None:
    composed = compose(UnDiMix(), Scaled(2.0), RING, Debiased(0.1))
    for part in (UnDiMix(), RING, Debiased(0.1)):
        assert part.citation.strip() in composed.citation
    assert composed.citation.count("@") == 3
    assert "}\n@" in composed.citation
    assert composed.citation.endswith("}\n")
    assert compose(Scaled(2.0), Added(1.0)).citation == ""
    assert "chuang2020debiased" in Debiased().citation
    assert "wu2021conditional" in Ring().citation
    assert FEWER.citation == MORE.citation
    assert "huynh2022boosting" in MORE.citation


def test_softened() -> None:
    composed = compose(UnDiMix(hardness=2.0), Ring(60, 90), Debiased(0.4), FEWER, Added(1.0))
    half = composed.softened(0.5)
    assert half == Composed([UnDiMix(hardness=1.0), Ring(30, 95), Debiased(0.2), FEWER, Softened(Added(1.0), 0.5)])
    assert composed.softened(1) == composed
    assert composed.softened(0) == Uniform()
    with pytest.raises(ValueError, match=r"^share: expected a number from 0 to 1, got 3"):
        composed.softened(3)
    assert compose(half) == half
    assert compose(half, MoCHi()).softened(0.5).parts[1] == Ring(15, 97.5)  # type: ignore[attr-defined]


def test_softened_goes_on_from_the_plain_loss() -> None:
    of = of_two_views(9)
    composed = compose(UnDiMix(hardness=2.0), Debiased(0.3))
    values = [info_nce(of.contrast, composed.softened(share)) for share in (0, 1e-9, 1)]
    torch.testing.assert_close(values[0], info_nce(of.contrast, Uniform()), rtol=0, atol=0)
    torch.testing.assert_close(values[1], values[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(values[2], info_nce(of.contrast, composed), rtol=0, atol=0)


@each_form
def test_softened_of_any_compares_what_it_does(form: str) -> None:
    """What has no softening of its own goes by `w ** share`, on what it compares."""
    of = made(form)
    parts = compose(SimilarityPenalty(1.0), FEWER)
    got = info_nce(of.contrast, Softened(parts, 0.5))
    assert_same(got, info_nce(of.contrast, compose(SimilarityPenalty(0.5), FEWER)), of.inputs)
    got = info_nce(of.contrast, Softened(Debiased(0.0), 0.5))
    assert_same(got, info_nce(of.contrast, Uniform()), of.inputs)


@once
def test_softened_mochi_leaves_the_weights_to_undimix() -> None:
    """So that the fast path is taken in a warm-up too."""
    assert compose(UnDiMix(), MoCHi(N=4, s=2, s_prime=1)).softened(0.5)._weigher() == UnDiMix(hardness=0.5)


@once
def test_softened_ones_are_told_apart() -> None:
    assert Softened(BCL(), 0.5)._combines() is False
    both = compose(BCL().softened(0.5), ProGCL().softened(0.5))
    assert isinstance(both, Composed)
    with pytest.raises(ValueError, match=r"^weightings: expected each method once"):
        compose(BCL().softened(0.5), BCL())
    with pytest.raises(ValueError, match=r"^weightings: expected at most one that debiases"):
        compose(BCL().softened(0.5), Debiased())


def test_who_weighs_and_who_combines() -> None:
    assert compose(RING, FEWER)._weigher() == Uniform()
    assert compose(RING, Debiased())._weigher() == Uniform()
    assert compose(RING, UnDiMix(), FEWER)._weigher() == UnDiMix()
    several = compose(UnDiMix(), SimilarityPenalty(), RING)
    assert several._weigher() is several
    assert UnDiMix()._weigher() == UnDiMix()
    assert not compose(RING, UnDiMix())._combines()
    assert compose(RING, Debiased())._combines()
    assert not RING._combines()
    assert Debiased()._combines()
    assert HCL()._combines()


REFUSED: dict[str, tuple[tuple[Weighting, ...], str]] = {
    "none": ((), "expected at least one, got none"),
    "twice": ((UnDiMix(), UnDiMix(hardness=2.0)), "expected each method once, got UnDiMix(similarity=0.5, "),
    "twice-nested": ((compose(RING, UnDiMix()), Ring(1, 2)), "expected each method once, got compose(Ring(lower=20"),
    "both-false-negatives": (
        (MORE, FEWER),
        "expected false negatives to be left out or attracted, not both, got FalseNegativeAttraction(k=2",
    ),
    "debiased-twice": (
        (Debiased(), HCL()),
        "expected at most one that debiases (HCL(tau_plus=0) does not), got Debiased(",
    ),
    "debiased-bcl": ((BCL(), Debiased()), "expected at most one that debiases (HCL(tau_plus=0) does not), got BCL("),
    "hcl-bcl": ((HCL(), BCL()), "expected at most one that debiases (HCL(tau_plus=0) does not), got HCL("),
    "penalty": (
        (SimilarityPenalty(), Debiased()),
        "expected weights of mean 1 where Debiased debiases, which SimilarityPenalty's are not (a class of your own "
        "whose weights average 1 states has_mean_one = True), got SimilarityPenalty(",
    ),
    "penalty-hcl": (
        (HCL(), SimilarityPenalty()),
        "expected weights of mean 1 where HCL debiases, which SimilarityPenalty's are not (a class of your own whose "
        "weights average 1 states has_mean_one = True), got HCL(",
    ),
    "product": (
        (UnDiMix(), HCL()),
        "expected one method with weights where HCL debiases (HCL(tau_plus=0) does not), since debiasing is not "
        "defined for a product of weights, here of UnDiMix and HCL, got UnDiMix(",
    ),
    "product-debiased": (
        (UnDiMix(), HCL(tau_plus=0.0), Debiased()),
        "expected one method with weights where Debiased debiases (Debiased(tau_plus=0) does not), since debiasing is "
        "not defined for a product of weights, here of UnDiMix and HCL, got UnDiMix(",
    ),
    "mochi-first": (
        (MoCHi(), Debiased()),
        "expected debiasing before MoCHi, whose negatives are no draws that a class has a share of, got ",
    ),
    "mochi-first-hcl": ((MoCHi(), HCL()), "expected debiasing before MoCHi, whose negatives"),
}


@pytest.mark.parametrize("name", REFUSED)
@once
def test_refuses(name: str) -> None:
    weightings, message = REFUSED[name]
    with pytest.raises(ValueError, match=r"^weightings: ") as error:
        compose(*weightings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "weightings",
    [
        (Debiased(0.0), HCL()),
        (HCL(tau_plus=0.0), Debiased()),
        (HCL(tau_plus=0.0), SimilarityPenalty()),
        (BCL(), SimilarityPenalty()),
        (HCL(beta=0.0), UnDiMix()),
        (Debiased(), MoCHi()),
        (HCL(), MoCHi(), RING),
        (MoCHi(), HCL(tau_plus=0.0)),
        (MoCHi(), BCL()),
        (BCL(), UnDiMix()),
        (UnDiMix(), HCL(tau_plus=0.0)),
        (UnDiMix(), Debiased()),
        (ProGCL(), Debiased(), FEWER),
    ],
    ids=repr,
)
@once
def test_allows(weightings: tuple[Weighting, ...]) -> None:
    composed = compose(*weightings)
    assert isinstance(composed, Composed)
    assert composed.parts == weightings


@once
def test_refuses_what_is_no_weighting() -> None:
    with pytest.raises(TypeError, match=r"^weighting: expected an instance of Weighting.*got the class Ring"):
        compose(UnDiMix(), Ring)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^weighting: expected an instance of Weighting.*got 1"):
        compose(1)  # type: ignore[arg-type]


@once
def test_a_composed_attraction_has_no_place_in_log_sums() -> None:
    contrast = of_two_views(5).contrast
    with pytest.raises(ValueError, match=r"^weighting: expected one that makes no positives.*got compose\(UnDiMix\("):
        log_sums(contrast, compose(UnDiMix(), MORE))


# Everywhere that a weighting is looked at.


@each
@pytest.mark.parametrize("form", ["two-views-14", "rectangular-5x9", "bank-5x11"])
def test_importance_weights(form: str, name: str) -> None:
    of, weighting = made(form), ALL[name]
    weights = importance_weights(of.contrast, weighting)
    compared = weighting.choose(of.contrast)
    negative = compared.is_negative(slice(0, len(weights)))
    assert ((weights > 0) <= negative).all()
    assert not weights.requires_grad
    want = slow_log_weights(weighting._weigher(), compared).exp().masked_fill(~negative, 0)
    torch.testing.assert_close(weights, want, rtol=0, atol=0)


@once
def test_importance_weights_of_what_does_not_weigh() -> None:
    of = of_two_views(7)
    weights = importance_weights(of.contrast, compose(FEWER, Debiased(0.1)))
    want = of.case.is_negative().double()
    for i, row in enumerate(slow_found(of, 2, 0.2)):
        want[i, row] = 0
    assert torch.equal(weights, want)


@each
@pytest.mark.parametrize("form", ["two-views-14", "in-batch-negatives-7", "bank-5x11"])
def test_statistics(form: str, name: str) -> None:
    of, weighting = made(form), ALL[name]
    weights = importance_weights(of.contrast, weighting)
    statistics = negative_statistics(of.contrast, weighting)
    count = weighting.choose(of.contrast).count
    has = count > 0
    assert statistics["count"] == pytest.approx(count[has].mean().item())
    assert statistics["effective_number"] == pytest.approx(effective_number(weights)[has].mean().item())
    assert 0 < statistics["weight_on_hardest"] <= 1


@once
def test_statistics_of_false_negatives() -> None:
    of, labels = of_two_views(7), torch.arange(7) % 3
    same = (labels.repeat(2)[:, None] == labels.repeat(2)).double()
    for weighting in (FEWER, MORE, compose(UnDiMix(), FEWER)):
        weights = importance_weights(of.contrast, weighting)
        negative = (weights > 0).double()
        statistics = negative_statistics(of.contrast, weighting, labels=labels)
        share = (negative * same).sum(dim=1) / negative.sum(dim=1)
        assert statistics["false_negatives"] == pytest.approx(share.mean().item())
        weighted = (weights * same).sum(dim=1) / weights.sum(dim=1)
        assert statistics["weight_on_false_negatives"] == pytest.approx(weighted.mean().item())


@each
@once
def test_explain(name: str) -> None:
    of, weighting = of_two_views(7), ALL[name]
    weights = importance_weights(of.contrast, weighting)
    explanation = explain(of.contrast, weighting, anchor=3, k=20)
    negative = weighting.choose(of.contrast).is_negative(slice(3, 4))[0]
    assert explanation.weighting is weighting
    assert explanation.negatives == len(explanation.most) == negative.sum()
    assert sorted(one.column for one in explanation.most) == negative.nonzero()[:, 0].tolist()
    for one in explanation.most:
        assert one.weight == pytest.approx(weights[3, one.column].item())
    by_weight = [one.weight for one in explanation.most]
    assert by_weight == sorted(by_weight, reverse=True)
    assert repr(weighting) in str(explanation)
    assert bool(explanation.most[0].parts) == (type(weighting._weigher()) is UnDiMix)


@each
@once
def test_watched(name: str) -> None:
    of, weighting, seen = of_two_views(7), ALL[name], []
    with watch(lambda contrast, by: seen.append((contrast, by, negative_statistics(contrast, by)))):
        info_nce(of.contrast, weighting)
    ((contrast, by, statistics),) = seen
    assert by is weighting
    assert contrast.positive_columns is None
    assert statistics == pytest.approx(negative_statistics(of.contrast, weighting))


TEMPERED = {
    "two-views": lambda t: of_two_views(5, temperature=t),
    "in-batch-negatives": lambda t: of_in_batch_negatives(5, temperature=t),
    "several": lambda t: of_several(temperature=t),
    "several-of-one-batch": lambda t: of_several(temperature=t, one_batch=True),
}


@pytest.mark.parametrize("form", TEMPERED)
def test_a_learned_temperature(form: str) -> None:
    log_scale = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    of: Form = TEMPERED[form]((-log_scale).exp())
    inputs = [*of.inputs, log_scale]
    found = slow_found(of, 2, 0.2)
    assert any(found)
    assert_same(info_nce(of.contrast, FEWER), by_equation(of, left_out=found), inputs)
    assert_same(info_nce(of.contrast, MORE), by_equation(of, attracted=found), inputs)
    assert_same(info_nce(of.contrast, RING), by_equation(of, left_out=outside(of, 20, 80)), inputs)
    assert_same(info_nce(of.contrast, Debiased(0.1)), published(of, 0.1)[0], inputs)
    weights = slow_log_weights(UnDiMix(detached=True), FEWER.choose(of.contrast)).exp()
    want = by_equation(of, left_out=found, weights=weights)
    assert_same(info_nce(of.contrast, compose(UnDiMix(detached=True), FEWER)), want, inputs)
    weights = slow_log_weights(UnDiMix(detached=True), MORE.choose(of.contrast)).exp()
    want = by_equation(of, attracted=found, weights=weights)
    assert_same(info_nce(of.contrast, compose(UnDiMix(detached=True), MORE)), want, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    rows = [normalize(random_rows(7, 6, seed=seed), dim=1).to(dtype).requires_grad_() for seed in (1, 2)]
    single = [row.detach().float().requires_grad_() for row in rows]
    loss, want = (info_nce(two_views(*of, 0.3), ALL[name]) for of in (rows, single))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=0, atol=0)
    for gradient, expected in zip(torch.autograd.grad(loss, rows), torch.autograd.grad(want, single), strict=True):
        assert gradient.dtype == dtype
        rounding = 2 * torch.finfo(dtype).eps * expected.abs().max().item()  # of sums in that precision
        torch.testing.assert_close(gradient.float(), expected, rtol=0, atol=rounding)


@each
def test_under_autocast(name: str) -> None:
    rows = [normalize(random_rows(7, 6, seed=seed), dim=1).float() for seed in (1, 2)]
    want = info_nce(two_views(*rows, 0.3), ALL[name])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(info_nce(two_views(*rows, 0.3), ALL[name]), want, rtol=0, atol=0)


class Loss(nn.Module):
    def __init__(self, weighting: Weighting) -> None:
        super().__init__()
        self.weighting = weighting

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        first, second = (normalize(rows, dim=1) for rows in (first, second))
        return info_nce(two_views(first, second, 0.3), self.weighting)


def compiled_and_not(weighting: Weighting, of: Form) -> tuple[Tensor, Tensor]:
    torch.compiler.reset()
    loss = Loss(weighting)
    return torch.compile(loss, fullgraph=True, backend="eager")(*of.inputs), loss(*of.inputs)


NOT_WHOLE = ("torch", "2.10", "it compiles what changes the compared negatives in parts, not whole")
COMPILE_IN_PARTS = ["elimination", "undimix-attraction-debiased"]


@pytest.mark.parametrize("name", [*SINGLE, "undimix-ring", "undimix-attraction-debiased"])
@once
def test_compiles(name: str) -> None:
    if any(part in name for part in ("ring", "elimination", "attraction")):
        needs(*NOT_WHOLE)
    of = of_two_views(6)
    assert_same(*compiled_and_not(ALL[name], of), of.inputs)


@only_before(*NOT_WHOLE[:2])
@pytest.mark.parametrize("name", COMPILE_IN_PARTS)
@once
def test_an_old_torch_refuses_to_compile_it_whole(name: str) -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled_and_not(ALL[name], of_two_views(6))


@pytest.mark.parametrize("name", ["ring", *COMPILE_IN_PARTS])
@once
def test_compiles_in_parts(name: str) -> None:
    """As `torch.compile` does by default, in every release."""
    torch.compiler.reset()
    of, loss = of_two_views(6), Loss(ALL[name])
    assert_same(torch.compile(loss, backend="eager")(*of.inputs), loss(*of.inputs), of.inputs)


@once
def test_inductor_compiles_it() -> None:
    """One with all that changes what is compared, and its sum."""
    needs(*NOT_WHOLE)
    torch.compiler.reset()
    of, loss = of_two_views(6), Loss(compose(UnDiMix(), Debiased(), FalseNegativeElimination(k=2)))
    assert_same(torch.compile(loss, fullgraph=True)(*of.inputs), loss(*of.inputs), of.inputs)


@once
def test_the_compiler_takes_a_ring_that_is_annealed() -> None:
    needs(*NOT_WHOLE)
    torch.compiler.reset()
    of, loss = of_two_views(6), Loss(RING)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for share in (0.0, 0.1):
        loss.weighting = RING.softened(share)
        compiled(*of.inputs)
    with torch.compiler.set_stance("fail_on_recompile"):
        for share in (0.2, 0.5, 1.0):
            loss.weighting = RING.softened(share)
            assert_same(compiled(*of.inputs), loss(*of.inputs), of.inputs)


@once
def test_compiles_with_a_support_set() -> None:
    needs(*NOT_WHOLE)
    torch.compiler.reset()
    of, support = of_two_views(6), [random_rows(6, 4, seed=seed) for seed in (7, 8)]
    loss = Loss(MORE)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    found = []
    for views in (support[:1], support[1:], support, []):
        with support_set(*views) if views else nullcontext():
            assert_same(compiled(*of.inputs), loss(*of.inputs), of.inputs)
        found.append(slow_found(of, 2, 0.2, "max", views))
    assert len({str(one) for one in found}) == 4


@once
def test_a_new_batch_of_a_support_set_is_not_compiled_again() -> None:
    needs(*NOT_WHOLE)
    torch.compiler.reset()
    of, loss = of_two_views(6), Loss(FEWER)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for seed in (7, 8):
        with support_set(random_rows(6, 4, seed=seed)):
            compiled(*of.inputs)
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in (9, 10):
            with support_set(random_rows(6, 4, seed=seed)):
                assert_same(compiled(*of.inputs), loss(*of.inputs), of.inputs)


@each
@once
def test_a_device_is_not_waited_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = of_two_views(7)
    make_every_look_cost(monkeypatch)
    with Waits() as waits:
        torch.autograd.grad(info_nce(of.contrast, ALL[name]), of.inputs)
    assert not waits.seen


@each
@once
def test_a_pair_without_negatives(name: str) -> None:
    of = of_case(in_batch(1))
    loss = info_nce(of.contrast, ALL[name])
    assert loss == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, of.inputs, materialize_grads=True))


def test_found_columns_are_of_what_is_left() -> None:
    """A composed attraction has no positive among what a ring left out."""
    of = of_two_views(9)
    compared = compose(RING, FalseNegativeAttraction(3, -1.0)).choose(of.contrast)
    assert compared.positive_columns is not None
    for row, gone in zip(as_lists(compared.positive_columns), outside(of, 20, 80), strict=True):
        assert len(row) == 3
        assert not set(row) & set(gone)
