"""False negatives are found, left out and attracted as loops over the paper's equations have it, value and gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from tests.contrasts import Case, bank, in_batch, random_rows, rectangular
from tests.test_fast import blocks, leaves, ring, total
from undimix_plugins import (
    Contrast,
    FalseNegativeAttraction,
    FalseNegativeElimination,
    UnDiMix,
    Uniform,
    Weighting,
    decoupled,
    importance_weights,
    in_batch_negatives,
    info_nce,
    support_set,
    two_views,
)
from undimix_plugins import blocks as block_sizes
from undimix_plugins.toolkit import log_sums, weighted_log_sum
from undimix_plugins.weightings.false_negatives import SUPPORT, FalseNegatives

EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(params=[True, False], ids=["kept", "by-block"], autouse=True)
def small(request: pytest.FixtureRequest) -> Iterator[None]:
    with blocks(kept=request.param):
        yield


class Form(NamedTuple):
    """What is compared, as it is and spelled out, of the same leaves."""

    inputs: list[Tensor]
    contrast: Contrast
    case: Case
    listed: list[list[int]] | None = None  # positives by their columns, in place of the case's


def of_case(case: Case) -> Form:
    made, inputs = leaves(case)
    return Form(inputs, made.contrast(), made)


def of_two_views(pairs: int, width: int = 4, temperature: float | Tensor = 0.3) -> Form:
    inputs = [random_rows(pairs, width, seed=view, unit=False).requires_grad_() for view in (1, 2)]
    first, second = (normalize(rows, dim=1) for rows in inputs)
    views, n = torch.cat([first, second]), 2 * pairs
    other = [(i + pairs) % n for i in range(n)]
    case = Case(views, torch.cat([second, first]), views, temperature, list(range(n)), [[j] for j in other], True)  # type: ignore[arg-type]
    return Form(inputs, two_views(first, second, temperature), case)


def of_in_batch_negatives(n: int, width: int = 4, temperature: float | Tensor = 0.3) -> Form:
    inputs = [random_rows(n, width, seed=view, unit=False).requires_grad_() for view in (1, 2)]
    anchors, positives = (normalize(rows, dim=1) for rows in inputs)
    case = Case(anchors, positives, positives, temperature, [-1] * n, [[i] for i in range(n)], True)  # type: ignore[arg-type]
    return Form(inputs, in_batch_negatives(anchors, positives, temperature), case)


def of_several(width: int = 3, temperature: float | Tensor = 0.3, *, one_batch: bool = False) -> Form:
    """Positives by their columns: several, one, none."""
    listed = [[7, 8], [9], [], [10, 7, 11], [8]]
    inputs = [random_rows(13, width, seed=3).requires_grad_()]
    if one_batch:
        listed, anchors = [*listed, *[[] for _ in range(8)]], inputs[0]
    else:
        inputs.append(random_rows(5, width, seed=4).requires_grad_())
        anchors = inputs[1]
    n = len(anchors)
    columns = torch.tensor([row + [-1] * (3 - len(row)) for row in listed])
    excluded = torch.full((n, 1), 2)
    contrast = Contrast.of(anchors, columns, inputs[0], excluded, temperature)
    own_columns = list(range(n)) if one_batch else [-1] * n
    case = Case(anchors, anchors, inputs[0], temperature, own_columns, [[2, *row] for row in listed], True)  # type: ignore[arg-type]
    return Form(inputs, contrast, case, listed)


FORMS: dict[str, Callable[[], Form]] = {
    "in-batch-10": lambda: of_case(in_batch(5)),
    "ring-9-raw": lambda: of_case(ring(9, unit=False)),
    "pair": lambda: of_case(in_batch(1)),
    "bank-5x11": lambda: of_case(bank(5, 11, 4, temperature=0.2)),
    "bank-1x1": lambda: of_case(bank(1, 1)),
    "rectangular-5x9": lambda: of_case(rectangular(5, 9, offset=2)),
    "rectangular-7x8-raw": lambda: of_case(rectangular(7, 8, offset=0, unit=False)),
    "two-views-14": lambda: of_two_views(7),
    "in-batch-negatives-7": lambda: of_in_batch_negatives(7),
    "in-batch-negatives-1": lambda: of_in_batch_negatives(1),
}
each_form = pytest.mark.parametrize("form", FORMS)
SEVERAL: dict[str, Callable[[], Form]] = {
    "several": of_several,
    "several-wide": lambda: of_several(width=2),  # two columns are then fewer numbers than the pool's
    "several-of-one-batch": lambda: of_several(one_batch=True),
}
each_form_at_all = pytest.mark.parametrize("form", [*FORMS, *SEVERAL])


def made(name: str) -> Form:
    return (FORMS | SEVERAL)[name]()


def slow_found(
    form: Form, k: int, threshold: float, aggregate: str = "max", support: Sequence[Tensor] = ()
) -> list[list[int]]:
    """The false negatives of each anchor, the best first."""
    case, result = form.case, []
    for i in range(len(case.anchors)):
        views = [case.anchors[i]] + ([case.positives[i]] if form.listed is None else [])
        views += [view[i % len(view)] / view[i % len(view)].norm() for view in support]
        scores = {}
        for j in case.negatives(i):
            similarities = [(view @ case.pool[j]).item() for view in views]
            scores[j] = max(similarities) if aggregate == "max" else sum(similarities) / len(similarities)
        best = sorted(scores, key=lambda j: -scores[j])
        result.append([j for j in best[:k] if scores[j] > threshold])
    return result


def by_equation(
    form: Form,
    *,
    left_out: list[list[int]] | None = None,
    attracted: list[list[int]] | None = None,
    weights: Tensor | None = None,
    positive: bool = True,
) -> Tensor:
    """Equations 2 and 3 with gradient; without a `positive` in the denominator, the decoupled loss of these.

    That of an anchor without negatives is 0, above which several positives' log-sum is their mean.
    """
    case, t, losses = form.case, form.case.temperature, []
    for i in range(len(case.anchors)):
        columns = [*(form.listed[i] if form.listed else []), *(attracted[i] if attracted else [])]
        logits = [case.anchors[i] @ case.pool[j] / t for j in columns]
        if form.listed is None:
            logits.append(case.anchors[i] @ case.positives[i] / t)
        if not logits:
            losses.append(torch.zeros((), dtype=case.pool.dtype))
            continue
        positives = sum(logit.exp() for logit in logits)
        negatives = [j for j in case.negatives(i) if j not in columns and not (left_out and j in left_out[i])]
        terms = [
            (1.0 if weights is None else weights[i, j]) * (case.anchors[i] @ case.pool[j] / t).exp() for j in negatives
        ]
        denominator = sum(terms, start=positives if positive else torch.zeros_like(logits[0]))  # type: ignore[arg-type]
        if not positive and not negatives:
            denominator = positives
        losses.append(sum(-(logit.exp() / denominator).log() for logit in logits) / len(logits))
    return torch.stack(losses).mean()


def assert_same(got: Tensor, want: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(got, want, **EXACT)
    both = (
        torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        if loss.requires_grad
        else tuple(map(torch.zeros_like, inputs))
        for loss in (got, want)
    )
    for gradient, expected in zip(*both, strict=True):
        torch.testing.assert_close(gradient, expected, **EXACT)


def as_lists(columns: Tensor) -> list[list[int]]:
    return [sorted(j for j in row if j >= 0) for row in columns.tolist()]


SETTINGS = [(1, 0.0, "max"), (2, 0.3, "max"), (3, 0.1, "mean"), (40, 0.25, "max"), (40, -1.0, "mean"), (2, 0.99, "max")]
each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)


@each_setting
@each_form_at_all
def test_found(form: str, setting: tuple[int, float, str]) -> None:
    of = made(form)
    found = FalseNegativeElimination(*setting).found(of.contrast)
    assert as_lists(found) == [sorted(row) for row in slow_found(of, *setting)]
    assert found.shape == (len(of.contrast.anchors), min(setting[0], len(of.contrast.pool)))
    assert not found.requires_grad


def test_what_is_found_differs() -> None:
    """That the settings above find all, some and none; and as many as they may, or fewer."""
    counts = {setting: [len(row) for row in slow_found(of_two_views(7), *setting)] for setting in SETTINGS}
    assert set(counts[40, -1.0, "mean"]) == {12}
    assert set(counts[2, 0.99, "max"]) <= {0, 1}
    assert set(counts[2, 0.3, "max"]) >= {2}
    assert len(set(counts[40, 0.25, "max"])) > 2


@given(st.integers(2, 9), st.integers(1, 12), st.floats(-1, 1), st.sampled_from(["max", "mean"]), st.integers(0, 99))
@pytest.mark.parametrize("small", [True], ids=["kept"], indirect=True)
def test_found_of_any(pairs: int, k: int, threshold: float, aggregate: str, seed: int) -> None:
    of = of_case(in_batch(pairs, 3, seed=seed))
    found = as_lists(FalseNegativeAttraction(k, threshold, aggregate).found(of.contrast))
    assert found == [sorted(row) for row in slow_found(of, k, threshold, aggregate)]


def test_both_views_of_a_sample_find_the_same() -> None:
    """As the authors' code, which finds them for a sample, not for a view."""
    found = as_lists(FalseNegativeAttraction(3, 0.2).found(of_two_views(7).contrast))
    assert found[:7] == found[7:]
    assert any(found)


