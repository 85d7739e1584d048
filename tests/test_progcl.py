"""ProGCL's weights are the published ones, of a mixture that a slow loop fits as well, and are its call's own."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta as beta_distribution
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests import references
from tests.contrasts import Case, bank, in_batch, random_rows, rectangular
from tests.test_fast import CASES, Outcome, all_excluded, assert_same, blocks, leaves, outcome, to
from undimix_plugins import (
    Contrast,
    ProGCL,
    Uniform,
    decoupled,
    importance_weights,
    info_nce,
    negative_statistics,
    two_views,
    unit_rows,
    watch,
)
from undimix_plugins.toolkit import log_sums, same_label, weighted_log_sum
from undimix_plugins.weightings import progcl
from undimix_plugins.weightings.progcl import Mixture, fitted
from undimix_plugins.weightings.weighting import Softened

EXACT = {"rtol": 1e-10, "atol": 1e-10}
EPS = 1e-12
SHAPES = {
    "in-batch-4": in_batch(2),
    "in-batch-10": in_batch(5, temperature=0.2),
    "bank-4x9": bank(4, 9, temperature=0.1),
    "bank-1x2": bank(1, 2),
    "rectangular-5x9": rectangular(5, 9, offset=2),
    "rectangular-6x7": rectangular(6, 7, offset=1),
}
each_shape = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)


class Slow:
    """Two beta distributions by expectation and maximisation, one similarity at a time: the authors' BetaMixture1D."""

    def __init__(self, similarity: list[float], weight_init: float, iters: int) -> None:
        self.alphas, self.betas, self.weights = [1.0, 2.0], [2.0, 1.0], [1 - weight_init, weight_init]
        similarity = [min(max(x, EPS), 1 - EPS) for x in similarity]
        for _ in range(iters):
            shares = [[max(self.joint(x, k), EPS) for k in (0, 1)] for x in similarity]
            shares = [[share / sum(pair) for share in pair] for pair in shares]
            for k in (0, 1):
                of = [pair[k] for pair in shares]
                mean = sum(r * x for r, x in zip(of, similarity, strict=True)) / sum(of)
                variance = sum(r * (x - mean) ** 2 for r, x in zip(of, similarity, strict=True)) / sum(of)
                self.alphas[k] = mean * (mean * (1 - mean) / variance - 1)
                self.betas[k] = self.alphas[k] * (1 - mean) / mean
            if self.betas[1] < 1:
                self.betas[1] = 1.01
            self.weights = [sum(pair[k] for pair in shares) / len(shares) for k in (0, 1)]

    def joint(self, x: float, k: int) -> float:
        return float(self.weights[k] * beta_distribution.pdf(x, self.alphas[k], self.betas[k]))

    def true_negative(self, x: float) -> float:
        return self.joint(x, 0) / (self.joint(x, 0) + self.joint(x, 1) + EPS)


def similarities(case: Case, i: int) -> dict[int, float]:
    """Those of an anchor's negatives, between 0 and 1."""
    return {j: min(max((1 + (case.anchors[i] @ case.pool[j]).item()) / 2, EPS), 1 - EPS) for j in case.negatives(i)}


def weights_of(case: Case, weight_init: float = 0.05, iters: int = 10) -> Tensor:
    """One anchor and one negative at a time [n, m], 0 for what is no negative."""
    every = [similarities(case, i) for i in range(len(case.anchors))]
    mixture = Slow([x for of_anchor in every for x in of_anchor.values()], weight_init, iters)
    weights = torch.zeros(len(case.anchors), len(case.pool), dtype=case.pool.dtype)
    for i, of_anchor in enumerate(every):
        importance = {j: mixture.true_negative(x) * x for j, x in of_anchor.items()}
        for j in importance:
            weights[i, j] = importance[j] * len(importance) / sum(importance.values())
    return weights


def published(case: Case) -> Outcome:
    weights = weights_of(case)
    case, inputs = leaves(case)
    value = references.info_nce(case, weights)
    return Outcome([value], list(torch.autograd.grad(value, inputs, materialize_grads=True)))


