"""ADNCE is the authors' code, value and gradient: Gaussian weights of mean 1 around a similarity, constants."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from tests.contrasts import SHAPES, Case, bank, in_batch, random_rows, rectangular
from tests.test_fast import CASES, Outcome, assert_equals_dense, assert_same, blocks, leaves, outcome, to
from undimix_plugins import (
    ADNCE,
    Contrast,
    Debiased,
    FalseNegativeElimination,
    SimilarityPenalty,
    UnDiMix,
    Uniform,
    compose,
    decoupled,
    importance_weights,
    info_nce,
    two_views,
)
from undimix_plugins.toolkit import log_sums
from undimix_plugins.weightings.weighting import Softened

EXACT = {"rtol": 1e-10, "atol": 1e-10}
SETTINGS = [(0.7, 1.0), (0.7, 0.5), (2.0, 1.0), (0.2, 0.1), (-0.5, 0.3)]
each_shape = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)


def gaussians(case: Case, i: int, mu: float, sigma: float) -> dict[int, float]:
    """The weights of an anchor's negatives, one at a time; the density's factor too, which their mean takes out."""
    density = {}
    for j in case.negatives(i):
        similarity = (case.anchors[i] * case.pool[j]).sum().item()
        density[j] = math.exp(-((similarity - mu) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    return {j: value * len(density) / sum(density.values()) for j, value in density.items()}


def published(case: Case, mu: float, sigma: float, *, positive: bool = True) -> Outcome:
    """The authors' loss for images, a term at a time; without a positive in the denominator, that for graphs."""
    case, inputs = leaves(case)
    losses = []
    for i, (anchor, plus) in enumerate(zip(case.anchors, case.positives, strict=True)):
        logit = anchor @ plus / case.temperature
        terms = [w * (anchor @ case.pool[j] / case.temperature).exp() for j, w in gaussians(case, i, mu, sigma).items()]
        total = sum(terms, start=logit.exp() if positive else torch.zeros_like(logit))
        losses.append(total.log() - logit if len(terms) or positive else torch.zeros_like(logit))
    value = torch.stack(losses).mean()
    gradients = torch.autograd.grad(value, inputs, materialize_grads=True, allow_unused=True)
    return Outcome([value], list(gradients))


def assert_equal(got: Outcome, want: Outcome) -> None:
    for one, other in zip([*got.values, *got.gradients], [*want.values, *want.gradients], strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "by-block"])
@each_setting
@each_shape
def test_published_loss(case: Case, setting: tuple[float, float], kept: bool) -> None:
    with blocks(kept=kept, rows=2):
        assert_equal(outcome(case, ADNCE(*setting), info_nce), published(case, *setting))


@each_setting
@pytest.mark.parametrize("name", ["in-batch-10", "bank-4x9", "rectangular-5x9"])
def test_published_loss_of_graphs(name: str, setting: tuple[float, float]) -> None:
    want = published(SHAPES[name], *setting, positive=False)
    assert_equal(outcome(SHAPES[name], ADNCE(*setting), decoupled), want)


@each_setting
@each_shape
def test_weights(case: Case, setting: tuple[float, float]) -> None:
    weights = importance_weights(case.contrast(), ADNCE(*setting))
    for i, row in enumerate(weights.tolist()):
        expected = gaussians(case, i, *setting)
        assert row == pytest.approx([expected.get(j, 0.0) for j in range(len(row))], rel=1e-10)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "by-block"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fast_path(case: Case, kept: bool) -> None:
    with blocks(kept=kept):
        assert_equals_dense(case, ADNCE(0.4, 0.3))


def test_gradcheck() -> None:
    """The weights are constants, so they are held where gradients are differences."""
    rows = random_rows(8, 4, seed=0).requires_grad_()
    held = importance_weights(two_views(*rows.detach().chunk(2), 0.3), ADNCE(0.3, 0.4)).log()

    class Held(Uniform):
        def log_weights(self, prepared: object, rows: slice) -> Tensor:
            return held[rows]

    assert gradcheck(lambda rows: info_nce(two_views(*rows.chunk(2), 0.3), Held()), rows)
    weighted, fixed = (info_nce(two_views(*rows.chunk(2), 0.3), weighting) for weighting in (ADNCE(0.3, 0.4), Held()))
    torch.testing.assert_close(torch.autograd.grad(weighted, rows), torch.autograd.grad(fixed, rows), **EXACT)


@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=12),
    st.floats(-2, 2),
    st.floats(0.05, 10),
)
def test_nearer_to_mu_counts_more(similarities: list[float], mu: float, sigma: float) -> None:
    """Mean 1, and the order of the distances from mu."""
    pool = torch.tensor([[s, math.sqrt(1 - s * s)] for s in similarities], dtype=torch.float64)
    anchor = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    weights = importance_weights(Contrast.of(anchor, anchor.clone(), pool, None, 0.5), ADNCE(mu, sigma))[0]
    assert weights.mean().item() == pytest.approx(1, abs=1e-9)
    by_distance = sorted(range(len(similarities)), key=lambda j: abs(similarities[j] - mu))
    ordered = weights[by_distance].tolist()
    assert all(nearer >= farther - 1e-9 * nearer for nearer, farther in pairwise(ordered))


