"""HCL is the published objective, value and gradient, and stays finite where that overflows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests import references
from tests.contrasts import Case, bank, in_batch, random_rows, rectangular
from tests.test_fast import blocks, leaves, outcome
from undimix_plugins import (
    HCL,
    AdCo,
    Contrast,
    FalseNegativeAttraction,
    MoCHi,
    UnDiMix,
    Uniform,
    Weighting,
    compose,
    decoupled,
    importance_weights,
    in_batch_negatives,
    info_nce,
    two_views,
)
from undimix_plugins.toolkit import log_sums, mean_loss
from undimix_plugins.weightings.weighting import Softened

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
        ({"alpha": 0}, r"alpha: expected a finite number above 0, got 0"),
        ({"alpha": 1.5}, r"alpha: expected a factor of at most 1, got 1\.5"),
        ({"alpha": "1"}, r"alpha: .*got '1'"),
    ],
    ids=str,
)
def test_refuses(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        HCL(**settings)  # type: ignore[arg-type]


ALPHAS = (1.0, 0.5, 1e-3)
SHAPES = {
    "in-batch-10": in_batch(5, temperature=0.2),
    "bank-4x9": bank(4, 9, temperature=0.1),
    "rectangular-5x9": rectangular(5, 9, offset=2),
    "rectangular-6x7-raw": rectangular(6, 7, offset=1, unit=False),
}


def hn_nce(case: Case, beta: float, alpha: float) -> Tensor:
    """HN-NCE, a term at a time, whose weights have a gradient and add up to the number of negatives."""
    losses = []
    for i, (anchor, positive) in enumerate(zip(case.anchors, case.positives, strict=True)):
        own, t = (anchor @ positive / case.temperature).exp(), case.temperature
        logits = [anchor @ case.pool[j] / t for j in case.negatives(i)]
        normalizer = sum((beta * logit).exp() for logit in logits) / len(logits)
        total = alpha * own + sum((beta * logit).exp() / normalizer * logit.exp() for logit in logits)
        losses.append(-(own / total).log())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "by-block"])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_hn_nce(case: Case, beta: float, alpha: float, kept: bool) -> None:
    made, inputs = leaves(case)
    want = hn_nce(made, beta, alpha)
    gradients = torch.autograd.grad(want, inputs, materialize_grads=True, allow_unused=True)
    with blocks(kept=kept, rows=2):
        got = outcome(case, HCL(beta, 0.0, alpha), info_nce)
    torch.testing.assert_close(got.values[0], want, **EXACT)
    for one, other in zip(got.gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("weighting", [HCL(0.5, 0.0), HCL(1.0, 0.1), HCL(0.0, 0.0)], ids=repr)
def test_alpha_of_one_is_hcl_to_the_bit(weighting: HCL) -> None:
    for case in SHAPES.values():
        same = HCL(weighting.beta, weighting.tau_plus, 1)
        for loss in (info_nce, decoupled, log_sums):
            got, want = outcome(case, same, loss), outcome(case, weighting, loss)
            for one, other in zip([*got.values, *got.gradients], [*want.values, *want.gradients], strict=True):
                assert torch.equal(one, other)
    assert repr(same) == f"HCL(beta={weighting.beta}, tau_plus={weighting.tau_plus})"
    assert same == weighting


def test_alpha_towards_zero_is_the_decoupled_loss() -> None:
    for case in SHAPES.values():
        got, want = (info_nce(case.contrast(), HCL(0.5, 0, 1e-12)), decoupled(case.contrast(), HCL(0.5, 0)))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_alpha_with_debiasing() -> None:
    """The corrected sum is the same; alpha is a factor of the positive's term alone."""
    case = bank(4, 9)
    positives, negatives = log_sums(case.contrast(), HCL(0.5, 0.02))
    want = (torch.logaddexp(positives + math.log(0.3), negatives) - positives).mean()
    torch.testing.assert_close(info_nce(case.contrast(), HCL(0.5, 0.02, 0.3)), want, **EXACT)


def test_alpha_in_float32_and_of_one_pair() -> None:
    rows = random_rows(14, 6, seed=0).float().requires_grad_()
    for alpha in (0.5, 1e-30):
        loss = info_nce(two_views(*rows.chunk(2), 0.02), HCL(0.5, 0, alpha))
        assert loss.dtype == torch.float32
        assert torch.autograd.grad(loss, rows)[0].isfinite().all()
    pair = random_rows(2, 4, seed=0).requires_grad_()
    lonely = info_nce(two_views(pair[:1], pair[1:], 0.1), HCL(0.5, 0, 0.3))
    assert lonely == 0
    assert not torch.autograd.grad(lonely, pair)[0].any()