@each_setting
@each_form_at_all
def test_elimination(form: str, setting: tuple[int, float, str]) -> None:
    of, weighting = made(form), FalseNegativeElimination(*setting)
    found = slow_found(of, *setting)
    assert_same(info_nce(of.contrast, weighting), by_equation(of, left_out=found), of.inputs)
    want = by_equation(of, left_out=found, positive=False)
    assert_same(decoupled(of.contrast, weighting), want, of.inputs)


@each_setting
@each_form_at_all
def test_attraction(form: str, setting: tuple[int, float, str]) -> None:
    of, weighting = made(form), FalseNegativeAttraction(*setting)
    found = slow_found(of, *setting)
    assert_same(info_nce(of.contrast, weighting), by_equation(of, attracted=found), of.inputs)
    want = by_equation(of, attracted=found, positive=False)
    assert_same(decoupled(of.contrast, weighting), want, of.inputs)


@pytest.mark.parametrize("form", [form for form in FORMS if "raw" not in form and form != "rectangular-5x9"])
def test_without_any_found_both_are_the_plain_loss(form: str) -> None:
    """Of forms whose negatives have a cosine below 1."""
    of = made(form)
    for kind in (FalseNegativeElimination, FalseNegativeAttraction):
        assert_same(info_nce(of.contrast, kind(threshold=1)), info_nce(of.contrast, Uniform()), of.inputs)


