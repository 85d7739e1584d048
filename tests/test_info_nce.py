"""The weighted loss against a loop, its gradients, its precision, and the parts it is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests import references
from tests.contrasts import Case, bank, in_batch, random_rows, rectangular
from undimix_plugins import (
    HCL,
    Contrast,
    UnDiMix,
    Uniform,
    Weighting,
    effective_number,
    importance_weights,
    info_nce,
    two_views,
)
from undimix_plugins.masked import mean_one
from undimix_plugins.toolkit import as_full_precision, log_sums

EXACT = {"rtol": 1e-10, "atol": 1e-10}

CASES = {
    "in-batch-2": in_batch(1),
    "in-batch-4": in_batch(2, temperature=0.1),
    "in-batch-14-raw": in_batch(7, 3, unit=False),
    "bank-3x8": bank(3, 8, temperature=0.1),
    "bank-1x1": bank(1, 1),
    "rectangular-5x9": rectangular(5, 9, offset=3),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Nearer(Weighting):
    """A user's own weighting, in a few lines."""

    def log_weights(self, contrast: Contrast, rows: slice) -> Tensor:
        return (contrast.logits(rows) > 0).double() * math.log(2)


@dataclass(frozen=True)
class Constant(Weighting):
    """The same weight for all: nothing that brings it to mean 1."""

    weight: float

    def log_weights(self, contrast: Contrast, rows: slice) -> Tensor:
        return torch.full_like(contrast.logits(rows), self.weight).log()


@each_case
def test_value(case: Case) -> None:
    contrast = case.contrast()
    torch.testing.assert_close(info_nce(contrast, Uniform()), references.info_nce(case), **EXACT)
    nearer = 1 + (case.anchors @ case.pool.T > 0).double()
    torch.testing.assert_close(info_nce(contrast, Nearer()), references.info_nce(case, nearer), **EXACT)
    weights = importance_weights(contrast, UnDiMix())
    torch.testing.assert_close(info_nce(contrast, UnDiMix()), references.info_nce(case, weights), **EXACT)


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_weights_are_used_as_they_come(weight: float) -> None:
    case = in_batch(4)
    expected = references.info_nce(case, torch.full((8, 8), weight).double())
    torch.testing.assert_close(info_nce(case.contrast(), Constant(weight)), expected, **EXACT)
    assert (expected - info_nce(case.contrast(), Uniform())).abs() > 0.1


def test_weight_zero() -> None:
    """A negative may count nothing, even all of them."""
    leaf = random_rows(6, 4, seed=0).requires_grad_()
    loss = info_nce(two_views(leaf[:3], leaf[3:], 0.5), Constant(0.0))
    loss.backward()
    assert loss == 0
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_columns_that_are_no_negatives_are_ignored() -> None:
    """Even where they weigh infinitely, or not at all by any number."""

    class Careless(Weighting):
        def __init__(self, elsewhere: float) -> None:
            self.elsewhere = elsewhere

        def log_weights(self, contrast: Contrast, rows: slice) -> Tensor:
            negative = contrast.is_negative(rows)
            return torch.where(negative, contrast.logits(rows), self.elsewhere)

    losses, gradients = [], []
    for elsewhere in (0.0, math.inf, math.nan):
        leaf = random_rows(6, 4, seed=0).requires_grad_()
        losses.append(info_nce(two_views(leaf[:3], leaf[3:], 0.5), Careless(elsewhere)))
        gradients.append(torch.autograd.grad(losses[-1], leaf)[0])
    assert losses[0] == losses[1] == losses[2]
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def leaves(case: Case) -> tuple[Case, list[Tensor]]:
    """The same case with gradients wanted: for one batch at the views, else at anchors, positives and pool."""
    if case.anchors is case.pool:
        pool = case.pool.clone().requires_grad_()
        positives = pool[[row[0] for row in case.excluded]]
        return case._replace(anchors=pool, positives=positives, pool=pool), [pool]
    parts = [part.clone().requires_grad_() for part in (case.anchors, case.positives, case.pool)]
    return case._replace(anchors=parts[0], positives=parts[1], pool=parts[2]), parts


