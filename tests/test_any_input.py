"""Whatever comes in, a loss is a number with a gradient, that of the formula in float64, or an error that says why."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from tests.contrasts import in_batch, make_every_look_cost, random_rows
from undimix_plugins import (
    ADNCE,
    BCL,
    HCL,
    MMCL,
    AdCo,
    Contrast,
    Debiased,
    FalseNegativeAttraction,
    FalseNegativeElimination,
    IMix,
    MoCHi,
    PositiveAware,
    ProGCL,
    Ring,
    SimilarityPenalty,
    UnDiMix,
    Uniform,
    UnMix,
    Weighting,
    checks,
    compose,
    importance_weights,
    in_batch_negatives,
    info_nce,
    two_views,
    unit_rows,
)
from undimix_plugins.toolkit import log_sums, mean_loss

# Each made anew for an example, since ProGCL learns.
WEIGHTINGS: dict[str, Callable[[], Weighting]] = {
    "Uniform": Uniform,
    "UnDiMix": UnDiMix,
    "linear": lambda: UnDiMix(mixing="linear"),
    "euclidean": lambda: UnDiMix(distance="euclidean"),
    "HCL": HCL,
    "HCL-huge": lambda: HCL(1e30, 0.0),
    "HCL-alpha": lambda: HCL(0.5, 0.0, 0.3),
    "HCL-tiny-alpha": lambda: HCL(1.0, 0.1, 1e-30),
    "ADNCE": ADNCE,
    "ADNCE-narrow": lambda: ADNCE(0.3, 1e-6),
    "ADNCE-far": lambda: ADNCE(-1e15, 1e-6),
    "PositiveAware": PositiveAware,
    "PositiveAware-relative": lambda: PositiveAware(0.05, "relative"),
    "PositiveAware-huge": lambda: PositiveAware(-1e30, "relative"),
    "Debiased": Debiased,
    "BCL": lambda: BCL(0.1, 0.7, 0.9),
    "Ring": lambda: Ring(50, 90),
    "SimilarityPenalty": SimilarityPenalty,
    "SimilarityPenalty-huge": lambda: SimilarityPenalty(1e30),
    "elimination": lambda: FalseNegativeElimination(2, 0.3),
    "attraction": lambda: FalseNegativeAttraction(2, 0.3),
    "MoCHi": lambda: MoCHi(4, 3, 2),
    "ProGCL": lambda: ProGCL(start=1),
    "composed": lambda: compose(UnDiMix(), Debiased(), FalseNegativeElimination(k=2)),
    "softened": lambda: HCL().softened(0.5),
}
LONGEST = 1e15  # of embeddings in float32, here in all dtypes


def formula(case: Contrast, weighting: Weighting) -> float:
    """The loss of unit rows in numpy's float64, whose weights are written out."""
    anchors, positives, pool = (rows.detach().double().numpy() for rows in (case.anchors, case.positives, case.pool))
    t, losses = float(case.temperature), []
    negative = case.is_negative(slice(0, len(anchors))).numpy()
    for i, anchor in enumerate(anchors):
        positive, logits = anchor @ positives[i] / t, pool[negative[i]] @ anchor / t
        count = len(logits)
        if not count:
            losses.append(0.0)
            continue
        log_weights = np.zeros(count)
        if isinstance(weighting, SimilarityPenalty):
            log_weights = weighting.alpha * logits * t
        if isinstance(weighting, HCL):
            log_weights = weighting.beta * logits - np.logaddexp.reduce(weighting.beta * logits) + math.log(count)
        if isinstance(weighting, ADNCE):
            log_weights = -((logits * t - weighting.mu) ** 2) / (2 * weighting.sigma**2)
            log_weights += math.log(count) - np.logaddexp.reduce(log_weights)
        total = np.logaddexp.reduce(log_weights + logits)
        if isinstance(weighting, (HCL, Debiased)) and weighting.tau_plus:
            taken = math.log(weighting.tau_plus * count) + positive
            rest = total + np.log1p(-np.exp(taken - total)) if taken < total else -np.inf
            total = max(rest - math.log1p(-weighting.tau_plus), math.log(count) - 1 / t)
        losses.append(float(np.logaddexp(total - positive, math.log(weighting.positive_factor))))
    return float(np.mean(losses))


