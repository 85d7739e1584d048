"""Debiased is the published objective, value and gradient, HCL without its weights, and finite where that overflows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.contrasts import bank, in_batch, random_rows
from tests.test_false_negatives import (
    FORMS,
    SEVERAL,
    Form,
    assert_same,
    of_case,
    of_two_views,
    plain_info_nce,
    plain_log_sums,
)
from tests.test_fast import blocks, total
from undimix_plugins import HCL, Debiased, Uniform, decoupled, importance_weights, info_nce, two_views
from undimix_plugins.toolkit import log_sums

PRIORS = (0.0, 0.02, 0.1, 0.5, 0.99)
each_prior = pytest.mark.parametrize("tau_plus", PRIORS)
NEAR = "near-two-views-10"  # whose positives' part is more than all negatives
each_form = pytest.mark.parametrize("form", [*FORMS, *SEVERAL, NEAR])


@pytest.fixture(params=[True, False], ids=["kept", "by-block"], autouse=True)
def small(request: pytest.FixtureRequest) -> Iterator[None]:
    with blocks(kept=request.param):
        yield


def made(name: str) -> Form:
    if name != NEAR:
        return (FORMS | SEVERAL)[name]()
    case = in_batch(5, temperature=0.1)
    views = normalize(torch.cat([case.pool[:5], case.pool[:5] + 0.1 * random_rows(5, 5, seed=2)]), dim=1)
    return of_case(case._replace(anchors=views, positives=views.roll(5, 0), pool=views))


def published(form: Form, tau_plus: float, *, positive: bool = True) -> tuple[Tensor, list[bool]]:
    """Equations 7 and 8 with gradient, of M positives, and whether each anchor's estimate is its lower bound.

    The bound is the authors' code's where anything is corrected; an anchor without negatives has none of it.
    """
    case, t, losses, bounded = form.case, form.case.temperature, [], []
    for i in range(len(case.anchors)):
        if form.listed is None:
            positives = [case.anchors[i] @ case.positives[i] / t]
        else:
            positives = [case.anchors[i] @ case.pool[j] / t for j in form.listed[i]]
        if not positives:
            losses.append(torch.zeros((), dtype=case.pool.dtype))
            continue
        total_of_positives = sum(logit.exp() for logit in positives)
        negatives = case.negatives(i)
        number = len(negatives)
        estimate = torch.zeros((), dtype=case.pool.dtype)
        if number:
            estimate = sum((case.anchors[i] @ case.pool[j] / t).exp() for j in negatives)  # type: ignore[assignment]
            if tau_plus:
                of_class = tau_plus * number * total_of_positives / len(positives)
                corrected = (estimate - of_class) / (1 - tau_plus)
                least = torch.as_tensor(number * math.e ** (-1 / t), dtype=estimate.dtype)
                bounded.append(bool(corrected < least))
                estimate = least if bounded[-1] else corrected
        denominator = estimate + total_of_positives if positive or not number else estimate
        losses.append(sum(denominator.log() - logit for logit in positives) / len(positives))
    return torch.stack(losses).mean(), bounded


@each_prior
@each_form
def test_published_objective(form: str, tau_plus: float) -> None:
    of = made(form)
    assert_same(info_nce(of.contrast, Debiased(tau_plus)), published(of, tau_plus)[0], of.inputs)
    want = published(of, tau_plus, positive=False)[0]
    assert_same(decoupled(of.contrast, Debiased(tau_plus)), want, of.inputs)


def test_lower_bound_is_met_and_not_met() -> None:
    """That the comparison above comes by the bound: for all anchors, for some and for none."""
    shares = []
    for form in (*FORMS, NEAR):
        for tau_plus in PRIORS:
            bounded = published(made(form), tau_plus)[1]
            shares += [sum(bounded) / len(bounded)] if len(bounded) > 1 else []
    assert 0 in shares
    assert 1 in shares
    assert any(0 < share < 1 for share in shares)


@each_prior
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_plain_path(form: str, tau_plus: float) -> None:
    of, weighting = made(form), Debiased(tau_plus)
    assert_same(info_nce(of.contrast, weighting), plain_info_nce(of.contrast, weighting), of.inputs)
    got, want = total(log_sums(of.contrast, weighting)), plain_log_sums(of.contrast, weighting)
    assert_same(got, want, of.inputs)


@each_prior
@each_form
def test_it_is_hcl_without_beta(form: str, tau_plus: float) -> None:
    of = made(form)
    assert_same(info_nce(of.contrast, Debiased(tau_plus)), info_nce(of.contrast, HCL(0.0, tau_plus)), of.inputs)


@each_form
def test_without_a_prior_it_is_the_plain_loss(form: str) -> None:
    of = made(form)
    assert_same(info_nce(of.contrast, Debiased(0.0)), info_nce(of.contrast, Uniform()), of.inputs)


def test_weights_are_1() -> None:
    of = of_case(bank(4, 9))
    assert torch.equal(importance_weights(of.contrast, Debiased(0.5)), torch.ones(4, 9, dtype=torch.float64))


@pytest.mark.parametrize("tau_plus", [0.05, 0.3])
def test_gradcheck(tau_plus: float) -> None:
    rows = random_rows(12, 4, seed=1, unit=False).requires_grad_()

    def of_views(views: Tensor) -> Tensor:
        return info_nce(two_views(*normalize(views, dim=1).split(6), 0.3), Debiased(tau_plus))

    assert torch.autograd.gradcheck(of_views, rows)


@pytest.mark.parametrize("tau_plus", [0.01, 0.1])
def test_low_temperature_in_float32(tau_plus: float) -> None:
    """exp(1 / .01) is no float32; its logarithm is. A cosine's rounding eps becomes eps / t."""
    t = 0.01
    of = of_two_views(7, temperature=t)
    want, _ = published(of, tau_plus)
    single = [rows.detach().float().requires_grad_() for rows in of.inputs]
    loss = info_nce(two_views(*(normalize(rows, dim=1) for rows in single), t), Debiased(tau_plus))
    bound = 8 * torch.finfo(torch.float32).eps / t
    torch.testing.assert_close(loss.double(), want, rtol=bound, atol=bound)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, single))


