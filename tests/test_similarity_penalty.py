"""SimilarityPenalty is the published loss, value and gradient: `alpha * s` added to a negative's logit, a constant."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from tests.contrasts import SHAPES, Case, bank, in_batch, random_rows, rectangular
from tests.test_fast import CASES, Outcome, assert_equals_dense, assert_same, blocks, leaves, outcome, to
from undimix_plugins import (
    Contrast,
    SimilarityPenalty,
    UnDiMix,
    Uniform,
    compose,
    importance_weights,
    info_nce,
    two_views,
)
from undimix_plugins.toolkit import log_sums
from undimix_plugins.weightings.weighting import Softened

EXACT = {"rtol": 1e-10, "atol": 1e-10}
ALPHAS = (0.0, 0.5, 9.0)
each_shape = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)


def published(case: Case, alpha: float) -> Outcome:
    """Equation 5, a term at a time, by autograd."""
    case, inputs = leaves(case)
    losses = []
    for i, (anchor, positive) in enumerate(zip(case.anchors, case.positives, strict=True)):
        total = (anchor @ positive / case.temperature).exp()
        for j in case.negatives(i):
            similarity = anchor @ case.pool[j]
            total = total + (similarity / case.temperature + alpha * similarity.detach()).exp()
        losses.append(total.log() - anchor @ positive / case.temperature)
    value = torch.stack(losses).mean()
    return Outcome([value], list(torch.autograd.grad(value, inputs, materialize_grads=True)))


def assert_equal(got: Outcome, want: Outcome) -> None:
    for one, other in zip([*got.values, *got.gradients], [*want.values, *want.gradients], strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "by-block"])
@pytest.mark.parametrize("alpha", ALPHAS)
@each_shape
def test_published_loss(case: Case, alpha: float, kept: bool) -> None:
    assert_equal(outcome(case, SimilarityPenalty(alpha), info_nce), published(case, alpha))
    with blocks(kept=kept, rows=2):
        assert_equal(outcome(case, SimilarityPenalty(alpha), info_nce), published(case, alpha))


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "by-block"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fast_path(case: Case, kept: bool) -> None:
    with blocks(kept=kept):
        assert_equals_dense(case, SimilarityPenalty(9.0))


@each_shape
def test_without_alpha_it_is_the_plain_loss(case: Case) -> None:
    assert_equal(outcome(case, SimilarityPenalty(0.0), info_nce), outcome(case, Uniform(), info_nce))


def test_weights_are_constants_of_the_similarity() -> None:
    case = bank(4, 9, temperature=0.1)
    similarity = case.anchors @ case.pool.T
    weights = importance_weights(case.contrast(), SimilarityPenalty(3.0))
    torch.testing.assert_close(weights, (3 * similarity).exp(), **EXACT)
    contrast = leaves(case)[0].contrast()
    assert not SimilarityPenalty(3.0).log_weights(contrast, slice(0, 4)).requires_grad


def test_all_negatives_weigh_against_the_positive() -> None:
    """Weights are not brought to mean 1: of a single negative, its own counts."""
    case = bank(3, 1)
    assert outcome(case, SimilarityPenalty(9.0), info_nce).values[0] != outcome(case, Uniform(), info_nce).values[0]


def test_a_temperature_that_is_learned() -> None:
    """The penalty is a constant of it."""
    for made in (in_batch(4), bank(3, 7)):
        temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        contrast = made._replace(temperature=temperature).contrast()  # type: ignore[arg-type]
        value = info_nce(contrast, SimilarityPenalty(2.0))
        (got,) = torch.autograd.grad(value, temperature)
        terms = []
        for i, (anchor, positive) in enumerate(zip(made.anchors, made.positives, strict=True)):
            negatives = made.pool[made.negatives(i)] @ anchor
            logits = torch.cat([(anchor @ positive)[None] / temperature, negatives / temperature + 2 * negatives])
            terms.append(logits.logsumexp(dim=0) - logits[0])
        want = torch.stack(terms).mean()
        torch.testing.assert_close(value, want, **EXACT)
        torch.testing.assert_close(got, torch.autograd.grad(want, temperature)[0], **EXACT)


@pytest.mark.parametrize("alpha", [0.0, 9.0, 1e3])
@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_far_alpha_in_float32(alpha: float, temperature: float) -> None:
    case = to(in_batch(7, 6, temperature=temperature), torch.float32)
    value, gradients = outcome(case, SimilarityPenalty(alpha), info_nce)
    assert value[0].dtype == torch.float32
    assert all(part.isfinite().all() for part in (*value, *gradients))
    exact = outcome(to(case, torch.float64), SimilarityPenalty(alpha), info_nce).values[0]
    rounding = 8 * torch.finfo(torch.float32).eps * (1 / temperature + alpha)
    torch.testing.assert_close(value[0].double(), exact, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    first, second = (random_rows(5, 6, seed).to(dtype) for seed in (0, 1))
    contrast = two_views(first, second, 0.1)
    loss = info_nce(contrast, SimilarityPenalty(9.0))
    want = info_nce(two_views(first.float(), second.float(), 0.1), SimilarityPenalty(9.0))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(contrast, SimilarityPenalty(9.0)), want)


def test_one_pair() -> None:
    raw = random_rows(2, 4, seed=0).requires_grad_()
    loss = info_nce(two_views(raw[:1], raw[1:], 0.1), SimilarityPenalty())
    loss.backward()
    assert loss == 0
    assert torch.equal(raw.grad, torch.zeros_like(raw))  # type: ignore[arg-type]


def test_softened() -> None:
    """A share of alpha, which is a power of the weights."""
    case = rectangular(5, 9, offset=2)
    assert SimilarityPenalty(8.0).softened(0.25) == SimilarityPenalty(2.0)
    assert SimilarityPenalty(8.0).softened(1) == SimilarityPenalty(8.0)
    by_power = outcome(case, Softened(SimilarityPenalty(8.0), 0.25), log_sums)
    assert_same(outcome(case, SimilarityPenalty(8.0).softened(0.25), log_sums), by_power)
    assert_equal(outcome(case, SimilarityPenalty(8.0).softened(0), info_nce), outcome(case, Uniform(), info_nce))
    with pytest.raises(ValueError, match=r"^share: .*got 1\.5"):
        SimilarityPenalty().softened(1.5)


def test_copies() -> None:
    weighting = SimilarityPenalty(3.0)
    for other in (pickle.loads(pickle.dumps(weighting)), copy.deepcopy(weighting)):
        assert other == weighting
        assert hash(other) == hash(weighting)
    assert repr(weighting) == "SimilarityPenalty(alpha=3.0)"
    assert repr(SimilarityPenalty(5.0, "hard_negatives")) == "SimilarityPenalty(alpha=5.0, scope='hard_negatives')"


@pytest.mark.parametrize(
    ("alpha", "message"),
    [(-0.1, r"at least 0, got -0\.1"), (math.inf, "finite.* got inf"), (math.nan, "got nan"), ("9", "got '9'")],
    ids=str,
)
def test_refuses(alpha: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^alpha: .*{message}"):
        SimilarityPenalty(alpha)  # type: ignore[arg-type]


def test_gradient_of_one_negative() -> None:
    """By hand: the softmax's share of the negative, its weight in it, times the derivative of its own logit."""
    anchor, positive, negative = (row[None] for row in random_rows(3, 4, seed=3))
    case = Case(anchor, positive, negative, 0.5, [-1], [[]], False)
    _, (of_anchor, _, of_negative) = outcome(case, SimilarityPenalty(2.0), info_nce)
    p, s = float(anchor[0] @ positive[0]), float(anchor[0] @ negative[0])
    share = math.exp(s / 0.5 + 2 * s) / (math.exp(p / 0.5) + math.exp(s / 0.5 + 2 * s))
    expected: Tensor = share * (negative - positive) / 0.5
    torch.testing.assert_close(of_anchor, expected, **EXACT)
    torch.testing.assert_close(of_negative, share * anchor / 0.5, **EXACT)


