"""Contrasts beside the plain ones: masks, several positives or none, weighted anchors, a learned temperature.

Each is held to the plain one that it stands for, or to a loop over anchors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from tests import references
from tests.contrasts import Case, bank, in_batch, random_rows, rectangular
from tests.test_fast import (
    HarderHalf,
    all_excluded,
    blocks,
    dense_log_weights,
    fast_log_weights,
    outcome,
    ranking,
    ring,
)
from undimix_plugins import (
    HCL,
    Contrast,
    UnDiMix,
    Uniform,
    Weighting,
    decoupled,
    effective_number,
    importance_weights,
    info_nce,
)
from undimix_plugins import blocks as block_sizes
from undimix_plugins.toolkit import LastLayerInputs, log_sums

WEIGHTINGS: list[Weighting] = [
    Uniform(),
    UnDiMix(),
    UnDiMix(detached=True),
    UnDiMix(similarity=0, hardness=2.0),
    UnDiMix(mixing="linear", distance="euclidean"),
    UnDiMix(gradient="weight", distance="euclidean"),
    HCL(beta=0.5, tau_plus=0.02),
    HarderHalf(),
]
each_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)


@pytest.fixture(params=[True, False], ids=["kept", "by-block"], autouse=True)
def small(request: pytest.FixtureRequest) -> Iterator[None]:
    with blocks(kept=request.param):
        yield


class Judged(Case):
    """The same exclusions as a mask, but for every third column, which is listed (some are named twice so)."""

    def contrast(self) -> Contrast:
        one_batch = self.anchors is self.pool
        marks = ~self.is_negative()
        listed = [[j for j in row if j % 3 == 0] for row in self.excluded]
        return Contrast.of(
            self.anchors,
            self.positives,
            self.pool,
            self._replace(excluded=listed).padded(),
            self.temperature,
            own_columns=None if one_batch else torch.tensor(self.own_columns),
            positives_in_pool=self.positives_in_pool,
            last_layer=self.last_layer,
            excluded_mask=lambda rows: marks[rows],
        )


CASES = {
    "ring": ring(9),
    "in-batch": in_batch(6),
    "rectangular": rectangular(7, 11, offset=2),
    "ranking": ranking(5),
    "bank": bank(4, 9)._replace(excluded=[[0, 3], [], [8], [1, 2, 3, 4, 5]]),
    "all-excluded": all_excluded(rectangular(4, 9, offset=1)),
    "not-unit": rectangular(5, 8, offset=0, unit=False),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@each_weighting
@each_case
@pytest.mark.parametrize("loss", [info_nce, decoupled, log_sums])
def test_masks_are_excluded_columns(loss: Callable[..., Any], case: Case, weighting: Weighting) -> None:
    got, want = outcome(Judged(*case), weighting, loss), outcome(case, weighting, loss)
    for one, other in zip([*got.values, *got.gradients], [*want.values, *want.gradients], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@each_weighting
@each_case
def test_reference_takes_masks(case: Case, weighting: Weighting) -> None:
    negative = case.is_negative()
    got = dense_log_weights(Judged(*case).contrast(), weighting)[negative]
    torch.testing.assert_close(got, dense_log_weights(case.contrast(), weighting)[negative], rtol=1e-11, atol=1e-11)
    assert torch.equal(Judged(*case).contrast().count, case.contrast().count)


def test_masks_against_the_loop() -> None:
    case, method = rectangular(5, 9, offset=1), UnDiMix(distance="euclidean")
    weights = references.log_weights(case, method).exp().nan_to_num()
    want = references.info_nce(case, weights)
    torch.testing.assert_close(info_nce(Judged(*case).contrast(), method), want, rtol=1e-11, atol=1e-11)


def test_masks_in_float32_exclude_most() -> None:
    """A sum over few negatives out of many is not what is left of the sum over all."""
    case = rectangular(20, 400, offset=0, width=16)
    few = [sorted({*row, *range(30, 400)}) for row in case.excluded]
    case = case._replace(excluded=few)
    exact = importance_weights(Judged(*case).contrast(), UnDiMix())
    rows = [part.float() for part in (case.anchors, case.positives, case.pool)]
    single = Judged(*rows, *case[3:7])
    got = info_nce(single.contrast(), UnDiMix())
    torch.testing.assert_close(got.double(), info_nce(case.contrast(), UnDiMix()), rtol=1e-5, atol=1e-5)
    assert (effective_number(exact) <= 29).all()


@pytest.mark.parametrize(
    ("marks", "came"),
    [
        (torch.zeros(6, 6), r"torch.float32 \[6, 6\]"),
        (torch.zeros(6, 5, dtype=torch.bool), r"torch.bool \[6, 5\]"),
        (None, "NoneType"),
    ],
)
def test_marks_are_checked(marks: Any, came: str) -> None:
    z = random_rows(6, 4, seed=0)
    contrast = Contrast.of(z, z, z, None, 0.5, excluded_mask=lambda rows: marks)
    with (
        blocks(kept=True, rows=6),
        pytest.raises(ValueError, match=rf"excluded_mask: expected bool \[6, 6\] .*, got {came}"),
    ):
        info_nce(contrast, UnDiMix())


# --- several positives or none


def several(case: Case, positives: list[list[int]], **further: Any) -> Contrast:
    width = max(map(len, positives))
    columns = torch.tensor([row + [-1] * (width - len(row)) for row in positives])
    return Contrast.of(
        case.anchors, columns, case.pool, case.padded(), case.temperature, torch.tensor(case.own_columns), **further
    )


def loop(
    case: Case, positives: list[list[int]], weights: Any, anchor_weights: list[float], *, denominator: bool
) -> Tensor:
    """Cross-entropy with soft labels, one anchor at a time: each positive in the softmax, the label shared evenly."""
    losses = []
    for i, mine in enumerate(positives):
        similar = (case.anchors[i] @ case.pool.T / case.temperature).exp()
        negatives = [j for j in case.negatives(i) if j not in mine]
        negative = sum(((weights[i, j] * similar[j]) for j in negatives), torch.zeros_like(similar[0]))
        if not mine:
            losses.append(torch.zeros_like(negative))
        elif denominator:
            total = negative + sum(similar[j] for j in mine)
            losses.append(-sum((similar[j] / total).log() for j in mine) / len(mine))
        else:
            losses.append(negative.log() - sum(similar[j].log() for j in mine) / len(mine))
    return sum(a * x for a, x in zip(anchor_weights, losses, strict=True)) / len(losses)  # type: ignore[return-value]


POSITIVES = [[3, 5], [], [0], [9, 1, 2], [7], [8, 4]]
ANCHOR_WEIGHTS = [1.0, 0.5, 2.0, 0.0, 0.25, 3.0]


@each_weighting
@pytest.mark.parametrize("denominator", [True, False], ids=["info_nce", "decoupled"])
def test_several_positives_or_none(denominator: bool, weighting: Weighting) -> None:
    case = rectangular(6, 10, offset=2, temperature=0.3)
    case = case._replace(own_columns=[-1] * 6, excluded=[[6], [], [], [0], [], [1]])
    anchors, pool = (rows.clone().requires_grad_() for rows in (case.anchors, case.pool))
    case = case._replace(anchors=anchors, pool=pool)
    without = case._replace(excluded=[a + b for a, b in zip(case.excluded, POSITIVES, strict=True)])
    inputs = {"last_layer": case.last_layer}
    weights = torch.tensor(ANCHOR_WEIGHTS, dtype=torch.float64)
    contrast = several(case, POSITIVES, anchor_weights=weights, **inputs)
    assert contrast.positives_in_pool
    loss = (info_nce if denominator else decoupled)(contrast, weighting)
    if isinstance(weighting, HCL):
        assert loss.isfinite()
        return  # what debiasing makes of several positives has its own test
    of_negatives: Any = importance_weights(without.contrast(), weighting)
    if isinstance(weighting, UnDiMix):
        of_negatives = references.weights_of(without, weighting)
    want = loop(case, POSITIVES, of_negatives, ANCHOR_WEIGHTS, denominator=denominator)
    torch.testing.assert_close(loss, want, rtol=1e-11, atol=1e-11)
    for one, other in zip(*(torch.autograd.grad(x, [anchors, pool]) for x in (loss, want)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def test_debiasing_takes_the_mean_of_the_positives() -> None:
    case = rectangular(3, 8, offset=0, temperature=0.5)._replace(own_columns=[-1] * 3, excluded=[[]] * 3)
    positives, method = [[1, 2], [3, 4, 5], [0]], HCL(beta=0.0, tau_plus=0.05)
    got = log_sums(several(case, positives), method).negatives
    for i, mine in enumerate(positives):
        similar = (case.anchors[i] @ case.pool.T / 0.5).exp()
        negative = sum(float(similar[j]) for j in range(8) if j not in mine)
        estimate = (negative - 0.05 * (8 - len(mine)) * float(similar[mine].mean())) / 0.95
        assert math.log(estimate) == pytest.approx(float(got[i]), abs=1e-11)


@each_weighting
def test_one_positive_by_column_is_one_by_row(weighting: Weighting) -> None:
    case = ranking(5)
    by_row = Contrast.of(
        case.anchors,
        case.positives,
        case.pool,
        case.padded(),
        0.5,
        positives_in_pool=True,
        last_layer=case.last_layer,
    )
    by_column = Contrast.of(
        case.anchors,
        torch.arange(5)[:, None],
        case.pool,
        case.padded(),
        0.5,
        last_layer=case.last_layer,
    )
    for loss in (info_nce, decoupled):
        torch.testing.assert_close(loss(by_column, weighting), loss(by_row, weighting), rtol=1e-12, atol=1e-12)


@each_weighting
@each_case
@pytest.mark.parametrize("loss", [info_nce, decoupled])
def test_anchor_weights(loss: Callable[..., Tensor], case: Case, weighting: Weighting) -> None:
    """A weight of 2 counts twice, and one of 0 leaves an anchor's loss out, which each other anchor's is free of."""
    n = len(case.anchors)
    weights = torch.linspace(0, 2, n, dtype=torch.float64)
    rows = [part.clone().requires_grad_() for part in (case.anchors, case.positives)]

    def contrast(**further: Any) -> Contrast:
        pool = rows[0] if case.anchors is case.pool else case.pool
        made = case._replace(anchors=rows[0], positives=rows[1], pool=pool).contrast()
        own = None if case.anchors is case.pool else torch.tensor(case.own_columns)
        return Contrast.of(
            made.anchors,
            made.positives,
            made.pool,
            case.padded(),
            case.temperature,
            own,
            case.positives_in_pool,
            last_layer=case.last_layer,
            **further,
        )

    positives, negatives = log_sums(contrast(), weighting)
    margins = negatives - positives
    if loss is info_nce:
        each = torch.logaddexp(margins, torch.zeros_like(margins))
    else:
        each = margins.masked_fill(margins.isneginf(), 0)
    want = (weights * each).mean()
    got = loss(contrast(anchor_weights=weights), weighting)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    for one, other in zip(*(torch.autograd.grad(x, rows) for x in (got, want)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(5), r"anchor_weights: expected a tensor of shape \[6\], got \[5\]"),
        ([1.0] * 6, r"anchor_weights: expected a tensor of shape \[6\], got list"),
        (-torch.ones(6), r"anchor_weights: expected finite numbers of at least 0 and at most 1e\+30, got -1 to -1"),
        (torch.full((6,), math.nan), r"anchor_weights: expected finite numbers"),
    ],
)
def test_anchor_weights_are_checked(weights: Any, message: str) -> None:
    z = random_rows(6, 4, seed=0)
    with pytest.raises(ValueError, match=message):
        Contrast.of(z, z, z, None, 0.5, anchor_weights=weights)


@each_weighting
def test_many_excluded_and_positive_columns(monkeypatch: pytest.MonkeyPatch, weighting: Weighting) -> None:
    """So many that marks on the whole pool stand for them: the same numbers."""
    case = rectangular(6, 10, offset=2, temperature=0.3)._replace(
        own_columns=[-1] * 6, excluded=[[6], [], [], [0], [], [1]]
    )
    inputs = {"last_layer": case.last_layer}

    def outcomes() -> list[Tensor]:
        anchors, pool = (rows.clone().requires_grad_() for rows in (case.anchors, case.pool))
        contrast = several(case._replace(anchors=anchors, pool=pool), POSITIVES, **inputs)
        values = [info_nce(contrast, weighting), decoupled(contrast, weighting)]
        return [*values, *torch.autograd.grad(values[0] + 2 * values[1], [anchors, pool])]

    listed = outcomes()
    monkeypatch.setattr(block_sizes, "WIDE", 1)
    for one, other in zip(outcomes(), listed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_positive_of_many_columns_is_summed_by_logits() -> None:
    """Where its rows would be more than the logits: a graph of many nodes."""
    case = random_rows(2, 8, seed=0), random_rows(30, 8, seed=1)
    positives = torch.arange(30).view(2, 15)
    loss = info_nce(Contrast.of(case[0], positives, case[1], None, 0.3), Uniform())
    similar = case[0] @ case[1].T / 0.3
    want = (similar.logsumexp(dim=1) - similar.gather(1, positives).mean(dim=1)).mean()
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
    nothing = info_nce(Contrast.of(case[0], positives[:, :0], case[1], None, 0.3), UnDiMix())
    assert nothing == 0


def test_positive_columns_are_checked() -> None:
    z = random_rows(6, 4, seed=0)
    with pytest.raises(ValueError, match=r"positives: expected columns from -1 \(none\) to 5, got 0 to 6"):
        Contrast.of(z, torch.tensor([[6], [0], [0], [0], [0], [0]]), z, None, 0.5)
    with pytest.raises(ValueError, match=r"positives: expected shape \[6, k\], got \[6\]"):
        Contrast.of(z, torch.arange(6), z, None, 0.5)


# --- a temperature that is learned


def numeric(function: Callable[[float], float], at: float, step: float = 1e-5) -> float:
    return (function(at + step) - function(at - step)) / (2 * step)


class ByPlace(Weighting):
    """Weights that no temperature changes, so that a numeric gradient is the right one."""

    def log_weights(self, contrast: Contrast, rows: slice) -> Tensor:
        n, m = len(contrast.anchors), len(contrast.pool)
        return torch.arange(n * m, dtype=contrast.pool.dtype).view(n, m)[rows].sin()


@each_case
@pytest.mark.parametrize("weighting", [Uniform(), ByPlace(), HCL(beta=0.5, tau_plus=0.02), HCL(tau_plus=0.9)], ids=repr)
@pytest.mark.parametrize("loss", [info_nce, decoupled])
def test_gradient_of_the_temperature(loss: Callable[..., Tensor], weighting: Weighting, case: Case) -> None:
    def value(temperature: Any) -> Tensor:
        return loss(case._replace(temperature=temperature).contrast(), weighting)

    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    got = value(temperature)
    torch.testing.assert_close(got, value(0.4), rtol=1e-13, atol=1e-13)
    (gradient,) = torch.autograd.grad(got, temperature)
    assert gradient.item() == pytest.approx(numeric(lambda t: value(t).item(), 0.4), rel=1e-6, abs=1e-8)


@each_case
def test_weights_of_undimix_do_not_follow_the_temperature(case: Case) -> None:
    """Its gradient is that of the loss with the weights held, and it leaves the embeddings theirs."""
    weights = importance_weights(case._replace(temperature=0.4).contrast(), UnDiMix())

    class Held(Weighting):
        def log_weights(self, contrast: Contrast, rows: slice) -> Tensor:
            return weights[rows].log()

    def gradients(weighting: Weighting, temperature: Any) -> list[Tensor]:
        anchors = case.anchors.clone().requires_grad_()
        pool = anchors if case.anchors is case.pool else case.pool
        made = case._replace(anchors=anchors, pool=pool, temperature=temperature)
        wanted = [anchors, temperature] if isinstance(temperature, Tensor) else [anchors]
        return list(torch.autograd.grad(info_nce(made.contrast(), weighting), wanted))

    learned = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    for weighting in (UnDiMix(), UnDiMix(detached=True)):
        of_anchors, of_temperature = gradients(weighting, learned)
        torch.testing.assert_close(of_anchors, gradients(weighting, 0.4)[0], rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(of_temperature, gradients(Held(), learned)[1], rtol=1e-10, atol=1e-11)


@given(st.floats(0.01, 10), st.integers(2, 6))
def test_any_temperature_by_tensor_is_the_one_by_number(temperature: float, n: int) -> None:
    case = in_batch(n, temperature=temperature)
    tensor = torch.tensor([temperature], dtype=torch.float64, requires_grad=True)
    for weighting in (UnDiMix(), Uniform()):
        got = info_nce(case._replace(temperature=tensor).contrast(), weighting)  # type: ignore[arg-type]
        torch.testing.assert_close(got, info_nce(case.contrast(), weighting), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        (torch.tensor(0.0), "temperature: expected a finite number above 0, got 0.0"),
        (torch.tensor(math.nan), "temperature: expected a finite number above 0, got nan"),
        (torch.ones(2), r"temperature: expected one floating-point number, got torch.float32 \[2\]"),
        (torch.tensor(1), r"temperature: expected one floating-point number, got torch.int64 \[\]"),
    ],
)
def test_temperature_tensors_are_checked(temperature: Tensor, message: str) -> None:
    z = random_rows(6, 4, seed=0)
    with pytest.raises(ValueError, match=message):
        Contrast.of(z, z, z, None, temperature)


# --- gradients at the weight of a last layer whose outputs are normalised


def through_the_layer(case: Case, layer: nn.Linear) -> Tensor:
    """Inner products of gradients at the layer's weight, by autograd through the normalisation, a row at a time."""
    assert case.anchor_inputs is not None
    assert case.pool_inputs is not None

    def gradient(inputs: Tensor, candidates: Tensor) -> Tensor:
        logits = candidates @ normalize(layer(inputs), dim=0) / case.temperature
        loss = cross_entropy(logits[None], logits.argmax()[None])
        return torch.autograd.grad(loss, layer.weight)[0].flatten()

    n, m = len(case.anchors), len(case.pool)
    of_anchors = [
        gradient(case.anchor_inputs[i], case.pool[[j for j in range(m) if j != case.own_columns[i]]]) for i in range(n)
    ]
    of_pool = [
        gradient(case.pool_inputs[j], case.anchors[[i for i in range(n) if case.own_columns[i] != j]]) for j in range(m)
    ]
    return torch.stack(of_anchors) @ torch.stack(of_pool).T