def test_one_pair() -> None:
    of = of_case(in_batch(1))
    loss = info_nce(of.contrast, Debiased())
    assert loss == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, of.inputs))


def test_the_more_positive_the_anchor_the_less_its_negatives() -> None:
    """A larger prior takes more from the sum, until the bound."""
    of = of_case(in_batch(8, 6, temperature=1.0))
    sums = [log_sums(of.contrast, Debiased(tau_plus)).negatives for tau_plus in (0.0, 0.05, 0.1)]
    positives = log_sums(of.contrast, Debiased()).positives
    plain_mean = sums[0] - math.log(14)
    likely = positives > plain_mean  # than the mean of all: the class's part is above its share
    assert (sums[1] < sums[0])[likely].all()
    assert (sums[2] < sums[1])[likely].all()
    assert (sums[1] > sums[0])[~likely].all()
    assert 0 < likely.sum() < len(likely)


def test_softened() -> None:
    assert Debiased(0.4).softened(0.5) == Debiased(0.2)
    assert Debiased(0.4).softened(1) == Debiased(0.4)
    assert Debiased(0.4).softened(0) == Debiased(0.0)
    with pytest.raises(ValueError, match=r"^share: .*got -1"):
        Debiased().softened(-1)


@pytest.mark.parametrize(
    ("tau_plus", "message"),
    [
        (1.0, r"tau_plus: expected a finite number at least 0 and below 1, got 1\.0"),
        (-0.1, r"tau_plus: .*at least 0 and below 1, got -0\.1"),
        (math.nan, r"tau_plus: .*got nan"),
        ("0.1", r"tau_plus: .*got '0\.1'"),
    ],
    ids=str,
)
def test_refuses(tau_plus: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Debiased(tau_plus)
