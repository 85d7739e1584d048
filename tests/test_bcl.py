"""BCL is the authors' criterion, value and gradient: importance by rank, ties ranked alike."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from tests import references
from tests.contrasts import SHAPES, Case, bank, in_batch, make_every_look_cost, random_rows, rectangular
from tests.test_fast import (
    CASES,
    Apart,
    Outcome,
    Waits,
    all_excluded,
    assert_equals_dense,
    blocks,
    leaves,
    outcome,
    to,
    total,
)
from undimix_plugins import BCL, Uniform, importance_weights, info_nce, two_views
from undimix_plugins.toolkit import log_sums
from undimix_plugins.weightings.bcl import no_more_similar
from undimix_plugins.weightings.weighting import Softened

EXACT = {"rtol": 1e-10, "atol": 1e-10}
PRIORS, LOCATIONS, CONCENTRATIONS = (0.0, 0.1, 0.5), (0.5, 0.7, 1.0), (0.5, 0.9, 1.0)
CORNERS = [BCL(p, a, b) for p in (0.0, 0.5, 0.999) for a in (0.5, 1.0) for b in (0.5, 1.0)]
CASES_OF_FORMS = {**SHAPES, "in-batch-4": in_batch(2)}
each_shape = pytest.mark.parametrize("case", CASES_OF_FORMS.values(), ids=CASES_OF_FORMS)


def of_rank(share: float, method: BCL) -> float:
    """The authors' `omega` of a negative that so large a share is no more similar than, line by line."""
    plus, minus, alpha, beta = method.tau_plus, 1 - method.tau_plus, method.alpha, method.beta
    a = (1 - 2 * alpha) * (minus - plus) + 1e-3
    b = 2 * (alpha * minus + (1 - alpha) * plus)
    cdf = (-b + math.sqrt(b**2 + 4 * a * share)) / (2 * a)
    phi1, phi2 = 2 * (1 - cdf), 2 * cdf
    x_tn, x_fn = alpha * phi1 + (1 - alpha) * phi2, (1 - alpha) * phi1 + alpha * phi2
    divisor = alpha * (1 - beta) + (1 - alpha) * beta + 1e-3
    x_htn = (alpha * (1 - beta) * phi1 + (1 - alpha) * beta * phi2) / divisor
    return x_htn / (x_tn * minus + x_fn * plus)


def weights_of(case: Case, method: BCL) -> Tensor:
    """One anchor and one negative at a time [n, m], 0 for what is no negative."""
    weights = torch.zeros(len(case.anchors), len(case.pool), dtype=case.pool.dtype)
    for i in range(len(case.anchors)):
        similarity = {j: (case.anchors[i] @ case.pool[j]).item() for j in case.negatives(i)}
        for j in similarity:
            no_more = sum(other <= similarity[j] for other in similarity.values())
            weights[i, j] = of_rank(no_more / len(similarity), method)
    return weights


def published(case: Case, method: BCL) -> Outcome:
    weights = weights_of(case, method)
    case, inputs = leaves(case)
    value = references.info_nce(case, weights)
    return Outcome([value], list(torch.autograd.grad(value, inputs, materialize_grads=True)))


def assert_equal(got: Outcome, want: Outcome) -> None:
    for one, other in zip([*got.values, *got.gradients], [*want.values, *want.gradients], strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("tau_plus", PRIORS)
@pytest.mark.parametrize("alpha", LOCATIONS)
@pytest.mark.parametrize("beta", CONCENTRATIONS)
@each_shape
def test_published_criterion(case: Case, tau_plus: float, alpha: float, beta: float) -> None:
    method = BCL(tau_plus, alpha, beta)
    want = published(case, method)
    torch.testing.assert_close(importance_weights(case.contrast(), method), weights_of(case, method), **EXACT)
    assert_equal(outcome(case, method, info_nce), want)
    with blocks(kept=False, rows=2):
        assert_equal(outcome(case, method, info_nce), want)


def criterion(out: Tensor, method: BCL, t: float) -> Tensor:
    """The authors' criterion, of a batch at once: raw exponentials, each compared with each."""
    n = len(out) // 2
    scores = (out @ out.T / t).exp()
    others = ~torch.eye(n, dtype=torch.bool).repeat(2, 2)
    negatives = scores[others].view(2 * n, -1)
    positives = (out * out.roll(n, 0)).sum(dim=1).div(t).exp()
    share = (negatives[:, None, :] <= negatives[:, :, None]).double().mean(dim=2)
    omega = torch.tensor([[of_rank(one, method) for one in row] for row in share.tolist()], dtype=out.dtype)
    return -(positives / (positives + (omega * negatives).sum(dim=1))).log().mean()


@pytest.mark.parametrize("method", [BCL(), BCL(0.1, 0.7, 0.9), BCL(0.0, 0.9, 0.6)], ids=repr)
def test_the_authors_batch(method: BCL) -> None:
    """With the gradient at what is brought to length 1 on the way."""
    raw = random_rows(12, 5, seed=4).requires_grad_()
    out = normalize(raw, dim=1)
    ours, theirs = info_nce(two_views(out[:6], out[6:], 0.5), method), criterion(out, method, 0.5)
    torch.testing.assert_close(ours, theirs, **EXACT)
    gradients = [torch.autograd.grad(value, raw, retain_graph=True)[0] for value in (ours, theirs)]
    torch.testing.assert_close(*gradients, **EXACT)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "by-block"])