@pytest.mark.parametrize("mixing", ["geometric", "linear"])
@pytest.mark.parametrize("name", ["ring", "in-batch", "rectangular", "ranking"])
def test_gradients_through_a_normalisation(name: str, mixing: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 5).double()
    case = CASES[name]
    inputs = random_rows(len(case.pool), 3, seed=7, unit=False)
    raw = layer(inputs).detach()
    pool = normalize(raw, dim=1)
    own = case.anchors is case.pool
    places = list(range(len(case.pool))) if own else [max(i, 0) for i in case.own_columns]
    if name == "ranking":  # queries of their own
        of_anchors = random_rows(len(case.anchors), 3, seed=8, unit=False)
        anchors = layer(of_anchors).detach()
    else:
        of_anchors, anchors = inputs[places], raw[places]
    lengths = anchors.norm(dim=1, keepdim=True), raw.norm(dim=1, keepdim=True)
    case = case._replace(
        anchors=pool if own else normalize(anchors, dim=1), pool=pool, anchor_inputs=of_anchors, pool_inputs=inputs
    )
    scores = through_the_layer(case, layer)
    method = UnDiMix(similarity=0, diversity=0, influence=1.0, gradient="weight", mixing=mixing)
    want = torch.full_like(scores, torch.nan)
    for i in range(len(scores)):
        negatives = case.negatives(i)
        chosen = scores[i, negatives]
        standardised = (chosen - chosen.mean()) / chosen.std(correction=0)
        want[i, negatives] = standardised - standardised.logsumexp(dim=0) + math.log(len(negatives))

    contrast = Contrast.of(
        case.anchors, case.positives, case.pool, case.padded(), case.temperature,
        None if own else torch.tensor(case.own_columns), True,
        last_layer=LastLayerInputs(of_anchors / lengths[0], inputs / lengths[1], normalized=True),
    )  # fmt: skip
    negative = case.is_negative()
    for got in (dense_log_weights(contrast, method), fast_log_weights(contrast, method)):
        torch.testing.assert_close(got[negative], want[negative], rtol=1e-9, atol=1e-9)