@given(
    name=st.sampled_from(sorted(WEIGHTINGS)),
    form=st.sampled_from(["two views", "in batch", "bank"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    exponent=st.floats(-30, 30),  # in float16, whose numbers have less, a seventh
    kind=st.sampled_from(["alike", "mixed", "with zero", "copies"]),
    unit=st.booleans(),
    n=st.integers(1, 7),
    width=st.integers(1, 6),
    temperature=st.sampled_from([1e-3, 0.02, 0.05, 0.5, 2.0]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=400)
def test_a_number_or_an_error(
    name: str,
    form: str,
    dtype: torch.dtype,
    exponent: float,
    kind: str,
    unit: bool,
    n: int,
    width: int,
    temperature: float,
    seed: int,
) -> None:
    exponent *= 1 / 7 if dtype == torch.float16 else 1
    lengths = torch.full((2, n, 1), 10**exponent, dtype=torch.float64)
    if kind == "mixed":
        lengths = 10 ** (60 * torch.rand(2, n, 1, generator=torch.Generator().manual_seed(seed)).double() - 30)
    rows = random_rows(2 * n, width, seed, unit=False).view(2, n, width) * lengths
    rows[0, 0] *= kind != "with zero"
    if kind == "copies":
        rows[1] = rows[1, :1].clone()
    rows = rows.to(dtype).requires_grad_()
    bank = (random_rows(5, width, seed + 1) * lengths.amax()).to(dtype)
    weighting = WEIGHTINGS[name]()
    try:
        first, second, memory = (
            (*unit_rows(first=rows[0], second=rows[1]), *unit_rows(bank=bank)) if unit else (*rows, bank)
        )
        if form == "two views":
            contrast = two_views(first, second, temperature)
        elif form == "in batch":
            contrast = in_batch_negatives(first, second, temperature)
        else:
            contrast = Contrast.of(first, second, memory, None, temperature)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of debiasing at its bound
            loss = info_nce(contrast, weighting)
            (gradient,) = torch.autograd.grad(loss, rows)
    except ValueError as error:
        refused = str(error)
    else:
        refused = None
    if refused is not None:
        named = ("first", "second", "bank", "anchors", "positives", "pool", "temperature", "weighting")
        assert refused.partition(":")[0] in named
        given = [part.detach().double() for part in (*rows, bank)]
        longest = max(float(part.norm(dim=1).max()) for part in given)
        # Raw rows may be shorter than that, and their products too large for the temperature, or for alpha.
        assert not longest <= (LONGEST if unit else 1e3)
        return
    assert loss.isfinite()
    # In float16, a gradient at a short row, or of long ones, may be more than it holds.
    moderate = unit and temperature >= 0.02 and -1 < exponent < 3 and kind in ("alike", "with zero")
    assert gradient.isfinite().all() or (dtype == torch.float16 and not moderate)
    if unit:
        if dtype == torch.float16 and kind == "with zero":
            assert gradient[0, 0].count_nonzero() == 0
        if name in ("Uniform", "HCL", "HCL-alpha", "Debiased", "SimilarityPenalty", "ADNCE"):
            rounding = 1e-12 if dtype == torch.float64 else 1e-5
            assert loss.item() == pytest.approx(formula(contrast, weighting), abs=rounding / temperature)


def test_a_row_without_a_direction_has_no_gradient() -> None:
    for dtype, tiny in (
        (torch.float16, 6e-8),
        (torch.bfloat16, 1e-30),
        (torch.float32, 1e-30),
        (torch.float64, 1e-200),
    ):
        rows = random_rows(6, 4, 0).to(dtype)
        rows[1], rows[4] = 0, torch.tensor([tiny, -tiny, 0, tiny], dtype=dtype)
        rows.requires_grad_()
        for weighting in WEIGHTINGS.values():
            loss = info_nce(two_views(*unit_rows(z=rows)[0].chunk(2), 0.05), weighting())
            (gradient,) = torch.autograd.grad(loss, rows)
            assert gradient.isfinite().all()
            assert gradient[[1, 4]].count_nonzero() == 0
            assert gradient[[0, 2, 3, 5]].count_nonzero() > 0


BAD_EMBEDDINGS: dict[str, tuple[Callable[[], Any], str]] = {
    "float8": (lambda: torch.ones(4, 8).to(torch.float8_e4m3fn), r"got torch\.float8_e4m3fn, which has fewer than 16"),
    "sparse": (lambda: torch.eye(4, 8).to_sparse(), r"expected a dense tensor .*, got torch\.sparse_coo"),
    "csr": (lambda: torch.eye(4, 8).to_sparse_csr(), r"expected a dense tensor .*, got torch\.sparse_csr"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(1, 8)]),
        r"expected a dense tensor .*, got a nested tensor",
    ),
    "complex": (lambda: torch.ones(4, 8, dtype=torch.complex64), r"got torch\.complex64"),
    "long": (
        lambda: torch.full((4, 8), 1e20),
        r"expected embeddings of a length up to 1e\+15, .*, got 3e\+20 in row 0",
    ),
    "long-64": (lambda: torch.full((4, 8), 1e200, dtype=torch.float64), r"got 3e\+200 in row 0"),
}


@pytest.mark.parametrize(("make", "message"), BAD_EMBEDDINGS.values(), ids=BAD_EMBEDDINGS)
def test_embeddings_of_other_kinds_are_refused(make: Callable[[], Any], message: str) -> None:
    rows = make(), make()
    for call in (two_views, in_batch_negatives):
        with pytest.raises(ValueError, match=rf"^(first|anchors): .*{message}"):
            call(*rows, 0.5)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("temperature", "came"),
    [
        (torch.tensor(0.5, device="meta"), "got meta"),
        (torch.tensor([0.5]).to_sparse(), r"got torch\.float32 \[1\], torch\.sparse_coo"),
        (torch.tensor([0.5]).to(torch.float8_e4m3fn), r"got torch\.float8_e4m3fn \[1\]"),
    ],
    ids=["meta", "sparse", "float8"],
)
def test_temperatures_of_other_kinds_are_refused(temperature: Tensor, came: str) -> None:
    with pytest.raises(ValueError, match=f"^temperature: .*{came}"):
        two_views(*random_rows(4, 8, 0).chunk(2), temperature)