def assert_equal(got: Outcome, want: Outcome) -> None:
    for one, other in zip([*got.values, *got.gradients], [*want.values, *want.gradients], strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def of_this_batch(case: Case) -> ProGCL:
    """Fitted to it once."""
    weighting = ProGCL()
    weighting.fit(case.contrast())
    return weighting


# --- the fit


@pytest.mark.parametrize("iters", [1, 2, 10])
@pytest.mark.parametrize("weight_init", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("of", ["uniform", "two-groups", "few"])
def test_fit_is_the_slow_loop(of: str, weight_init: float, iters: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(12 if of == "few" else 120, generator=generator, dtype=torch.float64)
    if of == "two-groups":
        x = torch.where(torch.arange(120) < 100, 0.1 + x / 3, 0.75 + x / 6)
    got, want = fitted(x, weight_init, iters), Slow(x.tolist(), weight_init, iters)
    for one, other in zip(got, (want.alphas, want.betas, want.weights), strict=True):
        torch.testing.assert_close(one, torch.tensor(other, dtype=torch.float64), rtol=1e-8, atol=1e-8)
    for place in torch.linspace(0.01, 0.99, 21, dtype=torch.float64):
        expected = torch.tensor(want.true_negative(place.item()), dtype=torch.float64)
        torch.testing.assert_close(got.true_negative(place), expected, rtol=1e-8, atol=1e-8)


def test_two_groups_are_told_apart() -> None:
    """True negatives begin at low similarities."""
    x = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.where(torch.arange(2000) < 1600, 0.2 + x / 5, 0.8 + x / 10)
    mixture = fitted(x, 0.05, 10)
    torch.testing.assert_close(mixture.weights, torch.tensor([0.8, 0.2], dtype=torch.float64), rtol=0, atol=0.01)
    low, high = mixture.true_negative(torch.tensor([0.3, 0.85], dtype=torch.float64)).tolist()
    assert low > 0.99
    assert high < 0.01


def test_a_single_similarity_of_its_own() -> None:
    """A distribution of no variance is as narrow as may be, about it."""
    x = torch.tensor([0.3] * 99 + [0.6], dtype=torch.float64)
    mixture = fitted(x, 0.05, 10)
    means = mixture.alphas / (mixture.alphas + mixture.betas)
    narrow = (mixture.alphas + mixture.betas + 1) / 1e8
    torch.testing.assert_close(narrow, torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(means, torch.tensor([0.3, 0.6], dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(mixture.weights, torch.tensor([0.99, 0.01], dtype=torch.float64), rtol=1e-6, atol=0)
    assert mixture.true_negative(x[[0, -1]]).round().tolist() == [1, 0]


def test_densities_are_those_of_scipy() -> None:
    mixture = Mixture(*(torch.tensor(pair, dtype=torch.float64) for pair in ([3.0, 7.5], [2.0, 1.5], [0.7, 0.3])))
    x = torch.tensor([[1e-12, 0.2], [0.5, 1 - 1e-12]], dtype=torch.float64)
    for k in (0, 1):
        density = beta_distribution.pdf(x.numpy(), mixture.alphas[k].item(), mixture.betas[k].item())
        want = mixture.weights[k] * torch.from_numpy(density)
        torch.testing.assert_close(mixture.joint(x)[..., k], want, rtol=1e-9, atol=1e-15)


@given(
    values=st.lists(st.floats(EPS, 1 - EPS), min_size=2, max_size=6, unique=True),
    often=st.lists(st.integers(1, 99), min_size=6, max_size=6),
    weight_init=st.floats(0.001, 0.999),
)
def test_any_fit_is_finite(values: list[float], often: list[int], weight_init: float) -> None:
    """Also where a distribution would have a single similarity to itself, and would be infinitely high there."""
    x = torch.tensor([v for v, count in zip(values, often, strict=False) for _ in range(count)], dtype=torch.float64)
    mixture = fitted(x, weight_init, 10)
    assert all(part.isfinite().all() for part in mixture)
    everywhere = torch.cat([x, torch.linspace(EPS, 1 - EPS, 101, dtype=torch.float64)])
    posterior = mixture.true_negative(everywhere)
    assert ((posterior >= 0) & (posterior <= 1)).all()


def test_a_hundred_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a larger pool, different ones, the same for the same call."""
    seen = []

    def spied(similarity: Tensor, weight_init: float, iters: int) -> Mixture:
        seen.append(similarity)
        return fitted(similarity, weight_init, iters)

    monkeypatch.setattr(progcl, "fitted", spied)
    case = bank(3, 150)
    weighting = ProGCL(start=1, every=1)
    with torch.no_grad():
        weighting.fit(case.contrast())
        weighting.fit(case.contrast())
    outcome(case, weighting, info_nce)
    every = (1 + case.anchors @ case.pool.T) / 2
    for x in seen:
        assert len(x) == 300
        column = (x.view(3, 100)[0, :, None] - every[0]).abs().argmin(dim=1)
        assert len(set(column.tolist())) == 100
        torch.testing.assert_close(x.view(3, 100), every[:, column], **EXACT)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_only_negatives_are_fitted_to() -> None:
    """Rows that are excluded, by column or by a mask, do not matter."""
    case = rectangular(5, 9, offset=2)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    excluded_mask = same_label(labels[2:7], labels)
    contrast = case.contrast().without(mask=excluded_mask)
    weighting = ProGCL()
    weighting.fit(contrast)
    excluded = [[*case.excluded[i], *excluded_mask(slice(i, i + 1))[0].nonzero()[:, 0].tolist()] for i in range(5)]
    want = of_this_batch(case._replace(excluded=excluded))
    for one, other in zip(weighting.mixture or (), want.mixture or (), strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    assert len(weighting.mixture or ()) == 3


@pytest.mark.parametrize(
    ("case", "number"),
    [
        (bank(2, 3)._replace(pool=random_rows(1, 5, seed=1).expand(3, -1), anchors=random_rows(1, 5, seed=2)), 3),
        (in_batch(1), 0),
    ],
    ids=["equal", "none"],
)
def test_refuses_to_fit_to_nothing(case: Case, number: int) -> None:
    case = case._replace(
        positives=case.positives[: len(case.anchors)], own_columns=case.own_columns[: len(case.anchors)]
    )
    case = case._replace(excluded=case.excluded[: len(case.anchors)], anchor_inputs=None, pool_inputs=None)
    weighting = ProGCL(start=1)
    message = rf"^contrast: expected negatives of different similarities to fit, got {number}$"
    with pytest.raises(ValueError, match=message):
        weighting.fit(case.contrast())
    plain = info_nce(case.contrast(), Uniform())
    torch.testing.assert_close(info_nce(case.contrast(), weighting), plain)  # training goes on
    assert weighting.mixture is None
    info_nce(in_batch(5).contrast(), weighting)
    assert weighting.mixture is not None


def test_random_state_stays() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    outcome(bank(3, 150), ProGCL(start=1, every=1), info_nce)
    assert torch.equal(torch.get_rng_state(), before)


def test_fit_under_autocast() -> None:
    case = to(in_batch(9, 6), torch.float32)
    want = of_this_batch(case).mixture
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = of_this_batch(case).mixture
    assert got is not None
    assert want is not None
    assert all(map(torch.equal, got, want))


# --- weights


@each_shape
def test_published_weights(case: Case) -> None:
    weighting = of_this_batch(case)
    torch.testing.assert_close(importance_weights(case.contrast(), weighting), weights_of(case), **EXACT)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "by-block"])
@each_shape
def test_published_loss(case: Case, kept: bool) -> None:
    """At the call that fits and, of the same batch, at the one after."""
    want = published(case)
    for rows in (2, 64):
        with blocks(kept=kept, rows=rows):
            weighting = ProGCL(start=1)
            assert_equal(outcome(case, weighting, info_nce), want)
            assert_equal(outcome(case, weighting, info_nce), want)


def test_each_call_has_its_own_weights() -> None:
    """By the mixture that an earlier batch was fitted by."""
    weighting, case = of_this_batch(bank(4, 9)), rectangular(5, 9, offset=2)
    mixture = weighting.mixture
    assert mixture is not None
    got = importance_weights(case.contrast(), weighting)
    for i in range(5):
        of_anchor = similarities(case, i)
        posterior = mixture.true_negative(torch.tensor(list(of_anchor.values()), dtype=torch.float64)).tolist()
        importance = [p * x for p, x in zip(posterior, of_anchor.values(), strict=True)]
        want = torch.tensor(importance, dtype=torch.float64) * len(importance) / sum(importance)
        torch.testing.assert_close(got[i, list(of_anchor)], want, **EXACT)
    assert weighting.mixture is mixture


def plain(contrast: Contrast, weighting: ProGCL) -> tuple[Tensor, Tensor]:
    rows = slice(0, len(contrast.anchors))
    negatives = weighted_log_sum(contrast, weighting, weighting.prepare(contrast), rows)
    return (contrast.anchors * contrast.positives).sum(dim=1) / contrast.temperature, negatives


def plain_info_nce(contrast: Contrast, weighting: ProGCL) -> Tensor:
    positives, negatives = plain(contrast, weighting)
    return torch.logaddexp(negatives - positives, torch.zeros_like(positives)).mean()


def plain_decoupled(contrast: Contrast, weighting: ProGCL) -> Tensor:
    positives, negatives = plain(contrast, weighting)
    return (negatives - positives).masked_fill(negatives.isneginf(), 0).mean()


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "by-block"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fast_path(case: Case, kept: bool) -> None:
    """Equal to the plain one, before and after the fit."""
    weightings = [ProGCL(), of_this_batch(bank(4, 30))]
    with blocks(kept=kept):
        for weighting in weightings:
            for loss, reference in ((info_nce, plain_info_nce), (decoupled, plain_decoupled), (log_sums, plain)):
                assert_same(outcome(case, weighting, loss), outcome(case, weighting, reference))  # type: ignore[arg-type]


@each_shape
def test_weights_are_of_mean_one_and_constants(case: Case) -> None:
    weighting = of_this_batch(case)
    weights, negative = importance_weights(case.contrast(), weighting), case.is_negative()
    torch.testing.assert_close(weights.sum(dim=1), negative.sum(dim=1).double(), **EXACT)
    contrast = leaves(case)[0].contrast()
    assert not weighting.log_weights(weighting.prepare(contrast), slice(0, 2)).requires_grad


def test_a_mixture_of_another_place() -> None:
    """Where both densities are 0, an anchor's negatives count nothing, and nothing is NaN."""
    weighting = ProGCL()
    weighting.fit(bank(2, 9)._replace(pool=random_rows(9, 5, seed=0) * 1e-4).contrast())
    axes = torch.eye(5, dtype=torch.float64)
    case = Case(axes[:2], axes[:2], -axes[:2], 0.5, [-1, -1], [[1], [0]], False)
    value, gradients = outcome(case, weighting, info_nce)
    assert value[0] == 0
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_float32(temperature: float) -> None:
    case = to(in_batch(20, 6, temperature=temperature), torch.float32)
    weighting = of_this_batch(case)
    value, gradients = outcome(case, weighting, info_nce)
    assert value[0].dtype == torch.float32
    assert all(part.isfinite().all() for part in (*value, *gradients))
    exact = outcome(to(case, torch.float64), weighting, info_nce).values[0]
    rounding = 16 * torch.finfo(torch.float32).eps / temperature
    torch.testing.assert_close(value[0].double(), exact, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    first, second = (random_rows(9, 6, seed).to(dtype) for seed in (0, 1))
    contrast = two_views(first, second, 0.1)
    want = info_nce(two_views(first.float(), second.float(), 0.1), ProGCL(start=1))
    assert torch.equal(info_nce(contrast, ProGCL(start=1)), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(contrast, ProGCL(start=1)), want)


def test_identical_rows() -> None:
    """An encoder that gives one point, but for rounding, trains on."""
    rows = (random_rows(1, 6, seed=0) + 1e-7 * random_rows(12, 6, seed=1)).float().requires_grad_()
    unit = torch.nn.functional.normalize(rows, dim=1)
    loss = info_nce(two_views(unit[:6], unit[6:], 0.5), ProGCL(start=1))
    loss.backward()
    assert loss.isfinite()
    assert rows.grad is not None
    assert rows.grad.isfinite().all()


# --- when


@each_shape
def test_before_the_fit_it_is_the_plain_loss(case: Case) -> None:
    assert_equal(outcome(case, ProGCL(start=2), info_nce), outcome(case, Uniform(), info_nce))
    weights = importance_weights(case.contrast(), ProGCL())
    assert torch.equal(weights, case.is_negative().double())


def fits(weighting: ProGCL, calls: int) -> list[int]:
    """The calls, from 1, at which a mixture is fitted."""
    found, before = [], weighting.mixture
    for call in range(1, calls + 1):
        outcome(bank(3, 8, seed=call), weighting, info_nce)
        if weighting.mixture is not before:
            found.append(call)
        before = weighting.mixture
    return found


@pytest.mark.parametrize(
    ("start", "every", "expected"),
    [
        (1, None, [1]),
        (4, None, [4]),
        (12, None, []),
        (1, 1, list(range(1, 11))),
        (3, 2, [3, 5, 7, 9]),
        (2, 5, [2, 7]),
        (3.0, 4.0, [3, 7]),
    ],
    ids=str,
)
def test_calls(start: int, every: int | None, expected: list[int]) -> None:
    assert fits(ProGCL(start=start, every=every), 10) == expected


def test_calls_without_gradient_do_not_count() -> None:
    weighting = ProGCL(start=2)
    with torch.no_grad():
        for _ in range(5):
            info_nce(bank(3, 8).contrast(), weighting)
    importance_weights(bank(3, 8).contrast(), weighting)
    assert weighting.calls == 0
    assert fits(weighting, 3) == [2]


def test_a_fit_by_hand_is_kept() -> None:
    """A resumed training need not wait for `start`, and at `start` nothing is fitted again unless asked."""
    weighting = ProGCL(start=3)
    weighting.fit(bank(3, 8).contrast())
    assert weighting.mixture is not None
    assert fits(weighting, 5) == []
    again = ProGCL(start=3, every=1)
    again.fit(bank(3, 8).contrast())
    assert fits(again, 5) == [3, 4, 5]


@pytest.mark.parametrize("loss", [info_nce, log_sums], ids=["info_nce", "log_sums"])
def test_backward_has_the_mixture_of_its_forward(loss: object) -> None:
    """Where a later call fits before an earlier one's backward, as of a loss of two directions."""
    case = bank(5, 9)
    want = outcome(case, Uniform(), loss)  # type: ignore[arg-type]
    weighting = ProGCL(start=2)

    def both(contrast: Contrast, weighting: ProGCL) -> object:
        value = loss(contrast, weighting)  # type: ignore[operator]
        info_nce(rectangular(5, 9, offset=2).contrast(), weighting)
        return value

    with blocks(kept=False, rows=2):
        got = outcome(case, weighting, both)  # type: ignore[arg-type]
    assert weighting.mixture is not None
    assert_equal(got, want)


# --- the rest


def test_softened() -> None:
    case = rectangular(5, 9, offset=2)
    weighting = of_this_batch(case)
    half = weighting.softened(0.5)
    assert isinstance(half, Softened)
    negative = case.is_negative()
    got = importance_weights(case.contrast(), half)
    torch.testing.assert_close(got[negative], weights_of(case)[negative].sqrt(), **EXACT)
    assert weighting.softened(1) is weighting
    assert weighting.softened(0) == Uniform()
    outcome(case, half, info_nce)
    assert weighting.calls == 1  # on its way, it counts and fits


def test_copies() -> None:
    """With what was fitted and counted; each goes on alone."""
    case = bank(4, 9)
    weighting = ProGCL(start=1, every=2)
    before = outcome(case, weighting, info_nce)
    for other in (pickle.loads(pickle.dumps(weighting)), copy.deepcopy(weighting)):
        assert other.calls == 1
        assert all(map(torch.equal, other.mixture, weighting.mixture or ()))
        again = outcome(case, other, info_nce)
        assert all(map(torch.equal, again.values + again.gradients, before.values + before.gradients))
        assert other.calls == 2
    assert weighting.calls == 1
    assert repr(weighting) == "ProGCL(start=1, every=2, weight_init=0.05, iters=10)"


def test_an_anchor_without_negatives() -> None:
    case = all_excluded(bank(5, 9))
    value, gradients = outcome(case, ProGCL(start=1), info_nce)
    assert all(part.isfinite().all() for part in (*value, *gradients))
    assert not gradients[0][1].any()
    assert gradients[0][0].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 0}, "start: .*at least 1, got 0"),
        ({"start": 1.5}, r"start: expected a whole number, got 1\.5"),
        ({"every": 0}, "every: .*at least 1, got 0"),
        ({"every": 2.5}, r"every: expected a whole number, got 2\.5"),
        ({"weight_init": 0.0}, r"weight_init: .*above 0.*got 0\.0"),
        ({"weight_init": 1.0}, r"weight_init: .*below 1.*got 1\.0"),
        ({"weight_init": math.nan}, "weight_init: .*got nan"),
        ({"iters": 0}, "iters: .*at least 1, got 0"),
        ({"iters": 1.5}, r"iters: expected a whole number, got 1\.5"),
        ({"iters": "10"}, "iters: .*got '10'"),
    ],
    ids=str,
)
def test_refuses(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        ProGCL(**settings)  # type: ignore[arg-type]


def test_what_is_watched_is_fitted() -> None:
    """Statistics worked out while the loss that fits is called are of the weights that it uses."""
    contrast, weighting, seen = in_batch(9).contrast(), ProGCL(start=1), list[float]()
    with watch(lambda *compared: seen.append(negative_statistics(*compared)["effective_number"])):
        info_nce(contrast, weighting)
        info_nce(contrast, weighting)
    assert seen[0] == seen[1] < contrast.count[0]


class Recomputed(nn.Module):
    """Two directions of an encoder's outputs, each a call, under activation checkpointing or not."""

    def __init__(self, weighting: ProGCL, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4).double()
        self.weighting, self.checkpointed = weighting, checkpointed

    def both(self, first: Tensor, second: Tensor) -> Tensor:
        z0, z1 = unit_rows(z0=self.layer(first), z1=self.layer(second))
        return info_nce(two_views(z0, z1, 0.5), self.weighting) + info_nce(two_views(z1, z0, 0.5), self.weighting)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        if not self.checkpointed:
            return self.both(first, second)
        return checkpoint(self.both, first, second, use_reentrant=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("every", [None, 1, 3], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e3], ids=str)
def test_what_is_worked_out_again_is_no_call(every: int | None, scale: float) -> None:
    """Two steps of two calls: before the fit, at it, and after."""
    gradients, calls = [], []
    for checkpointed in (False, True):
        weighting = ProGCL(start=2, every=every)
        model = Recomputed(weighting, checkpointed)
        for seed in (0, 2):
            loss = model(scale * random_rows(9, 4, seed), scale * random_rows(9, 4, seed + 1))
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        calls.append(weighting.calls)
    assert calls == [4, 4]
    for got, want in zip(gradients[2:], gradients[:2], strict=True):
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other)


def test_many_calls_before_a_backward_pass() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = Recomputed(ProGCL(start=3, every=2), checkpointed)
        loss = sum(model(random_rows(9, 4, seed), random_rows(9, 4, seed + 1)) for seed in range(30))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))  # type: ignore[arg-type]
        assert model.weighting.calls == 60
    assert all(map(torch.equal, *gradients))


def test_what_is_worked_out_again_is_not_shown_again() -> None:
    seen: list[object] = []
    model = Recomputed(ProGCL(), checkpointed=True)
    with watch(lambda *compared: seen.append(compared)):
        model(random_rows(9, 4, 0), random_rows(9, 4, 1)).backward()
    assert len(seen) == 2


def test_reentrant_checkpointing_calls_once() -> None:
    weighting = ProGCL(start=1)
    model = Recomputed(weighting, checkpointed=False)
    first, second = random_rows(9, 4, 0).requires_grad_(), random_rows(9, 4, 1)
    checkpoint(model.both, first, second, use_reentrant=True).backward()
    assert weighting.calls == 2
    assert weighting.mixture is not None


def test_another_default_device() -> None:
    """As under `torch.set_default_device("cuda")`: nothing is made but where the embeddings are."""
    contrast = in_batch(6).contrast()
    want, got = ProGCL(start=1), ProGCL(start=1)
    loss = info_nce(contrast, want)
    with torch.device("meta"):
        assert torch.equal(info_nce(contrast, got), loss)
    assert want.mixture is not None
    assert got.mixture is not None
    assert all(map(torch.equal, got.mixture, want.mixture))