@each_form
def test_elimination_of_all(form: str) -> None:
    of = made(form)
    for loss in (info_nce, decoupled):
        value = loss(of.contrast, FalseNegativeElimination(k=100, threshold=-1))
        assert value == 0
        for gradient in torch.autograd.grad(value, of.inputs, retain_graph=True):
            assert torch.equal(gradient, torch.zeros_like(gradient))
    positives, negatives = log_sums(of.contrast, FalseNegativeElimination(k=100, threshold=-1))
    assert positives.isfinite().all()
    assert negatives.isneginf().all()


def test_attraction_of_all_leaves_the_cross_entropy_of_equal_targets() -> None:
    of = of_two_views(5)
    logits = of.case.anchors @ of.case.pool.T / 0.3
    logits = logits.masked_fill(torch.eye(10, dtype=torch.bool), -torch.inf)
    log_probabilities = logits.log_softmax(dim=1).masked_fill(torch.eye(10, dtype=torch.bool), 0)
    want = -log_probabilities.sum(dim=1).mean() / 9
    assert_same(info_nce(of.contrast, FalseNegativeAttraction(k=100, threshold=-1)), want, of.inputs)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_published_loss(k: int) -> None:
    """The authors' code sums over the two views, whose samples' scores are compared to the threshold."""
    of, threshold = of_two_views(7), 0.3
    views = of.case.pool.view(2, 7, 4)
    summed = torch.zeros((), dtype=torch.float64)
    for v in range(2):
        for i in range(7):
            scores = {}
            for u in range(2):
                for j in range(7):
                    if j != i:
                        scores[u, j] = max((views[w, i] @ views[u, j]).item() for w in range(2))
            best = sorted(scores, key=lambda place: -scores[place])[:k]
            false = [place for place in best if scores[place] > threshold]
            logits = {(u, j): views[v, i] @ views[u, j] / 0.3 for u in range(2) for j in range(7) if (u, j) != (v, i)}
            numerator = logits[1 - v, i] + sum(logits[place] for place in false)
            log_denominator = torch.stack(list(logits.values())).logsumexp(dim=0)
            summed = summed + (log_denominator - numerator / (1 + len(false))) / 7
    assert_same(2 * info_nce(of.contrast, FalseNegativeAttraction(k, threshold)), summed, of.inputs)


