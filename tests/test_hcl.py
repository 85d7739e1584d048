"""HCL is the published objective, value and gradient, and stays finite where that overflows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests import references
from tests.contrasts import Case, bank, in_batch, random_rows, rectangular
from undimix_plugins import HCL, Uniform, importance_weights, info_nce, two_views

EXACT = {"rtol": 1e-10, "atol": 1e-10}
BETAS = (0.0, 0.5, 1.0, 2.0)
PRIORS = (0.0, 0.1, 0.5)


def views(pairs: int, closeness: float, width: int = 6) -> Tensor:
    """First views and second views that are `closeness` apart, raw."""
    first = random_rows(pairs, width, seed=pairs)
    return torch.cat([first, first + closeness * random_rows(pairs, width, seed=pairs + 1)]).requires_grad_()


def published_and_ours(raw: Tensor, beta: float, tau_plus: float, t: float) -> tuple[Tensor, Tensor, list[bool]]:
    pairs = len(raw) // 2
    out = normalize(raw, dim=1)
    n = 2 * pairs
    other = [(i + pairs) % n for i in range(n)]
    case = Case(out, out[other], out, t, list(range(n)), [[j] for j in other], True)
    assert all(len(case.negatives(i)) == n - 2 for i in range(n))
    published, clamped = references.hcl(case, beta, tau_plus)
    return published, info_nce(two_views(out[:pairs], out[pairs:], t), HCL(beta, tau_plus)), clamped


@pytest.mark.parametrize("t", [0.5, 0.2, 0.1])
@pytest.mark.parametrize("tau_plus", PRIORS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("closeness", [0.1, 1.0], ids=["near", "far"])
@pytest.mark.parametrize("pairs", [2, 7])
def test_published_objective(pairs: int, closeness: float, beta: float, tau_plus: float, t: float) -> None:
    raw = views(pairs, closeness)
    published, ours, _ = published_and_ours(raw, beta, tau_plus, t)
    torch.testing.assert_close(ours, published, **EXACT)
    (expected,), (gradient,) = (torch.autograd.grad(loss, raw, retain_graph=True) for loss in (published, ours))
    torch.testing.assert_close(gradient, expected, **EXACT)


def test_lower_bound_is_met_and_not_met() -> None:
    """That the comparison above comes by the bound: for all anchors, for some and for none."""
    cases = [
        sum(published_and_ours(views(7, closeness), beta, tau_plus, t)[2])
        for closeness in (0.1, 1.0)
        for beta in BETAS
        for tau_plus in PRIORS
        for t in (0.5, 0.2, 0.1)
    ]
    assert 14 in cases
    assert 0 in cases
    assert any(0 < clamped < 14 for clamped in cases)


@pytest.mark.parametrize("case", [bank(4, 9), rectangular(5, 9, offset=2)], ids=["bank", "rectangular"])
def test_other_pools(case: Case) -> None:
    """N is each anchor's own number of negatives."""
    for tau_plus in PRIORS:
        expected, _ = references.hcl(case, 0.5, tau_plus)
        torch.testing.assert_close(info_nce(case.contrast(), HCL(0.5, tau_plus)), expected, **EXACT)


def test_gradient_flows_through_the_importance() -> None:
    raw = views(4, 1.0)
    out = normalize(raw, dim=1)
    contrast = two_views(out[:4], out[4:], 0.2)
    method = HCL(beta=1.0, tau_plus=0.0)
    (through,) = torch.autograd.grad(info_nce(contrast, method), raw, retain_graph=True)
    weights = importance_weights(contrast, method)
    frozen = references.info_nce(
        in_batch(4)._replace(anchors=out, pool=out, positives=out.roll(4, 0), temperature=0.2), weights
    )
    torch.testing.assert_close(frozen, info_nce(contrast, method), **EXACT)
    assert (torch.autograd.grad(frozen, raw)[0] - through).abs().max() > 1e-3


@pytest.mark.parametrize("tau_plus", [0.0, 0.1])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_low_temperature_in_float32(beta: float, tau_plus: float) -> None:
    """exp(1 / .01) is no float32; its logarithm is. A cosine's rounding eps becomes eps/t times 1 + beta."""
    t = 0.01
    raw = views(7, 0.1)
    published, _, _ = published_and_ours(raw, beta, tau_plus, t)
    single = raw.detach().float().requires_grad_()
    overflowing, ours, _ = published_and_ours(single, beta, tau_plus, t)
    assert published.isfinite()
    assert not overflowing.isfinite()
    assert ours.dtype == torch.float32
    bound = 8 * (1 + beta) * torch.finfo(torch.float32).eps / t
    torch.testing.assert_close(ours.double(), published, rtol=bound, atol=bound)
    (gradient,) = torch.autograd.grad(ours, single)
    assert gradient.isfinite().all()


def test_one_pair() -> None:
    raw = random_rows(2, 4, seed=0).requires_grad_()
    loss = info_nce(two_views(raw[:1], raw[1:], 0.1), HCL())
    loss.backward()
    assert loss == 0
    assert torch.equal(raw.grad, torch.zeros_like(raw))


@pytest.mark.parametrize("case", [in_batch(5), bank(4, 9, unit=False), rectangular(5, 9, offset=2)])
def test_without_beta_and_prior_it_is_the_plain_loss(case: Case) -> None:
    plain = info_nce(case.contrast(), Uniform())
    torch.testing.assert_close(info_nce(case.contrast(), HCL(0.0, 0.0)), plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -0.1}, r"beta: .*at least 0, got -0\.1"),
        ({"beta": math.inf}, r"beta: .*finite.* got inf"),
        ({"beta": "1"}, r"beta: .*got '1'"),
        ({"tau_plus": 1.0}, r"tau_plus: .*at least 0 and below 1, got 1\.0"),
        ({"tau_plus": -0.1}, r"tau_plus: .*at least 0 and below 1, got -0\.1"),
        ({"tau_plus": math.nan}, r"tau_plus: .*got nan"),
    ],
    ids=str,
)
def test_refuses(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        HCL(**settings)  # type: ignore[arg-type]
