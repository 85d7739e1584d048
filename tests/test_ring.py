"""The ring is the places between two percentiles of a sorted list, and its loss the authors', value and gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from tests.contrasts import bank, in_batch, random_rows
from tests.test_false_negatives import (
    FORMS,
    SEVERAL,
    Form,
    assert_same,
    by_equation,
    made,
    of_case,
    of_two_views,
    plain_info_nce,
    plain_log_sums,
)
from tests.test_fast import blocks, total
from undimix_plugins import (
    Contrast,
    Ring,
    Uniform,
    decoupled,
    importance_weights,
    in_batch_negatives,
    info_nce,
    two_views,
)
from undimix_plugins import blocks as block_sizes
from undimix_plugins.toolkit import log_sums, same_label

RINGS = [(0, 100), (90, 99), (50, 90), (20, 80), (0, 50), (33.3, 66.6), (99.9, 100), (0, 0.1)]
each_ring = pytest.mark.parametrize("ring", RINGS, ids=str)
each_form = pytest.mark.parametrize("form", [*FORMS, *SEVERAL])


@pytest.fixture(params=[True, False], ids=["kept", "by-block"], autouse=True)
def small(request: pytest.FixtureRequest) -> Iterator[None]:
    with blocks(kept=request.param):
        yield


def slow_ring(similarities: list[float], lower: float, upper: float) -> list[int]:
    """The places of those that are kept, and of what is as similar as the first or the last of them."""
    ordered = sorted(range(len(similarities)), key=lambda j: -similarities[j])
    n = len(ordered)
    nearest = n * (100 - Fraction(str(upper))) // 100
    end = n * (100 - Fraction(str(lower))) // 100
    kept = [similarities[j] for j in ordered[nearest : max(end, nearest + 1)]]
    return [j for j in ordered if min(kept) <= similarities[j] <= max(kept)]


def outside(form: Form, lower: float, upper: float) -> list[list[int]]:
    result = []
    for i in range(len(form.case.anchors)):
        negatives = form.case.negatives(i)
        similarities = [(form.case.anchors[i] @ form.case.pool[j]).item() for j in negatives]
        kept = {negatives[place] for place in slow_ring(similarities, lower, upper)}
        result.append([j for j in negatives if j not in kept])
    return result


@each_ring
@each_form
def test_equals_the_loop(form: str, ring: tuple[float, float]) -> None:
    of, weighting, left_out = made(form), Ring(*ring), outside(made(form), *ring)
    assert_same(info_nce(of.contrast, weighting), by_equation(of, left_out=left_out), of.inputs)
    want = by_equation(of, left_out=left_out, positive=False)
    assert_same(decoupled(of.contrast, weighting), want, of.inputs)


@each_ring
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_plain_path(form: str, ring: tuple[float, float]) -> None:
    of, weighting = made(form), Ring(*ring)
    assert_same(info_nce(of.contrast, weighting), plain_info_nce(of.contrast, weighting), of.inputs)
    got, want = total(log_sums(of.contrast, weighting)), plain_log_sums(of.contrast, weighting)
    assert_same(got, want, of.inputs)


@pytest.mark.parametrize("entries", [100, 137, 40, 1000])
def test_published_loss(entries: int) -> None:
    """The nearest tenth but for the nearest tenth of that, as the authors' defaults are."""
    of = of_case(bank(4, entries, 8, temperature=0.07))
    losses = []
    for anchor, positive in zip(of.case.anchors, of.case.positives, strict=True):
        nearest = (of.case.pool @ anchor / 0.07).sort(descending=True).values
        outer = int(0.1 * entries)
        inner = int(0.1 * outer)
        own = (anchor @ positive / 0.07)[None]
        losses.append(torch.cat([own, nearest[inner:outer]]).logsumexp(dim=0) - own[0])
    assert_same(info_nce(of.contrast, Ring()), torch.stack(losses).mean(), of.inputs)


@each_form
def test_of_all_negatives_it_is_the_plain_loss(form: str) -> None:
    of = made(form)
    assert_same(info_nce(of.contrast, Ring(0, 100)), info_nce(of.contrast, Uniform()), of.inputs)


percentiles = st.tuples(st.integers(0, 1000), st.integers(0, 1000)).filter(lambda pair: pair[0] != pair[1])


@given(percentiles, st.lists(st.integers(-3, 3), min_size=1, max_size=60))
@pytest.mark.parametrize("small", [True], ids=["kept"], indirect=True)
def test_percentiles_with_ties(tenths: tuple[int, int], similarities: list[int]) -> None:
    """Whole numbers of few values, so that many are equal; all of these are kept, or none."""
    lower, upper = (tenth / 10 for tenth in sorted(tenths))
    pool = torch.tensor(similarities, dtype=torch.float64)[:, None]
    contrast = Contrast.of(
        torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), pool, None, 0.5
    )
    kept = importance_weights(contrast, Ring(lower, upper))[0].nonzero()[:, 0].tolist()
    assert kept == sorted(slow_ring([float(s) for s in similarities], lower, upper))


@given(percentiles, st.integers(1, 300))
@pytest.mark.parametrize("small", [True], ids=["kept"], indirect=True)
def test_how_many_are_kept(tenths: tuple[int, int], negatives: int) -> None:
    lower, upper = sorted(tenths)
    pool = random_rows(negatives, 2, seed=0)
    kept = Ring(lower / 10, upper / 10).choose(Contrast.of(pool[:1].clone(), pool[:1], pool, None, 0.5)).count
    want = negatives * (1000 - lower) // 1000 - negatives * (1000 - upper) // 1000
    assert kept.tolist() == [max(1, want)]