@pytest.mark.parametrize("sigma", [1e3, 1e30])
@each_shape
def test_a_wide_gaussian_is_the_plain_loss(case: Case, sigma: float) -> None:
    got, want = outcome(case, ADNCE(0.7, sigma), info_nce), outcome(case, Uniform(), info_nce)
    for one, other in zip([*got.values, *got.gradients], [*want.values, *want.gradients], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mu", [-1e15, -50.0, 50.0, 1e15])
def test_a_centre_far_away_keeps_its_digits(mu: float) -> None:
    """There a Gaussian is an exponential of the similarity, of slope mu / sigma ** 2."""
    case, sigma = bank(4, 9), math.sqrt(abs(mu))
    similarity = case.anchors @ case.pool.T
    weights = importance_weights(case.contrast(), ADNCE(mu, sigma))
    exponents = (math.copysign(1, mu) * similarity) - (similarity.square() / (2 * sigma**2))
    expected = exponents.softmax(dim=1) * 9
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-9)


def test_in_float32() -> None:
    for setting in [*SETTINGS, (1e15, 1e-6), (0.0, 1e-6), (-1e15, 1e30)]:
        case = to(in_batch(7, 6, temperature=0.05), torch.float32)
        value, gradients = outcome(case, ADNCE(*setting), info_nce)
        assert value[0].dtype == torch.float32
        assert all(part.isfinite().all() for part in (*value, *gradients))


def test_weights_are_constants() -> None:
    contrast = leaves(bank(4, 9))[0].contrast()
    assert not ADNCE().log_weights(contrast, slice(0, 4)).requires_grad
    assert ADNCE().has_mean_one


def test_one_pair() -> None:
    raw = random_rows(2, 4, seed=0).requires_grad_()
    loss = info_nce(two_views(raw[:1], raw[1:], 0.1), ADNCE())
    loss.backward()
    assert loss == 0
    assert torch.equal(raw.grad, torch.zeros_like(raw))  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.25, 0.9])
def test_softened(share: float) -> None:
    """A power of the weights, with mean 1 again."""
    case, full = rectangular(5, 9, offset=2), ADNCE(0.3, 0.2)
    soft = full.softened(share)
    powers = importance_weights(case.contrast(), Softened(full, share))
    count = case.contrast().count[:, None]
    torch.testing.assert_close(
        importance_weights(case.contrast(), soft), powers * count / powers.sum(dim=1, keepdim=True), **EXACT
    )
    assert full.softened(0) == Uniform()
    assert full.softened(1) == full
    assert ADNCE(0.3, 1e30).softened(1e-300) == ADNCE(0.3, 1e30)
    with pytest.raises(ValueError, match=r"^share: .*got 1\.5"):
        full.softened(1.5)


def test_composed() -> None:
    """With debiasing, since its weights have mean 1; with others' weights it is multiplied."""
    case = in_batch(5)
    assert compose(ADNCE(), Debiased()).has_mean_one
    with pytest.raises(ValueError, match="not defined for a product of weights"):
        compose(ADNCE(), Debiased(), UnDiMix())
    both = importance_weights(case.contrast(), compose(ADNCE(0.2, 0.3), SimilarityPenalty(2.0)))
    one, other = (importance_weights(case.contrast(), part) for part in (ADNCE(0.2, 0.3), SimilarityPenalty(2.0)))
    torch.testing.assert_close(both, one * other, **EXACT)
    fewer = compose(FalseNegativeElimination(2, 0.1), ADNCE(0.2, 0.3))
    left = importance_weights(fewer.choose(case.contrast()), ADNCE(0.2, 0.3))
    assert_same(outcome(case, fewer, log_sums), outcome(case, compose(ADNCE(0.2, 0.3), fewer.parts[0]), log_sums))  # type: ignore[attr-defined]
    torch.testing.assert_close(importance_weights(case.contrast(), fewer), left, **EXACT)


def test_copies() -> None:
    weighting = ADNCE(0.4, 0.3)
    for other in (pickle.loads(pickle.dumps(weighting)), copy.deepcopy(weighting)):
        assert other == weighting
        assert hash(other) == hash(weighting)
    assert repr(weighting) == "ADNCE(mu=0.4, sigma=0.3)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mu": math.nan}, "mu: .*got nan"),
        ({"mu": 1e16}, r"mu: expected a number from -1e\+15 to 1e\+15, got 1e\+16"),
        ({"sigma": 0.0}, r"sigma: expected at least 1e-06, got 0\.0"),
        ({"sigma": -1.0}, r"sigma: .*at least 0, got -1\.0"),
        ({"sigma": 1e31}, r"sigma: expected at most 1e\+30, got 1e\+31"),
        ({"sigma": "1"}, "sigma: .*got '1'"),
    ],
    ids=str,
)
def test_refuses(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        ADNCE(**settings)  # type: ignore[arg-type]