def test_something_else_than_a_contrast_is_refused() -> None:
    for call in (info_nce, log_sums, importance_weights):
        with pytest.raises(TypeError, match=r"^contrast: expected a Contrast, got Tensor$"):
            call(torch.ones(4, 8), UnDiMix())  # type: ignore[arg-type]


@pytest.mark.parametrize("make", WEIGHTINGS.values(), ids=WEIGHTINGS)
def test_nothing_is_made_on_another_default_device(make: Callable[[], Weighting]) -> None:
    contrast = in_batch(6).contrast()
    with torch.device("meta"):
        assert info_nce(contrast, make()).isfinite()


INTEGERS = [torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_columns_of_any_integers(dtype: torch.dtype) -> None:
    anchors, pool, columns = random_rows(3, 4, 0), random_rows(5, 4, 1), torch.tensor([[4], [0], [2]])

    def losses(of: torch.dtype) -> list[Tensor]:
        own_columns, further = columns[:, 0].to(of), columns.roll(1).to(of)
        contrasts = [
            Contrast.of(anchors, columns.to(of), pool, further, 0.5),
            Contrast.of(anchors, anchors.roll(1), pool, None, 0.5, own_columns=own_columns),
            Contrast.of(anchors, anchors.roll(1), pool, None, 0.5, own_columns=own_columns).without(further),
            Contrast.of(anchors, anchors.roll(1), pool, None, 0.5, own_columns=own_columns).with_positives(further),
            Contrast.of(anchors, anchors.roll(1), pool, further, 0.5).with_positives(further),  # none left
        ]
        return [info_nce(contrast, weighting) for contrast in contrasts for weighting in (Uniform(), UnDiMix())]

    assert all(map(torch.equal, losses(dtype), losses(torch.int64)))


def test_float16_under_the_autocast_of_bfloat16() -> None:
    views = random_rows(12, 4, 0).half().chunk(2)
    want = info_nce(two_views(*views, 0.5), UnDiMix())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(info_nce(two_views(*views, 0.5), UnDiMix()), want)
        assert torch.equal(info_nce(two_views(*views, 0.5, gathered=views), UnDiMix()), want)


@pytest.mark.parametrize("of", [torch.float16, torch.float32, torch.float64], ids=str)
def test_a_temperature_has_the_rows_digits(of: torch.dtype) -> None:
    """One in float32 is exact as it came, and divides in float64."""
    temperature = torch.tensor(0.07, dtype=of)
    views = random_rows(12, 4, 0).chunk(2)
    want = info_nce(two_views(*views, temperature.item()), UnDiMix())
    got = info_nce(two_views(*views, temperature.clone().requires_grad_()), UnDiMix())
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    torch.testing.assert_close(info_nce(two_views(*views, temperature), UnDiMix()), want, rtol=1e-13, atol=0)


BAD_NUMBERS: dict[str, tuple[Callable[[], Any], str]] = {
    "beta": (lambda: HCL(beta=1e39), r"beta: expected at most 1e\+30, got 1e\+39"),
    "alpha": (lambda: SimilarityPenalty(2e38), r"alpha: expected at most 1e\+30, got 2e\+38"),
    "temperature": (
        lambda: two_views(*random_rows(4, 8, 0).chunk(2), 5e-324),
        r"temperature: expected similarities over it up to .*, got 5e-324 with anchors of length 1",
    ),
    "C": (lambda: MMCL(C=1e39), r"C: expected at most 1e\+30, got 1e\+39"),
    "mixing": (lambda: IMix(alpha=1e39), r"alpha: expected at most 1e\+30, got 1e\+39"),
    "Un-Mix": (lambda: UnMix(beta=1e39), r"beta: expected at most 1e\+30, got 1e\+39"),
    "lr": (lambda: AdCo(4, 8, lr=1e39), r"lr: expected at most 1e\+30, got 1e\+39"),
    "anchor weights": (
        lambda: in_batch_negatives(*random_rows(4, 8, 0).chunk(2), 0.5, anchor_weights=torch.full((2,), 3e38)),
        r"anchor_weights: expected finite numbers of at least 0 and at most 1e\+30, got 3e\+38",
    ),
    "uint64": (
        lambda: in_batch_negatives(*random_rows(4, 8, 0).chunk(2), 0.5).without(
            torch.full((2, 1), 2**64 - 1, dtype=torch.uint64)
        ),
        r"columns: expected columns from -1 \(none\) to 1, got -1 to -1",
    ),
    "sparse columns": (
        lambda: in_batch_negatives(*random_rows(4, 8, 0).chunk(2), 0.5).without(torch.ones(2, 1).long().to_sparse()),
        r"columns: expected integer columns of the pool, got torch\.int64, torch\.sparse_coo",
    ),
    "complex weights": (
        lambda: in_batch_negatives(
            *random_rows(4, 8, 0).chunk(2), 0.5, anchor_weights=torch.ones(2, dtype=torch.complex128)
        ),
        r"anchor_weights: expected real numbers, got torch\.complex128",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD_NUMBERS.values(), ids=BAD_NUMBERS)
def test_numbers_that_would_poison_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


class Poisoned(Weighting):
    """A user's, whose weights are no numbers for one anchor."""

    def __init__(self, value: float, gradient: bool) -> None:
        self.value, self.gradient = value, gradient

    def log_weights(self, prepared: Contrast, rows: slice) -> Tensor:
        logits = prepared.logits(rows) if self.gradient else prepared.logits(rows).detach()
        return torch.cat([logits[:1], logits[1:2] * self.value, logits[2:]])


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("gradient", [False, True], ids=["constant", "with gradient"])
def test_weights_that_are_no_numbers_are_an_error_by_name(value: float, gradient: bool) -> None:
    views = random_rows(8, 4, 0).requires_grad_().chunk(2)
    for call in (info_nce, log_sums):
        with pytest.raises(
            ValueError, match=rf"^weighting: .*, got NaN or too .* from Poisoned\(value={value}, gradient="
        ):
            call(two_views(*views, 0.5), Poisoned(value, gradient))


class Overflowing(Uniform):
    """A user's, of a sum that is no number where there is nothing to sum."""

    def combine(self, contrast: Contrast, positives: Tensor, negatives: Tensor, count: Tensor) -> Tensor:
        return torch.where(contrast.count == 0, torch.nan, negatives)


def test_what_the_weights_are_not_to_blame_for() -> None:
    contrast = two_views(*random_rows(8, 4, 0).requires_grad_().chunk(2), 1e-3)
    squared = mean_loss(contrast, Uniform(), lambda margin: (margin.exp().square(), 2 * margin.exp().square()))
    assert squared.item() == math.inf  # a loss of one's own, which overflows
    lonely = two_views(*random_rows(2, 4, 0).chunk(2), 0.5)
    assert info_nce(lonely, Overflowing()) == 0


def none_told(call: Callable[[], object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


def test_what_is_no_lack_of_negatives() -> None:
    """A loss of 0 that has other reasons."""
    rows, labels = torch.eye(8, dtype=torch.float64), torch.arange(8)
    apart = two_views(rows, rows, 5e-3, excluded_mask=lambda block: labels.repeat(2)[block, None] == labels.repeat(2))
    none_told(lambda: info_nce(apart, UnDiMix()))
    none_told(lambda: info_nce(two_views(rows, rows, 5e-3), Ring()))
    none_told(lambda: mean_loss(apart, Uniform(), lambda margin: (margin.relu(), (margin > 0).to(margin))))
    alone = two_views(rows[:1], rows[:1], 0.5, excluded_mask=lambda block: torch.ones(2, 2, dtype=torch.bool)[block])
    for weighting in (Uniform(), HCL()):
        none_told(lambda weighting=weighting: info_nce(alone, weighting))  # type: ignore[misc]


def test_where_a_look_costs_the_first_batch_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    make_every_look_cost(monkeypatch)
    monkeypatch.setattr(checks, "LOOKED", set())
    rows = random_rows(12, 4, 0).chunk(2)
    alike = two_views(*rows, 0.5, excluded_mask=lambda block: torch.ones(12, 12, dtype=torch.bool)[block])
    with pytest.warns(UserWarning, match="^labels: no anchor"):
        info_nce(alike, Uniform())
    none_told(lambda: info_nce(alike, Uniform()))


def test_labels_that_leave_no_negative_are_told() -> None:
    views = random_rows(12, 4, 0).requires_grad_().chunk(2)
    for weighting in (Uniform(), UnDiMix(), HCL()):
        for labels, told in ((torch.zeros(12), True), (torch.arange(12) % 6 == 0, False)):
            contrast = two_views(*views, 0.5, excluded_mask=lambda rows, of=labels: of[rows, None] == of)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                info_nce(contrast, weighting)
            assert [str(warning.message)[:52] for warning in caught] == [
                "labels: no anchor of this batch has a negative, since"[:52]
            ] * told


@pytest.mark.parametrize("weighting", [HCL(), Debiased()], ids=repr)
def test_debiasing_at_its_bound_is_told(weighting: Weighting) -> None:
    """Of anchors that the encoder tells apart from others, at a ranking loss's temperature: no gradient is left."""
    rows = torch.eye(8, dtype=torch.float64).repeat(2, 1) + 0.1 * random_rows(16, 8, 0)
    first, second = normalize(rows, dim=1).requires_grad_().chunk(2)
    with pytest.warns(UserWarning, match=r"^debiasing: most of this batch's anchors .* Set tau_plus=0, or a higher"):
        loss = info_nce(in_batch_negatives(first, second, 0.05), weighting)
    assert torch.autograd.grad(loss, first)[0].abs().max() < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        info_nce(in_batch_negatives(first, second, 0.5), weighting)
        info_nce(in_batch_negatives(first, second, 0.05), HCL(beta=0.5, tau_plus=0))


def copied(weighting: Weighting, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """The weights of candidates, some of which are equal, in two orders of these [anchors, candidates]."""
    pool = normalize(random_rows(40, 13, seed).to(dtype), dim=1)
    pool[25:] = pool[torch.arange(15) % 5]  # four of the first five
    anchors = normalize(random_rows(7, 13, seed + 1).to(dtype), dim=1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    weights = importance_weights(Contrast.of(anchors, anchors, pool, None, 0.1), weighting)
    shuffled = importance_weights(Contrast.of(anchors, anchors, pool[order], None, 0.1), weighting)
    return weights, shuffled[:, order.argsort()]


@pytest.mark.parametrize(
    "weighting",
    [
        BCL(),
        BCL(0.1, 0.7, 0.9),
        Ring(40, 80),
        Ring(90, 97.5),
        FalseNegativeElimination(1, -1),
        FalseNegativeElimination(3, 0.1),
        PositiveAware(0.2),
        PositiveAware(0.5, "relative"),
        ADNCE(0.3, 0.1),
        UnDiMix(),
        HCL(),
        compose(Ring(40, 80), BCL()),
    ],
    ids=repr,
)
@given(dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 1000))
@example(dtype=torch.float64, seed=0)
def test_copies_weigh_the_same_in_any_order(weighting: Weighting, dtype: torch.dtype, seed: int) -> None:
    weights, shuffled = copied(weighting, dtype, seed)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(weights[:, 25:30], weights[:, :5], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(shuffled, weights, rtol=tolerance, atol=tolerance)


def test_copies_weigh_the_same_under_a_mixture() -> None:
    weighting = ProGCL(start=1)
    weighting.fit(Contrast.of(random_rows(7, 13, 0), random_rows(7, 13, 0), random_rows(30, 13, 1), None, 0.1))
    weights, shuffled = copied(weighting, torch.float64, 3)
    assert torch.equal(weights[:, 25:30], weights[:, :5])
    torch.testing.assert_close(shuffled, weights, rtol=1e-9, atol=1e-9)


def test_attraction_takes_all_copies() -> None:
    pool = torch.eye(6, dtype=torch.float64)[[0, 1, 1, 1, 2, 3]]
    anchors = normalize(torch.tensor([[0.1, 1.0, 0.2, 0.3, 0.0, 0.0]], dtype=torch.float64), dim=1)
    contrast = Contrast.of(anchors, anchors, pool, None, 0.5)
    found = FalseNegativeAttraction(k=1, threshold=0.5).choose(contrast).positive_columns
    assert found is not None
    assert sorted(found[0].tolist()) == [1, 2, 3]


def test_attraction_of_fewer_than_k_takes_no_more_columns() -> None:
    """And of copies below the threshold none."""
    pool = torch.eye(6, dtype=torch.float64)[[0, 0, 0, 1, 1, 2]]
    anchors = torch.eye(6, dtype=torch.float64)[:2]
    contrast = Contrast.of(anchors, anchors, pool, torch.tensor([[0, 1, 2, 3, 4], [3, 4, -1, -1, -1]]), 0.5)
    found = FalseNegativeElimination(k=4, threshold=0.5).found(contrast)
    assert found.shape == (2, 4)
    assert (found == -1).all()


def test_mixing_draws_the_same_from_copies_in_any_order() -> None:
    pool = normalize(random_rows(40, 13, 0), dim=1)
    pool[25:] = pool[torch.arange(15) % 5]
    anchors = normalize(random_rows(7, 13, 1), dim=1)
    losses = []
    for order in (torch.arange(40), torch.randperm(40, generator=torch.Generator().manual_seed(0))):
        torch.manual_seed(0)
        losses.append(info_nce(Contrast.of(anchors, anchors, pool[order], None, 0.1), MoCHi(6, 20, 10)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