@pytest.mark.parametrize("kind", [FalseNegativeElimination, FalseNegativeAttraction])
@pytest.mark.parametrize("form", ["bank-5x11", "several", "rectangular-5x9"])
def test_gradcheck(form: str, kind: type[FalseNegatives]) -> None:
    """A numeric gradient, for which what is found has to stay found."""
    of, weighting = made(form), kind(2, 0.3)
    excluded, t, listed = of.contrast.excluded, of.case.temperature, of.contrast.positive_columns
    anchors, positives, pool = (rows.detach().clone().requires_grad_() for rows in of.case[:3])

    def of_rows(anchors: Tensor, positives: Tensor, pool: Tensor) -> Tensor:
        of_anchors = positives if listed is None else listed
        return info_nce(
            Contrast.of(anchors, of_anchors, pool, excluded, t, positives_in_pool=listed is not None), weighting
        )

    inputs = (anchors, positives, pool) if listed is None else (anchors, positives.detach(), pool)
    assert torch.autograd.gradcheck(of_rows, inputs)


def test_gradcheck_of_one_batch() -> None:
    rows = random_rows(10, 4, seed=1, unit=False).requires_grad_()
    for kind in (FalseNegativeElimination, FalseNegativeAttraction):

        def of_views(views: Tensor, weighting: Weighting) -> Tensor:
            return info_nce(two_views(*normalize(views, dim=1).split(5), 0.3), weighting)

        assert torch.autograd.gradcheck(of_views, (rows, kind(2, 0.3)))


@pytest.mark.parametrize("aggregate", ["max", "mean"])
@each_form_at_all
def test_support_set(form: str, aggregate: str) -> None:
    of = made(form)
    samples = len(of.contrast.anchors) // (2 if len(of.contrast.anchors) % 2 == 0 else 1)
    width = of.contrast.pool.shape[1]
    support = [random_rows(samples, width, seed=seed, unit=False) for seed in (7, 8, 9)]
    elimination, attraction = FalseNegativeElimination(2, 0.2, aggregate), FalseNegativeAttraction(2, 0.2, aggregate)
    found = slow_found(of, 2, 0.2, aggregate, support)
    with support_set(*support):
        assert as_lists(elimination.found(of.contrast)) == [sorted(row) for row in found]
        eliminated, attracted = info_nce(of.contrast, elimination), info_nce(of.contrast, attraction)
    assert_same(eliminated, by_equation(of, left_out=found), of.inputs)
    assert_same(attracted, by_equation(of, attracted=found), of.inputs)
    without = slow_found(of, 2, 0.2, aggregate)
    assert as_lists(elimination.found(of.contrast)) == [sorted(row) for row in without]