HARD = torch.tensor([[8, 7, -1], [3, -1, -1], [-1, -1, -1], [0, 5, 2]])


def with_hard_negatives(columns: Tensor | None = HARD) -> tuple[Case, Contrast]:
    case = bank(4, 9, temperature=0.3)
    rows = case.anchors, case.positives, case.pool
    excluded = torch.tensor([[7], [-1], [-1], [-1]])  # what is no negative is no hard one either
    return case, Contrast.of(*rows, excluded, 0.3, hard_negative_columns=columns)


@pytest.mark.parametrize("scope", ["all_negatives", "in_batch_negatives", "hard_negatives"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "by-block"])
def test_scopes(scope: str, kept: bool) -> None:
    """A term at a time: the penalty is in the logits of the scope alone."""
    case, _ = with_hard_negatives()
    made, inputs = leaves(case)
    losses = []
    for i, (anchor, positive) in enumerate(zip(made.anchors, made.positives, strict=True)):
        total = (anchor @ positive / 0.3).exp()
        for j in range(9):
            if (i, j) == (0, 7):
                continue
            hard = j in HARD[i].tolist()
            inside = scope == "all_negatives" or (scope == "hard_negatives") == hard
            s = anchor @ made.pool[j]
            total = total + (s / 0.3 + (5.0 * s.detach() if inside else 0)).exp()
        losses.append(total.log() - anchor @ positive / 0.3)
    want = torch.stack(losses).mean()
    gradients = torch.autograd.grad(want, inputs)
    excluded = torch.tensor([[7], [-1], [-1], [-1]])
    contrast = Contrast.of(made.anchors, made.positives, made.pool, excluded, 0.3, hard_negative_columns=HARD)
    with blocks(kept=kept, rows=2):
        got = info_nce(contrast, SimilarityPenalty(5.0, scope))
        found = torch.autograd.grad(got, inputs)
    torch.testing.assert_close(got, want, **EXACT)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_a_scope_without_hard_negatives() -> None:
    _, contrast = with_hard_negatives(None)
    hard = SimilarityPenalty(5.0, "hard_negatives")
    same = info_nce(contrast, SimilarityPenalty(5.0, "in_batch_negatives"))
    assert torch.equal(same, info_nce(contrast, SimilarityPenalty(5.0)))
    for weighting in (hard, hard.softened(0.5), compose(UnDiMix(), hard)):
        for loss in (info_nce, log_sums, importance_weights):
            with pytest.raises(
                ValueError, match=r"^scope: expected a loss with explicit hard negatives .*use scope='all_"
            ):
                loss(contrast, weighting)  # type: ignore[operator]
    _, empty = with_hard_negatives(torch.empty(4, 0, dtype=torch.long))
    torch.testing.assert_close(info_nce(empty, hard), info_nce(empty, Uniform()))


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^scope: expected one of 'all_negatives', 'in_batch_negatives', 'hard_n"):
        SimilarityPenalty(scope="queries")


def test_softened_keeps_the_scope() -> None:
    hard = SimilarityPenalty(8.0, "hard_negatives")
    assert hard.softened(0.25) == SimilarityPenalty(2.0, "hard_negatives")