@pytest.mark.parametrize("method", [BCL(), BCL(0.1, 0.7, 0.9)], ids=repr)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fast_path(case: Case, method: BCL, kept: bool) -> None:
    with blocks(kept=kept):
        assert_equals_dense(case, method)


@given(
    values=st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=4),
    negative=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=4, max_size=4),
)
def test_ranks(values: list[list[int]], negative: list[list[bool]]) -> None:
    """Of ties, all count for each other."""
    marks = torch.tensor(negative[: len(values)])
    got = no_more_similar(torch.tensor(values, dtype=torch.float64), marks)
    for i, row in enumerate(values):
        negatives = [value for j, value in enumerate(row) if marks[i, j]]
        for j, value in enumerate(row):
            if marks[i, j]:
                assert got[i, j] == sum(other <= value for other in negatives) / len(negatives)
    assert got.isfinite().all()


def test_ties_of_rows() -> None:
    """Copies of a row, whose similarities are the same number, weigh the same, and as the highest of their ranks."""
    axes = torch.eye(4, dtype=torch.float64)
    pool = torch.stack([axes[0], axes[1], axes[1], axes[2], axes[1]])
    anchors = (axes[:1] + 2 * axes[1] - axes[2]) / 4
    case = Apart(anchors, axes[3:], pool, 0.5, [-1], [[]], False)
    method = BCL(0.1, 0.7, 0.9)
    weights = importance_weights(case.contrast(), method)[0]
    want = [of_rank(share, method) for share in (0.4, 1.0, 1.0, 0.2, 1.0)]
    torch.testing.assert_close(weights, torch.tensor(want, dtype=torch.float64), **EXACT)
    assert_equal(outcome(case, method, info_nce), published(case, method))


def test_harder_negatives_weigh_more() -> None:
    """At the defaults the weight is the share itself, but for the .001 that are added: about twice it."""
    case = bank(3, 20)
    weights, similarity = importance_weights(case.contrast(), BCL()), case.anchors @ case.pool.T
    ordered = weights.gather(1, similarity.argsort(dim=1))
    assert (ordered.diff(dim=1) > 0).all()
    shares = torch.arange(1, 21, dtype=torch.float64) / 20
    torch.testing.assert_close(ordered[0], 2 * shares, rtol=4e-3, atol=0)


def test_a_mirrored_prior_is_no_prior() -> None:
    """At `alpha=.5` nothing tells true negatives from false ones: whatever the prior, the weight is `hard` alone."""
    case = rectangular(5, 9, offset=2)
    first, *others = (importance_weights(case.contrast(), BCL(prior, 0.5, 0.8)) for prior in (0.0, 0.1, 0.5, 0.9))
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", CORNERS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "case",
    [in_batch(1), in_batch(40, temperature=0.01), all_excluded(bank(5, 9)), bank(3, 1)],
    ids=["pair", "in-batch", "all-excluded", "one-negative"],
)
def test_corners_are_finite(case: Case, method: BCL, dtype: torch.dtype) -> None:
    case = to(case, dtype)
    weights = importance_weights(case.contrast(), method)
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    for kept in (True, False):
        with blocks(kept=kept):
            value, gradients = outcome(case, method, info_nce)
        assert all(part.isfinite().all() for part in (*value, *gradients))