def test_a_support_set_finds_others() -> None:
    of, support = of_two_views(7), random_rows(7, 4, seed=7)
    assert slow_found(of, 2, 0.2, "max", [support]) != slow_found(of, 2, 0.2)
    assert slow_found(of, 2, 0.2, "mean", [support]) != slow_found(of, 2, 0.2, "mean")


def test_support_sets_nest_and_end() -> None:
    of, one, other = of_two_views(6), random_rows(6, 4, seed=7), random_rows(6, 4, seed=8)

    def found() -> list[list[int]]:
        return as_lists(FalseNegativeElimination(2, 0.2).found(of.contrast))

    def slow(*support: Tensor) -> list[list[int]]:
        return [sorted(row) for row in slow_found(of, 2, 0.2, "max", support)]

    assert len({str(slow()), str(slow(one)), str(slow(other))}) == 3
    with support_set(one):
        assert found() == slow(one)
        with support_set(other):  # takes the place of the first
            assert found() == slow(other)
        assert found() == slow(one)
        with pytest.raises(KeyError, match="inside"), support_set(other):
            raise KeyError("inside")
        assert found() == slow(one)
    assert found() == slow()
    assert not SUPPORT.values()


def test_support_set_is_a_constant_in_any_precision() -> None:
    of = of_two_views(6)
    view = random_rows(6, 4, seed=7).requires_grad_()
    with support_set(view):
        loss = info_nce(of.contrast, FalseNegativeAttraction(2, 0.2))
        assert not SUPPORT.values()[-1][0].requires_grad
    assert torch.autograd.grad(loss, view, allow_unused=True) == (None,)
    with support_set(view.detach().bfloat16()):
        assert SUPPORT.values()[-1][0].dtype == torch.float32
        assert info_nce(of.contrast, FalseNegativeAttraction(2, 0.2)).dtype == torch.float64


def test_support_set_refuses() -> None:
    view = random_rows(6, 4, seed=7)
    with pytest.raises(ValueError, match=r"^views: expected at least one, got none"), support_set():
        pass
    with pytest.raises(ValueError, match=r"^views\[0\]: expected"):
        support_set([1.0, 2.0]).__enter__()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^views\[1\]: expected 6 rows, as views\[0\] has, got 5"):
        support_set(view, view[:5]).__enter__()
    with pytest.raises(ValueError, match=r"^views\[0\]: expected floating-point embeddings, got torch.int64"):
        support_set(torch.zeros(6, 4, dtype=torch.long)).__enter__()
    with pytest.raises(ValueError, match=r"^views\[0\]: expected finite embeddings, got a non-finite value in row 2"):
        support_set(view.index_fill(0, torch.tensor([2]), math.nan)).__enter__()
    assert not SUPPORT.values()
    contrast = of_two_views(6).contrast
    for rows, came in (
        (view[:5], r"\[5, 4\]"),
        (view[:3], r"\[3, 4\]"),  # four anchors for each: of another batch
        (view[:, :3], r"\[6, 3\]"),
        (torch.cat([view] * 4), r"\[24, 4\]"),
    ):
        message = (
            r"^support_set: expected views of the batch's samples \[samples, 4\], of which the loss has 12 anchors, "
            rf"one or two for each, got {came} at 0"
        )
        with support_set(rows), pytest.raises(ValueError, match=message):
            info_nce(contrast, FalseNegativeElimination())
    with support_set(view[:5]):  # which nobody else asks for
        info_nce(contrast, UnDiMix())


def test_log_sums_have_no_place_for_attraction() -> None:
    contrast = of_two_views(5).contrast
    message = r"^weighting: expected one that makes no positives.*got FalseNegativeAttraction\(k=2, threshold=0\.7, "
    with pytest.raises(ValueError, match=message):
        log_sums(contrast, FalseNegativeAttraction(k=2))


