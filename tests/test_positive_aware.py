"""PositiveAware is a loop over the papers' condition, value and gradient: what exceeds the positive is left out."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator

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
    of_in_batch_negatives,
    of_two_views,
    plain_info_nce,
    plain_log_sums,
)
from tests.test_fast import blocks, total
from undimix_plugins import (
    HCL,
    Contrast,
    Debiased,
    FalseNegativeElimination,
    PositiveAware,
    Ring,
    UnDiMix,
    Uniform,
    compose,
    decoupled,
    importance_weights,
    in_batch_negatives,
    info_nce,
    two_views,
)
from undimix_plugins.toolkit import log_sums

SETTINGS = [(-0.1, "absolute"), (0.0, "absolute"), (0.3, "absolute"), (0.05, "relative"), (-0.5, "relative")]
each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)
each_form = pytest.mark.parametrize("form", [*FORMS, *SEVERAL])


@pytest.fixture(params=[True, False], ids=["kept", "by-block"], autouse=True)
def small(request: pytest.FixtureRequest) -> Iterator[None]:
    with blocks(kept=request.param):
        yield


def above(form: Form, margin: float, strategy: str) -> list[list[int]]:
    """The negatives of each anchor above the limit, one similarity at a time."""
    case, result = form.case, []
    for i in range(len(case.anchors)):
        positives = [case.pool[j] for j in form.listed[i]] if form.listed is not None else [case.positives[i]]
        if not positives:
            result.append([])
            continue
        similarities = [(case.anchors[i] @ positive).item() for positive in positives]
        positive = sum(similarities) / len(similarities)
        limit = positive - margin * (abs(positive) if strategy == "relative" else 1)
        result.append([j for j in case.negatives(i) if (case.anchors[i] @ case.pool[j]).item() > limit + 1e-12])
    return result


@each_setting
@each_form
def test_equals_the_loop(form: str, setting: tuple[float, str]) -> None:
    of, weighting = made(form), PositiveAware(*setting)
    left_out = above(of, *setting)
    assert_same(info_nce(of.contrast, weighting), by_equation(of, left_out=left_out), of.inputs)
    want = by_equation(of, left_out=left_out, positive=False)
    assert_same(decoupled(of.contrast, weighting), want, of.inputs)


def test_what_is_left_out_differs() -> None:
    """That the settings above leave out some, and not the same."""
    found = [above(of_two_views(7), *setting) for setting in SETTINGS]
    assert all(any(rows) for rows in found)
    assert not any(all(len(row) == 12 for row in rows) for rows in found)
    assert len({str(rows) for rows in found}) == len(SETTINGS)


@each_setting
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_plain_path(form: str, setting: tuple[float, str]) -> None:
    of, weighting = made(form), PositiveAware(*setting)
    assert_same(info_nce(of.contrast, weighting), plain_info_nce(of.contrast, weighting), of.inputs)
    got, want = total(log_sums(of.contrast, weighting)), plain_log_sums(of.contrast, weighting)
    assert_same(got, want, of.inputs)


@pytest.mark.parametrize("temperature", [0.01, 0.3])
def test_the_loss_of_qwen3(temperature: float) -> None:
    """Its mask m_ij is 0 for s_ij > s_i+ + 0.1, whatever the temperature."""
    of = of_in_batch_negatives(9, 3, temperature)
    anchors, documents = of.case.anchors, of.case.positives
    losses = []
    for i in range(9):
        own = anchors[i] @ documents[i]
        z = (own / temperature).exp()
        for j in range(9):
            similarity = anchors[i] @ documents[j]
            m = 0 if similarity > own + 0.1 or i == j else 1
            z = z + m * (similarity / temperature).exp()
        losses.append(-((own / temperature).exp() / z).log())
    assert_same(info_nce(of.contrast, PositiveAware()), torch.stack(losses).mean(), of.inputs)


@pytest.mark.parametrize(("margin", "strategy", "kept"), [(0.05, "absolute", 2), (0.05, "relative", 3)])
def test_the_limits_of_nv_retriever(margin: float, strategy: str, kept: int) -> None:
    """MarginPos keeps what is at most s+ - margin, PercPos what is at most 95 % of s+."""
    cosines = torch.tensor([0.1, 0.35, 0.37, 0.39, 0.9], dtype=torch.float64)
    pool = torch.stack([cosines, (1 - cosines.square()).sqrt()], dim=1)
    anchor = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    positive = torch.tensor([[0.4, math.sqrt(1 - 0.4**2)]], dtype=torch.float64)
    contrast = Contrast.of(anchor, positive, pool, None, 0.05)
    assert importance_weights(contrast, PositiveAware(margin, strategy)).tolist() == [[1.0] * kept + [0.0] * (5 - kept)]


@given(
    st.integers(2, 9),
    st.floats(-1, 1),
    st.sampled_from(["absolute", "relative"]),
    st.integers(0, 99),
)
@pytest.mark.parametrize("small", [True], ids=["kept"], indirect=True)
def test_of_any(pairs: int, margin: float, strategy: str, seed: int) -> None:
    of = of_case(in_batch(pairs, 3, seed=seed))
    weights = importance_weights(of.contrast, PositiveAware(margin, strategy))
    left_out = above(of, margin, strategy)
    for i, row in enumerate(weights.tolist()):
        kept = [j for j in of.case.negatives(i) if j not in left_out[i]]
        assert [j for j, weight in enumerate(row) if weight] == kept
        assert set(row) <= {0.0, 1.0}


@given(st.integers(0, 99), st.floats(-1, 1), st.floats(-1, 1), st.sampled_from(["absolute", "relative"]))
@pytest.mark.parametrize("small", [True], ids=["kept"], indirect=True)
def test_a_larger_margin_leaves_out_more(seed: int, one: float, other: float, strategy: str) -> None:
    contrast = in_batch(6, 3, seed=seed).contrast()
    less, more = (importance_weights(contrast, PositiveAware(m, strategy)) for m in sorted((one, other)))
    assert (more <= less).all()


@each_form
def test_a_limit_far_above_is_the_plain_loss(form: str) -> None:
    of = made(form)
    assert_same(info_nce(of.contrast, PositiveAware(-1e30)), info_nce(of.contrast, Uniform()), of.inputs)


def test_a_limit_far_below_leaves_none() -> None:
    for form in ("in-batch-10", "bank-5x11"):
        of = made(form)
        assert info_nce(of.contrast, PositiveAware(1e30)) == 0
        assert not importance_weights(of.contrast, PositiveAware(1e30)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(st.integers(0, 200))
@pytest.mark.parametrize("small", [True], ids=["kept"], indirect=True)
def test_the_positive_again_is_not_above_it(dtype: torch.dtype, seed: int) -> None:
    """A text that stands twice in a batch is as similar as the positive, however both are rounded."""
    pool = normalize(random_rows(30, 48, seed).to(dtype), dim=1)
    pool[20:] = pool[:10]
    anchors = normalize(random_rows(10, 48, seed + 1).to(dtype) + 3 * pool[:10], dim=1)
    contrast = Contrast.of(anchors, pool[:10], pool, torch.arange(10)[:, None], 0.05, positives_in_pool=True)
    weights = importance_weights(contrast, PositiveAware(0.0))
    assert weights[torch.arange(10), torch.arange(20, 30)].all()


HARD = torch.tensor([[8, 9, -1], [10, -1, -1], [-1, -1, -1], [0, 5, 10], [3, 4, 1]])


def with_hard_negatives(columns: Tensor | None = HARD) -> tuple[Contrast, list[list[int]]]:
    case = bank(5, 11, 3, temperature=0.2)
    rows = case.anchors, case.positives, case.pool
    contrast = Contrast.of(*rows, None, 0.2, hard_negative_columns=columns)
    return contrast, above(Form([], contrast, case), 0.0, "absolute")


@pytest.mark.parametrize("scope", ["all_negatives", "in_batch_negatives", "hard_negatives"])
def test_scopes(scope: str) -> None:
    contrast, left_out = with_hard_negatives()
    weights = importance_weights(contrast, PositiveAware(0.0, scope=scope))
    kinds = set()
    for i in range(5):
        for j in range(11):
            hard = j in HARD[i].tolist()
            inside = scope == "all_negatives" or (scope == "hard_negatives") == hard
            assert weights[i, j] == (0.0 if inside and j in left_out[i] else 1.0)
            kinds.add((hard, j in left_out[i]))
    assert len(kinds) == 4  # of each kind, some are above the limit and some below


def test_scopes_without_hard_negatives() -> None:
    """All are then in-batch negatives; the hard ones alone are an error, unless another contrast has them."""
    contrast, _ = with_hard_negatives(None)
    want = importance_weights(contrast, PositiveAware(0.0))
    assert torch.equal(importance_weights(contrast, PositiveAware(0.0, scope="in_batch_negatives")), want)
    for loss in (info_nce, decoupled, log_sums, importance_weights):
        with pytest.raises(
            ValueError, match=r"^scope: expected a loss with explicit hard negatives.*got a contrast with"
        ):
            loss(contrast, PositiveAware(scope="hard_negatives"))  # type: ignore[operator]
    empty, _ = with_hard_negatives(torch.empty(5, 0, dtype=torch.long))
    assert importance_weights(empty, PositiveAware(1.0, scope="hard_negatives")).all()


def test_softened() -> None:
    weighting = PositiveAware()
    assert weighting.softened(0) == Uniform()
    assert weighting.softened(0.1) == weighting.softened(1) == weighting
    with pytest.raises(ValueError, match=r"^share: .*got 2"):
        weighting.softened(2)


@pytest.mark.parametrize("other", [UnDiMix(), HCL(0.5, 0.0), Debiased(0.01)], ids=str)
def test_composed(other: UnDiMix | HCL | Debiased) -> None:
    """Others weight what it leaves."""
    of, aware = of_two_views(7), PositiveAware(0.1)
    composed = compose(other, aware)
    assert_same(info_nce(of.contrast, composed), info_nce(aware.choose(of.contrast), other), of.inputs)
    assert composed.has_mean_one


def test_composed_with_others_that_choose() -> None:
    """Each chooses from what the one before it kept."""
    contrast = of_two_views(7).contrast
    for first in (Ring(20, 80), FalseNegativeElimination(2, 0.1)):
        kept = first.choose(contrast).count
        both = importance_weights(contrast, compose(first, PositiveAware(0.1)))
        want = importance_weights(contrast, first) * importance_weights(contrast, PositiveAware(0.1))
        torch.testing.assert_close(both, want)
        assert (both.sum(dim=1) <= kept).all()


def test_gradcheck() -> None:
    rows = random_rows(12, 4, seed=1, unit=False).requires_grad_()

    def of_views(views: Tensor) -> Tensor:
        return info_nce(two_views(*normalize(views, dim=1).split(6), 0.3), PositiveAware(0.1))

    assert torch.autograd.gradcheck(of_views, rows)


def test_an_anchor_without_negatives_adds_nothing() -> None:
    for contrast in (of_case(in_batch(1)).contrast, in_batch_negatives(torch.randn(1, 3), torch.randn(1, 3), 0.1)):
        assert info_nce(contrast, PositiveAware()) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    views = [random_rows(5, 6, seed).to(dtype) for seed in (0, 1)]
    got = info_nce(two_views(views[0], views[1], 0.1), PositiveAware())
    assert torch.equal(got, info_nce(two_views(views[0].float(), views[1].float(), 0.1), PositiveAware()))


def test_copies() -> None:
    weighting = PositiveAware(0.05, "relative", "in_batch_negatives")
    for other in (pickle.loads(pickle.dumps(weighting)), copy.deepcopy(weighting)):
        assert other == weighting
        assert hash(other) == hash(weighting)
    assert repr(PositiveAware()) == "PositiveAware(margin=-0.1, margin_strategy='absolute', scope='all_negatives')"
    assert weighting.citation.count("@") == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"margin": math.nan}, "margin: .*got nan"),
        ({"margin": -1e31}, r"margin: expected a number from -1e\+30 to 1e\+30, got -1e\+31"),
        ({"margin": "0.1"}, r"margin: .*got '0\.1'"),
        ({"margin_strategy": "half"}, "margin_strategy: expected one of 'absolute', 'relative', got 'half'"),
        ({"scope": "all"}, "scope: expected one of 'all_negatives', 'in_batch_negatives', 'hard_negatives', got 'all'"),
    ],
    ids=str,
)
def test_refuses(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        PositiveAware(**settings)  # type: ignore[arg-type]