@pytest.mark.parametrize("ring", [(90, 99), (0, 1e-12), (99, 99.5), (49.9, 50.1)], ids=str)
@pytest.mark.parametrize("negatives", [1, 2, 3, 5])
def test_at_least_one_is_kept(negatives: int, ring: tuple[float, float]) -> None:
    pool = random_rows(negatives, 3, seed=0)
    kept = importance_weights(Contrast.of(pool.clone(), pool, pool, None, 0.5), Ring(*ring))
    assert (kept.sum(dim=1) == 1).all()


def test_of_two_it_keeps_the_nearer_or_the_farther() -> None:
    pool = torch.tensor([[0.2], [0.9]])
    contrast = Contrast.of(torch.ones(1, 1), torch.ones(1, 1), pool, None, 0.5)
    assert importance_weights(contrast, Ring(90, 99)).tolist() == [[0, 1]]
    assert importance_weights(contrast, Ring(50, 100)).tolist() == [[0, 1]]
    assert importance_weights(contrast, Ring(0, 50)).tolist() == [[1, 0]]


def test_each_anchor_has_its_own_number() -> None:
    """Percentiles are of an anchor's own negatives: excluded columns and masks are none."""
    of = of_case(bank(3, 20)._replace(excluded=[list(range(10)), [], list(range(5, 20))]))
    assert Ring(20, 80).choose(of.contrast).count.tolist() == [6, 12, 3]
    labels = torch.tensor([0, 1, 2]), torch.arange(20) % 4
    judged = Contrast.of(*of.case[:3], None, 0.5, excluded_mask=same_label(*labels))
    assert Ring(20, 80).choose(judged).count.tolist() == [9, 9, 9]
    assert not (importance_weights(judged, Ring(20, 80)) * (labels[0][:, None] == labels[1])).any()


def test_an_anchor_without_negatives_adds_nothing() -> None:
    for contrast in (of_case(in_batch(1)).contrast, in_batch_negatives(torch.randn(1, 3), torch.randn(1, 3), 0.1)):
        assert info_nce(contrast, Ring()) == 0
        assert (Ring().choose(contrast).count == 0).all()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_annealing(share: float) -> None:
    of, softened = of_two_views(16), Ring(60, 90).softened(share)
    left_out = outside(of, round(60 * share, 6), round(100 - 10 * share, 6))
    assert_same(info_nce(of.contrast, softened), by_equation(of, left_out=left_out), of.inputs)


def test_annealing_leaves_fewer_and_fewer() -> None:
    contrast = of_two_views(16).contrast
    kept = [importance_weights(contrast, Ring(60, 90).softened(share / 20)) for share in range(21)]
    for before, after in pairwise(kept):
        assert (after <= before).all()
    assert torch.equal(kept[0], importance_weights(contrast, Uniform()))
    assert torch.equal(kept[20], importance_weights(contrast, Ring(60, 90)))


@given(st.floats(0, 100, exclude_max=True), st.floats(0, 100, exclude_min=True))
@pytest.mark.parametrize("small", [True], ids=["kept"], indirect=True)
def test_softened_ends(one: float, other: float) -> None:
    lower, upper = min(one, other), max(one, other)
    if lower == upper:
        return
    assert Ring(lower, upper).softened(1) == Ring(lower, upper)
    assert Ring(lower, upper).softened(0) == Ring(0, 100)


def test_share_is_checked() -> None:
    with pytest.raises(ValueError, match=r"^share: expected a number from 0 to 1, got 2"):
        Ring().softened(2)


def test_marks_that_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the marks of the whole contrast are too many, each block's are worked out when it asks."""
    of = of_two_views(9)
    want = by_equation(of, left_out=outside(of, 20, 80))
    monkeypatch.setattr(block_sizes, "PAIRS_AT_ONCE", 40)
    assert Ring(20, 80).choose(of.contrast).count.tolist() == [9] * 18
    assert_same(info_nce(of.contrast, Ring(20, 80)), want, of.inputs)


def test_gradcheck() -> None:
    rows = random_rows(12, 4, seed=1, unit=False).requires_grad_()

    def of_views(views: Tensor) -> Tensor:
        return info_nce(two_views(*normalize(views, dim=1).split(6), 0.3), Ring(20, 80))

    assert torch.autograd.gradcheck(of_views, rows)


def test_float32() -> None:
    of = of_two_views(40, 8, temperature=0.05)
    single = two_views(*(normalize(rows.float(), dim=1) for rows in of.inputs), 0.05)
    got, want = info_nce(single, Ring(50, 90)), info_nce(of.contrast, Ring(50, 90))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lower": -1}, r"lower: expected a finite number at least 0 and below 100, got -1"),
        ({"lower": 100}, r"lower: expected a finite number at least 0 and below 100, got 100"),
        ({"lower": "90"}, r"lower: .*got '90'"),
        ({"upper": 90}, r"upper: expected a percentile above lower=90\.0, at most 100, got 90"),
        ({"upper": 100.5}, r"upper: expected a percentile above lower=90\.0, at most 100, got 100\.5"),
        ({"upper": math.nan}, r"upper: expected a finite number above 0, got nan"),
        ({"lower": 0, "upper": 0}, r"upper: expected a finite number above 0, got 0"),
    ],
    ids=str,
)
def test_refuses(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Ring(**settings)  # type: ignore[arg-type]