def plain(contrast: Contrast, weighting: Weighting) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sums of positives and negatives, and the positives' mean, by the plain path."""
    contrast, weigher = weighting.choose(contrast), weighting._weigher()
    n = len(contrast.anchors)
    negatives = weighted_log_sum(contrast, weigher, weigher.prepare(contrast), slice(0, n))
    logits = contrast.anchors @ contrast.pool.T / contrast.held_temperature
    of_positives = [[(contrast.anchors[i] @ contrast.positives[i]) / contrast.held_temperature] for i in range(n)]
    if contrast.positive_columns is not None:
        for i, row in enumerate(contrast.positive_columns.tolist()):
            own = of_positives[i] if contrast.has_own_positive else []
            of_positives[i] = own + [logits[i, j] for j in row if j >= 0]
    number = torch.tensor([len(row) for row in of_positives], dtype=logits.dtype)
    log_sums = torch.stack([torch.stack(row).logsumexp(dim=0) for row in of_positives])
    means = torch.stack([torch.stack(row).mean() for row in of_positives])
    none = negatives.isneginf()
    combined = weighting.combine(
        contrast, log_sums - number.log(), negatives.masked_fill(none, 0), contrast.count.clamp(min=1)
    )
    return log_sums, combined.masked_fill(none, -torch.inf), means


def plain_info_nce(contrast: Contrast, weighting: Weighting) -> Tensor:
    positives, negatives, means = plain(contrast, weighting)
    return (torch.logaddexp(positives, negatives) - means).mean()


def plain_log_sums(contrast: Contrast, weighting: Weighting) -> Tensor:
    return total(plain(contrast, weighting)[:2])


@pytest.mark.parametrize("kind", [FalseNegativeElimination, FalseNegativeAttraction])
@pytest.mark.parametrize("k", [2, 70], ids=["few", "more than are listed"])
def test_equals_plain_of_many(k: int, kind: type[FalseNegatives]) -> None:
    of, weighting = of_case(bank(5, 90, 4)), kind(k, -0.5)
    assert_same(info_nce(of.contrast, weighting), plain_info_nce(of.contrast, weighting), of.inputs)
    want = slow_found(of, k, -0.5)
    as_equation = {"left_out": want} if kind is FalseNegativeElimination else {"attracted": want}
    assert_same(info_nce(of.contrast, weighting), by_equation(of, **as_equation), of.inputs)


def test_weighted_anchors() -> None:
    of = of_two_views(5)
    weights = torch.linspace(0, 2, 10, dtype=torch.float64)
    first, second = (normalize(rows, dim=1) for rows in of.inputs)
    weighted = two_views(first, second, 0.3, anchor_weights=weights)
    found = slow_found(of, 2, 0.3)
    singles = []
    for i in range(10):
        rows = of.case.anchors[i : i + 1], of.case.positives[i : i + 1], of.case.pool
        one = Form([], of.contrast, Case(*rows, 0.3, [i], [of.case.excluded[i]], True))
        singles.append(weights[i] * by_equation(one, attracted=[found[i]]))
    assert_same(info_nce(weighted, FalseNegativeAttraction(2, 0.3)), torch.stack(singles).mean(), of.inputs)


def test_an_anchor_without_positives_is_given_those_found() -> None:
    of = of_several()
    found = slow_found(of, 2, -1.0)
    assert of.listed is not None
    assert not of.listed[2]
    assert found[2]
    compared = FalseNegativeAttraction(2, -1.0).choose(of.contrast)
    assert as_lists(compared.positive_columns)[2] == sorted(found[2])
    assert not compared.has_own_positive