def test_alpha_gradcheck() -> None:
    rows = random_rows(8, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: info_nce(two_views(*rows.chunk(2), 0.3), HCL(0.5, 0, 0.2)), rows)


def test_a_loss_that_cannot_honour_alpha_says_so() -> None:
    """Also in a composition and during a warm-up; nothing is shown to observers, nothing drawn."""
    contrast, alpha = in_batch(4).contrast(), HCL(0.5, 0, 0.5)
    for weighting in (alpha, compose(alpha, MoCHi(2, 2, 2)), alpha.softened(0.5), Softened(alpha, 0.5)):
        for loss in (decoupled, log_sums, lambda *of: mean_loss(*of, lambda margin: (margin, torch.ones_like(margin)))):
            with pytest.raises(
                ValueError, match=r"^weighting: expected a positive_factor of 1 \(alpha=1 for HCL\), .*got"
            ):
                loss(contrast, weighting)  # type: ignore[operator]
    positives, negatives = log_sums(contrast, alpha, applies_factor=True)
    want = (torch.logaddexp(positives + math.log(0.5), negatives) - positives).mean()
    torch.testing.assert_close(info_nce(contrast, alpha), want, **EXACT)
    with pytest.raises(TypeError, match=r"^weighting: expected an instance of Weighting"):
        decoupled(contrast, HCL)  # type: ignore[arg-type]


def test_alpha_composed_and_softened() -> None:
    contrast, alpha = in_batch(4).contrast(), HCL(0.5, 0, 0.5)
    for weighting in (compose(alpha, UnDiMix()), compose(UnDiMix(), alpha)):
        assert weighting.positive_factor == 0.5
        positives, negatives = log_sums(contrast, weighting, applies_factor=True)
        want = (torch.logaddexp(positives + math.log(0.5), negatives) - positives).mean()
        torch.testing.assert_close(info_nce(contrast, weighting), want, **EXACT)
    assert alpha.softened(0.5) == HCL(0.25, 0, 0.5**0.5)
    assert alpha.softened(0) == HCL(0.0, 0)
    assert alpha.softened(1) == alpha
    assert Softened(alpha, 0.5).positive_factor == pytest.approx(0.5**0.5)
    assert UnDiMix().positive_factor == Uniform().positive_factor == 1


def test_alpha_with_several_positives() -> None:
    """It multiplies the sum of their terms."""
    case, attracting = in_batch(5), FalseNegativeAttraction(2, 0.1)
    got = info_nce(case.contrast(), compose(HCL(0.0, 0, 0.5), attracting))
    chosen, losses = attracting.choose(case.contrast()), []
    assert chosen.positive_columns is not None
    for i, anchor in enumerate(case.anchors):
        false = [j for j in chosen.positive_columns[i].tolist() if j >= 0]
        logits = case.pool @ anchor / case.temperature
        own = torch.stack([anchor @ case.positives[i] / case.temperature, *logits[false]])
        others = [j for j in case.negatives(i) if j not in false]
        losses.append((0.5 * own.exp().sum() + logits[others].exp().sum()).log() - own.mean())
    torch.testing.assert_close(got, torch.stack(losses).mean(), **EXACT)


class Factored(Uniform):
    positive_factor = 0.25  # type: ignore[assignment]


def test_a_factor_of_ones_own() -> None:
    case = bank(3, 7)
    terms = [(case.positives[i] @ a / 0.5, case.pool @ a / 0.5) for i, a in enumerate(case.anchors)]
    want = torch.stack([(0.25 * p.exp() + n.exp().sum()).log() - p for p, n in terms]).mean()
    torch.testing.assert_close(info_nce(case.contrast(), Factored()), want, **EXACT)


def test_adco_honours_alpha() -> None:
    torch.manual_seed(0)
    rows, weighting = random_rows(8, 6, 0).float().chunk(2), HCL(0.5, 0, 0.5)
    adco = AdCo(6, 10, temperature=0.2, weighting=weighting)
    contrast = in_batch_negatives(*rows, 0.2)
    pool = torch.cat([contrast.pool, torch.nn.functional.normalize(adco.pool, dim=1)])
    of = Contrast.of(contrast.anchors, contrast.positives, pool, contrast.excluded, 0.2, positives_in_pool=True)
    torch.testing.assert_close(adco(*rows), info_nce(of, weighting), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighting", [HCL(), HCL(alpha=0.5)], ids=repr)
def test_citation(weighting: Weighting) -> None:
    assert ("radenovic2023filtering" in weighting.citation) == ("alpha" in repr(weighting))
    assert "robinson2021contrastive" in weighting.citation