@given(
    tau_plus=st.floats(0, 1, exclude_max=True), alpha=st.floats(0.5, 1), beta=st.floats(0.5, 1), seed=st.integers(0, 9)
)
def test_any_numbers(tau_plus: float, alpha: float, beta: float, seed: int) -> None:
    weights = importance_weights(to(bank(3, 8, seed=seed), torch.float32).contrast(), BCL(tau_plus, alpha, beta))
    assert weights.isfinite().all()
    assert (weights >= 0).all()


def test_where_nothing_is_hard() -> None:
    """At `alpha=1, beta=1` all weights are 0, and an anchor adds 0, as in the authors' code."""
    case = bank(4, 9)
    assert not importance_weights(case.contrast(), BCL(0.1, 1.0, 1.0)).any()
    value, gradients = outcome(case, BCL(0.1, 1.0, 1.0), info_nce)
    assert value[0] == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("case", [in_batch(3), bank(3, 7), rectangular(4, 7, offset=2)], ids=["pairs", "bank", "part"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "by-block"])
def test_gradcheck(case: Case, kept: bool) -> None:
    """Weights are steps of the similarities, so that a numeric gradient is the right one."""
    made, inputs = leaves(case)

    def run(*rows: Tensor) -> Tensor:
        anchors, positives, pool = rows if len(rows) == 3 else (rows[0], rows[1], rows[0])
        contrast = made._replace(anchors=anchors, positives=positives, pool=pool).contrast()
        return total(log_sums(contrast, BCL(0.1, 0.7, 0.9)))

    with blocks(kept=kept):
        assert torch.autograd.gradcheck(run, inputs)


def test_a_device_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    make_every_look_cost(monkeypatch)
    made, inputs = leaves(rectangular(5, 9, offset=2))
    contrast = made.contrast()
    with Waits() as waits:
        torch.autograd.grad(info_nce(contrast, BCL()), inputs)
    assert not waits.seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    """Ranks of float32, also under autocast."""
    first, second = (random_rows(9, 6, seed).to(dtype) for seed in (0, 1))
    contrast = two_views(first, second, 0.1)
    want = info_nce(two_views(first.float(), second.float(), 0.1), BCL())
    assert torch.equal(info_nce(contrast, BCL()), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(contrast, BCL()), want)


def test_one_pair() -> None:
    raw = random_rows(2, 4, seed=0).requires_grad_()
    loss = info_nce(two_views(raw[:1], raw[1:], 0.1), BCL())
    loss.backward()
    assert loss == 0
    assert torch.equal(raw.grad, torch.zeros_like(raw))  # type: ignore[arg-type]


def test_softened() -> None:
    case, method = rectangular(5, 9, offset=2), BCL(0.1, 0.7, 0.9)
    half = method.softened(0.5)
    assert half == Softened(method, 0.5)
    negative = case.is_negative()
    got = importance_weights(case.contrast(), half)
    torch.testing.assert_close(got[negative], weights_of(case, method)[negative].sqrt(), **EXACT)
    assert method.softened(0) == Uniform()
    assert method.softened(1) is method


def test_copies() -> None:
    weighting = BCL(0.2, 0.7, 0.9)
    for other in (pickle.loads(pickle.dumps(weighting)), copy.deepcopy(weighting)):
        assert other == weighting
        assert hash(other) == hash(weighting)
    assert repr(weighting) == "BCL(tau_plus=0.2, alpha=0.7, beta=0.9)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau_plus": 1.0}, r"tau_plus: .*at least 0 and below 1, got 1\.0"),
        ({"tau_plus": -0.1}, r"tau_plus: .*at least 0 and below 1, got -0\.1"),
        ({"alpha": 0.4}, r"alpha: .*at least 0\.5, got 0\.4"),
        ({"alpha": 1.1}, r"alpha: expected a number from 0\.5 to 1, got 1\.1"),
        ({"beta": 0.4}, r"beta: .*at least 0\.5, got 0\.4"),
        ({"beta": 1.1}, r"beta: expected a number from 0\.5 to 1, got 1\.1"),
        ({"beta": math.nan}, r"beta: .*got nan"),
        ({"alpha": "1"}, r"alpha: .*got '1'"),
    ],
    ids=str,
)
def test_refuses(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        BCL(**settings)  # type: ignore[arg-type]