@pytest.mark.parametrize("form", ["two-views-14", "bank-5x11", "several"])
def test_what_is_compared(form: str) -> None:
    of = made(form)
    found = FalseNegativeElimination(2, 0.1).found(of.contrast)
    fewer, more = of.contrast.without(found), of.contrast.with_positives(found)
    every = slice(0, len(of.contrast.anchors))
    want = of.contrast.is_negative(every)
    for i, row in enumerate(found.tolist()):
        for j in row:
            want[i, j] &= j < 0
    for new in (fewer, more):
        assert torch.equal(new.is_negative(every), want)
        assert torch.equal(new.count, want.sum(dim=1).to(new.count.dtype))
        assert new.anchors is of.contrast.anchors
        assert new.pool is of.contrast.pool
        assert new.is_own_pool == of.contrast.is_own_pool
    assert fewer.positive_columns is of.contrast.positive_columns
    listed = of.listed or [[] for _ in found]
    both = [sorted({*row, *of_found}) for row, of_found in zip(listed, as_lists(found), strict=True)]
    assert as_lists(more.positive_columns) == both
    torch.testing.assert_close(fewer.positive_logits(), of.contrast.positive_logits(), rtol=0, atol=0)
    assert of.contrast.positive_columns is None or as_lists(of.contrast.positive_columns) == [*map(sorted, listed)]
    own = [[(of.case.anchors[i] @ of.case.positives[i]).item()] if of.listed is None else [] for i in range(len(both))]
    logits = of.case.anchors @ of.case.pool.T
    means = [one + [logits[i, j].item() for j in both[i]] for i, one in enumerate(own)]
    want_means = torch.tensor([sum(row) / len(row) / of.case.temperature if row else 0.0 for row in means])
    torch.testing.assert_close(more.positive_logits(), want_means.to(logits), rtol=1e-6, atol=1e-6)


def test_masks_add_up() -> None:
    of = of_case(bank(4, 9))
    marks = torch.rand(3, 4, 9, generator=torch.Generator().manual_seed(0)) > 0.7
    contrast = of.contrast
    for mark in marks:
        contrast = contrast.without(mask=lambda rows, mark=mark: mark[rows])
    assert torch.equal(contrast.is_negative(slice(0, 4)), ~marks.any(dim=0))
    assert torch.equal(contrast.is_negative(slice(1, 3)), ~marks.any(dim=0)[1:3])
    further = contrast.without(torch.tensor([[0], [-1], [8], [-1]]))
    want = ~marks.any(dim=0)
    want[0, 0] = want[2, 8] = False
    assert torch.equal(further.is_negative(slice(0, 4)), want)
    assert of.contrast.excluded_mask is None


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_columns_of_any_integer_and_twice(dtype: torch.dtype) -> None:
    of = of_case(bank(2, 5))
    once_each = torch.tensor([[0, 3, -1], [4, -1, -1]])
    twice = torch.tensor([[3, 0, 3], [4, 4, -1]], dtype=dtype)
    for again in (of.contrast.with_positives(twice), of.contrast.with_positives(twice).with_positives(twice)):
        want = info_nce(of.contrast.with_positives(once_each), Uniform())
        torch.testing.assert_close(info_nce(again, Uniform()), want, rtol=0, atol=1e-15)
        torch.testing.assert_close(again.positive_logits(), of.contrast.with_positives(once_each).positive_logits())
    assert of.contrast.without(twice).count.tolist() == [3, 4]
    own = torch.arange(4)[:, None]  # of the positives, which are in the pool
    pairs = in_batch_negatives(random_rows(4, 5, seed=1), random_rows(4, 5, seed=2), 0.5)
    torch.testing.assert_close(info_nce(pairs.with_positives(own), Uniform()), info_nce(pairs, Uniform()))
    for form in (of, of_several()):
        none = torch.empty(len(form.contrast.anchors), 0, dtype=dtype)
        for same in (form.contrast.without(none), form.contrast.with_positives(none)):
            assert same.positive_columns is form.contrast.positive_columns
            assert_same(info_nce(same, Uniform()), info_nce(form.contrast, Uniform()), form.inputs)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (torch.zeros(3, 1), r"columns: expected integer columns of the pool, got torch.float32"),
        (torch.zeros(2, 1, dtype=torch.long), r"columns: expected shape \[3, k\], got \[2, 1\]"),
        (torch.tensor([[0], [7], [0]]), r"columns: expected columns from -1 \(none\) to 6, got 0 to 7"),
        ([[0]], r"columns: expected a tensor of integers, got list"),
    ],
    ids=["floats", "too few", "out of range", "list"],
)
def test_columns_are_checked(columns: Tensor, message: str) -> None:
    contrast = of_case(bank(3, 7)).contrast
    for change in (contrast.without, contrast.with_positives):
        with pytest.raises(ValueError, match=f"^{message}"):
            change(columns)