@pytest.mark.parametrize("weighting", [Uniform(), HCL(1.0, 0.0), HCL(0.5, 0.1)], ids=str)
@each_case
def test_gradcheck(case: Case, weighting: Weighting) -> None:
    _, inputs = leaves(case)

    def loss(*parts: Tensor) -> Tensor:
        if len(parts) == 3:
            return info_nce(case._replace(anchors=parts[0], positives=parts[1], pool=parts[2]).contrast(), weighting)
        pool = parts[0].clone()
        positives = pool[[row[0] for row in case.excluded]]
        return info_nce(case._replace(anchors=pool, positives=positives, pool=pool).contrast(), weighting)

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize(
    "method", [UnDiMix(detached=True), UnDiMix(gradient="weight", distance="euclidean", mixing="linear")], ids=str
)
@each_case
def test_gradient_takes_weights_as_constants(case: Case, method: UnDiMix) -> None:
    weights = importance_weights(case.contrast(), method)
    case, inputs = leaves(case)
    expected = torch.autograd.grad(references.info_nce(case, weights), inputs, retain_graph=True)
    for got, want in zip(torch.autograd.grad(info_nce(case.contrast(), method), inputs), expected, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize(
    "method",
    [UnDiMix(), UnDiMix(-0.7, 0.3, 0.0, hardness=2.0), UnDiMix(gradient="weight", distance="euclidean")],
    ids=str,
)
@each_case
def test_gradient_through_the_similarity(case: Case, method: UnDiMix) -> None:
    case, inputs = leaves(case)
    loss = references.info_nce(case, references.weights_of(case, method))
    expected = torch.autograd.grad(loss, inputs, retain_graph=True)
    for got, want in zip(torch.autograd.grad(info_nce(case.contrast(), method), inputs), expected, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize(
    "weighting", [Uniform(), HCL(), UnDiMix(), UnDiMix(mixing="linear", distance="euclidean")], ids=str
)
class TestPrecision:
    def test_autocast_changes_nothing(self, weighting: Weighting) -> None:
        views = random_rows(16, 32, seed=0, dtype=torch.float32)
        contrast = two_views(views[:8], views[8:], 0.05)
        loss, weights = info_nce(contrast, weighting), importance_weights(contrast, weighting)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(info_nce(contrast, weighting), loss)
            assert torch.equal(importance_weights(contrast, weighting), weights)
            assert loss.dtype == torch.float32

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_is_computed_in_float32(self, weighting: Weighting, dtype: torch.dtype) -> None:
        views = random_rows(16, 32, seed=0).to(dtype).requires_grad_()
        loss = info_nce(two_views(views[:8], views[8:], 0.05), weighting)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, info_nce(two_views(views[:8].float(), views[8:].float(), 0.05), weighting))
        loss.backward()
        assert views.grad.dtype == dtype
        assert views.grad.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("normalised", [False, True])
    def test_zeros_and_tiny_rows(self, weighting: Weighting, dtype: torch.dtype, normalised: bool) -> None:
        rows = random_rows(16, 32, seed=0).to(dtype)
        rows[1] = rows[9] = rows[12] = 0
        rows[2] = rows[10] = 2**-20  # whose square is 0 in float16
        views = normalize(as_full_precision(rows), dim=1) if normalised else rows
        if normalised:
            assert views[2].norm().item() == pytest.approx(1, rel=1e-6)
        views.requires_grad_()
        loss = info_nce(two_views(views[:8], views[8:], 0.05), weighting)
        loss.backward()
        assert loss.isfinite()
        assert views.grad.isfinite().all()

    def test_confident_and_wrong(self, weighting: Weighting) -> None:
        """Logits of -100 to 100 in float32: positives at cosine -1, a negative at 1, and the other way round."""
        first = torch.eye(3)
        for second in (first, -first, first.roll(1, 0)):
            leaf = torch.cat([first, second]).requires_grad_()
            loss = info_nce(two_views(leaf[:3], leaf[3:], 0.01), weighting)
            loss.backward()
            assert loss.isfinite()
            assert leaf.grad.isfinite().all()


@each_case
def test_log_sums(case: Case) -> None:
    contrast = case.contrast()
    weights = importance_weights(contrast, UnDiMix())
    positives, negatives = log_sums(contrast, UnDiMix())
    for i in range(len(case.anchors)):
        torch.testing.assert_close(positives[i], case.anchors[i] @ case.positives[i] / case.temperature, **EXACT)
        terms = [weights[i, j] * (case.anchors[i] @ case.pool[j] / case.temperature).exp() for j in case.negatives(i)]
        expected = torch.stack(terms).sum().log() if terms else torch.tensor(-math.inf).double()
        torch.testing.assert_close(negatives[i], expected, **EXACT)


def test_combine_changes_the_negatives_part() -> None:
    """A debiasing of one's own sees every anchor's number of negatives, and no anchor without."""

    class Averaged(Weighting):
        def log_weights(self, contrast: Contrast, rows: slice) -> Tensor:
            return torch.zeros_like(contrast.logits(rows))

        def combine(self, contrast: Contrast, positives: Tensor, negatives: Tensor, count: Tensor) -> Tensor:
            assert negatives.isfinite().all()
            assert (count >= 1).all()
            return negatives - count.log()

    case = bank(3, 4)._replace(excluded=[[], [3, 0, 2, 1], [2]])
    _, plain = log_sums(case.contrast(), Uniform())
    _, averaged = log_sums(case.contrast(), Averaged())
    torch.testing.assert_close(averaged, plain - torch.tensor([4.0, 1.0, 3.0]).double().log(), **EXACT)
    assert averaged[1] == -math.inf


@pytest.mark.parametrize(
    ("wrong", "came"),
    [
        (torch.zeros(6), r"\[6\]"),
        (torch.zeros(6, 5), r"\[6, 5\]"),
        (torch.zeros(6, 1), r"\[6, 1\]"),
        (torch.zeros(1, 6), r"\[1, 6\]"),
        (0.0, "float"),
        (None, "NoneType"),
    ],
    ids=str,
)
def test_log_weights_of_the_wrong_shape(wrong: object, came: str) -> None:
    class Wrong(Weighting):
        def log_weights(self, contrast: Contrast, rows: slice) -> Tensor:
            return wrong  # type: ignore[return-value]

    views = random_rows(6, 4, seed=0)
    with pytest.raises(ValueError, match=rf"log-weights of Wrong: expected shape \[6, 6\] .*got {came}"):
        info_nce(two_views(views[:3], views[3:], 0.5), Wrong())


def test_a_weighting_without_log_weights() -> None:
    views = random_rows(6, 4, seed=0)
    with pytest.raises(NotImplementedError, match="Weighting needs a method log_weights"):
        info_nce(two_views(views[:3], views[3:], 0.5), Weighting())


@each_case
def test_mean_one(case: Case) -> None:
    negative = case.is_negative()
    scores = 3 * random_rows(*negative.shape, seed=1, unit=False)
    weights = mean_one(scores, negative).exp()
    for i in range(len(scores)):
        chosen = scores[i, negative[i]].exp()
        torch.testing.assert_close(weights[i, negative[i]], chosen / chosen.mean(), **EXACT)


def test_mean_one_of_extremes() -> None:
    scores = torch.tensor([[1000.0, 1000.0, -1000.0, 5000.0], [-2000.0, -2000.0, 0.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    negative = torch.tensor([[True, True, True, False], [True, True, False, False], [False] * 4])
    weights = mean_one(scores, negative).exp()
    torch.testing.assert_close(weights[0, :3], torch.tensor([1.5, 1.5, 0.0]), rtol=1e-3, atol=0)  # eps * 1000
    torch.testing.assert_close(weights[1, :2], torch.ones(2), rtol=1e-3, atol=0)
    assert mean_one(scores, negative).isfinite().all()


def test_importance_weights_of_any_weighting() -> None:
    case = rectangular(5, 9, offset=3)
    leaf = case.anchors.clone().requires_grad_()
    contrast = case._replace(anchors=leaf).contrast()
    expected = case.is_negative() * (1 + (case.anchors @ case.pool.T > 0).double())
    torch.testing.assert_close(importance_weights(contrast, Nearer()), expected, **EXACT)
    assert torch.equal(importance_weights(contrast, Uniform()), case.is_negative().double())
    assert not importance_weights(contrast, HCL()).requires_grad


def test_effective_number() -> None:
    weights = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.5, 0.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert effective_number(weights).tolist() == [3.0, 1.0, pytest.approx(1.6), 0.0]


def test_two_views() -> None:
    case = in_batch(4)
    first, second = case.anchors[:4], case.anchors[4:]
    contrast = two_views(first, second, 0.5)
    assert torch.equal(contrast.anchors, case.anchors)
    assert torch.equal(contrast.positives, case.positives)
    assert torch.equal(contrast.pool, case.pool)
    assert torch.equal(contrast.is_negative(slice(0, 8)), case.is_negative())
    assert contrast.count.tolist() == [6.0] * 8
    method = UnDiMix()
    torch.testing.assert_close(
        importance_weights(contrast, method), importance_weights(case.contrast(), method), **EXACT
    )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gathered_views(size: int) -> None:
    """A process's rows, with the views of all as the pool, add the same terms to the loss as in one joined batch."""
    first, second = random_rows(6, 4, seed=0), random_rows(6, 4, seed=1)
    joined = two_views(first, second, 0.2)
    whole = log_sums(joined, Uniform())
    for offset in range(0, 6, size):
        mine = slice(offset, offset + size)
        part = two_views(first[mine], second[mine], 0.2, gathered=(first, second), offset=offset)
        rows = [*range(offset, offset + size), *range(6 + offset, 6 + offset + size)]
        for got, want in zip(log_sums(part, Uniform()), whole, strict=True):
            torch.testing.assert_close(got, want[rows], **EXACT)
        assert torch.equal(part.is_negative(slice(None)), joined.is_negative(slice(None))[rows])
        # The anchors' own scores are the joined ones too.
        alike = UnDiMix(influence=0.0)
        torch.testing.assert_close(importance_weights(part, alike), importance_weights(joined, alike)[rows], **EXACT)