def test_gathered_pool() -> None:
    """Anchors of a pool gathered from several processes find in all of it."""
    rows = [random_rows(6, 4, seed=seed) for seed in (1, 2)]
    mine = [view[2:4].clone().requires_grad_() for view in rows]
    contrast = two_views(*mine, 0.3, gathered=(rows[0], rows[1]), offset=2)
    pool, n = torch.cat(rows), 4
    anchors, positives = torch.cat(mine), torch.cat([mine[1], mine[0]])
    case = Case(anchors, positives, pool, 0.3, [2, 3, 8, 9], [[8], [9], [2], [3]], True)
    of = Form(mine, contrast, case)
    found = slow_found(of, 2, 0.1)
    assert any(found)
    assert len(found) == n
    assert_same(info_nce(contrast, FalseNegativeAttraction(2, 0.1)), by_equation(of, attracted=found), mine)
    assert_same(info_nce(contrast, FalseNegativeElimination(2, 0.1)), by_equation(of, left_out=found), mine)


def test_more_than_is_kept_or_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks that are too many to be kept, and columns beyond those that are listed."""
    monkeypatch.setattr(block_sizes, "WIDE", 1)
    monkeypatch.setattr(block_sizes, "PAIRS_AT_ONCE", 1)
    of = of_two_views(7)
    found = slow_found(of, 3, 0.1)
    assert_same(info_nce(of.contrast, FalseNegativeAttraction(3, 0.1)), by_equation(of, attracted=found), of.inputs)
    assert_same(info_nce(of.contrast, FalseNegativeElimination(3, 0.1)), by_equation(of, left_out=found), of.inputs)


def test_softened() -> None:
    for weighting in (FalseNegativeElimination(2), FalseNegativeAttraction(2)):
        assert weighting.softened(0) == Uniform()
        assert weighting.softened(0.1) is weighting
        assert weighting.softened(1) is weighting
        with pytest.raises(ValueError, match=r"^share: expected a number from 0 to 1, got 1\.5"):
            weighting.softened(1.5)


def test_importance_is_of_those_that_are_left() -> None:
    of = of_two_views(7)
    found = slow_found(of, 2, 0.2)
    want = of.case.is_negative().double()
    for i, row in enumerate(found):
        want[i, row] = 0
    for weighting in (FalseNegativeElimination(2, 0.2), FalseNegativeAttraction(2, 0.2)):
        assert torch.equal(importance_weights(of.contrast, weighting), want)


@pytest.mark.parametrize("kind", [FalseNegativeElimination, FalseNegativeAttraction])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, r"k: expected a finite number at least 1, got 0"),
        ({"k": 2.5}, r"k: expected a whole number, got 2\.5"),
        ({"k": "2"}, r"k: .*got '2'"),
        ({"threshold": math.nan}, r"threshold: expected a finite number, got nan"),
        ({"threshold": None}, r"threshold: .*got None"),
        ({"threshold": 5}, r"threshold: expected a cosine, from -1 to 1, got 5"),
        ({"threshold": -1.5}, r"threshold: expected a cosine, from -1 to 1, got -1\.5"),
        ({"aggregate": "sum"}, r"aggregate: expected one of 'max', 'mean', got 'sum'"),
    ],
    ids=str,
)
def test_refuses(kind: type[FalseNegatives], settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        kind(**settings)  # type: ignore[arg-type]
