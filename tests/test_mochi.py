"""MoCHi's synthetic negatives are those of the paper, constants that are the same in the backward pass."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from tests.contrasts import SHAPES, Case, bank, in_batch, make_every_look_cost, random_rows, rectangular
from tests.test_fast import (
    CASES,
    Apart,
    Largest,
    Loss,
    Outcome,
    Waits,
    all_excluded,
    assert_same,
    batches,
    blocks,
    leaves,
    of_pool,
    outcome,
    pairs,
    sizes,
    to,
    total,
)
from undimix_plugins import (
    Contrast,
    MoCHi,
    Uniform,
    Weighting,
    decoupled,
    importance_weights,
    info_nce,
    two_views,
)
from undimix_plugins import blocks as block_sizes
from undimix_plugins.fast.memory import Workspace
from undimix_plugins.toolkit import log_sums
from undimix_plugins.weightings.weighting import Softened

EXACT = {"rtol": 1e-10, "atol": 1e-10}
METHODS = [MoCHi(4, 3, 2), MoCHi(4, 3, 0), MoCHi(4, 0, 2), MoCHi(1, 2, 1), MoCHi(99, 5, 4)]
each_method = pytest.mark.parametrize("method", METHODS, ids=repr)
CASES_OF_FORMS = {**SHAPES, "in-batch-4": in_batch(2), "all-excluded": all_excluded(bank(5, 9))}
each_shape = pytest.mark.parametrize("case", CASES_OF_FORMS.values(), ids=CASES_OF_FORMS)


def seeded(loss: Loss) -> Loss:
    """The loss with the same draws each time."""

    def run(contrast: Contrast, weighting: Weighting) -> object:
        torch.manual_seed(0)
        return loss(contrast, weighting)

    return run


def drawn(case: Case, method: MoCHi) -> Tensor:
    """What the seeded loss draws, by the same blocks [n, s + s_prime, d]."""
    contrast = case.contrast()
    torch.manual_seed(0)
    row_bytes = (len(case.pool) + case.pool.shape[1] * (method.s + method.s_prime)) * case.pool.element_size()
    parts = block_sizes.blocks(len(case.anchors), row_bytes, kept=False)
    return torch.cat([method.synthesised(contrast, rows) for rows in parts])


def slow_sums(case: Case, synthetic: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Positives and sums of negatives, real and synthetic, an exponential at a time."""
    positives, negatives = [], []
    for i, (anchor, positive) in enumerate(zip(case.anchors, case.positives, strict=True)):
        positives.append((anchor @ positive / case.temperature).exp())
        sums = anchor.new_zeros(())
        of_anchor = case.negatives(i)
        for row in [*(case.pool[j] for j in of_anchor), *(synthetic[i] if of_anchor else [])]:
            sums = sums + (anchor @ row / case.temperature).exp()
        negatives.append(sums)
    return positives, negatives


def slow_info_nce(case: Case, synthetic: Tensor) -> Tensor:
    sums = zip(*slow_sums(case, synthetic), strict=True)
    return torch.stack([-(positive / (positive + negative)).log() for positive, negative in sums]).mean()


def slow_decoupled(case: Case, synthetic: Tensor) -> Tensor:
    sums = zip(*slow_sums(case, synthetic), strict=True)
    return torch.stack([((negative or positive) / positive).log() for positive, negative in sums]).mean()


def slow(case: Case, method: MoCHi) -> Outcome:
    synthetic = drawn(case, method)
    case, inputs = leaves(case)
    value = slow_info_nce(case, synthetic)
    return Outcome([value], list(torch.autograd.grad(value, inputs, materialize_grads=True)))


def assert_equal(got: Outcome, want: Outcome) -> None:
    for one, other in zip([*got.values, *got.gradients], [*want.values, *want.gradients], strict=True):
        torch.testing.assert_close(one, other, **EXACT)


# --- the synthetic rows


def hardest(case: Case, i: int, number: int) -> list[int]:
    similarity = {j: (case.anchors[i] @ case.pool[j]).item() for j in case.negatives(i)}
    return sorted(similarity, key=lambda j: -similarity[j])[:number]


def shares_of(row: Tensor, one: Tensor, other: Tensor) -> tuple[float, float] | None:
    """The share of `one` in the mixture of the two whose direction the row has, and its length; None for no such."""
    sides = torch.stack([one, other], dim=1)
    of_one, of_other = torch.linalg.lstsq(sides, row[:, None]).solution[:, 0].tolist()
    off = (sides @ torch.tensor([of_one, of_other], dtype=row.dtype) - row).norm()
    if off > 1e-9 or of_one < -1e-9 or of_other < -1e-9:
        return None
    return of_one / (of_one + of_other), 1 / (of_one + of_other)


def part(**options: bool) -> Case:
    """A part of a pool, of which each anchor is told that it is its row."""
    return rectangular(5, 9, 2, 7, **options)._replace(own_columns=list(range(2, 7)))


@pytest.mark.parametrize("number", [1, 2, 4, 99])
@pytest.mark.parametrize(
    "case", [in_batch(6, 7), bank(4, 9, 7), part(), part(unit=False)], ids=["in-batch", "bank", "part", "part-raw"]
)
def test_mixtures_of_the_hardest(case: Case, number: int) -> None:
    """Of two of them, and of one with the anchor, which has less than half; brought to length 1."""
    torch.manual_seed(1)
    rows = MoCHi(number, 8, 8).synthesised(case.contrast(), slice(0, len(case.anchors)))
    assert rows.shape == (len(case.anchors), 16, 7)
    torch.testing.assert_close(rows.norm(dim=2), torch.ones(rows.shape[:2], dtype=rows.dtype), **EXACT)
    for i in range(len(case.anchors)):
        hard = hardest(case, i, number)
        for row in rows[i, :8]:
            if not any(torch.allclose(row, normalize(case.pool[j], dim=0), rtol=0, atol=1e-9) for j in hard):
                pairs_of_hard = [(case.pool[j], case.pool[k]) for j, k in combinations(hard, 2)]
                assert any(shares_of(row, *pair) for pair in pairs_of_hard)
        for row in rows[i, 8:]:
            found = [shares for j in hard if (shares := shares_of(row, case.anchors[i], case.pool[j]))]
            assert len(found) == 1
            assert -1e-9 <= found[0][0] < 0.5


def test_shares_are_uniform() -> None:
    """Each of the N hardest is drawn as often, alpha is from 0 to 1 and beta from 0 to a half."""
    case = bank(1, 9, 7)
    torch.manual_seed(2)
    (rows,) = MoCHi(3, 3000, 3000).synthesised(case.contrast(), slice(0, 1))
    hard = hardest(case, 0, 3)
    apart = torch.linalg.lstsq(case.pool[hard].T, rows[:3000].T).solution.T
    assert (apart > -1e-9).all()
    of_two = apart[(apart > 1e-9).sum(dim=1) == 2]
    assert abs(len(of_two) / 3000 - 2 / 3) < 0.03
    shares = of_two / of_two.sum(dim=1, keepdim=True)
    for place in range(3):
        assert abs(float((shares[:, place] > 1e-9).double().mean()) - 2 / 3) < 0.03
    alphas = shares[shares[:, 0] > 1e-9, 0]
    for quantile, level in enumerate(alphas.quantile(torch.linspace(0, 1, 5, dtype=torch.float64)).tolist()):
        assert abs(level - quantile / 4) < 0.05
    with_anchor = torch.linalg.lstsq(torch.cat([case.anchors, case.pool[hard]]).T, rows[3000:].T).solution.T
    assert (with_anchor > -1e-9).all()
    assert ((with_anchor[:, 1:] > 1e-9).sum(dim=1) == 1).all()
    for place in range(3):
        assert abs(float((with_anchor[:, 1 + place] > 1e-9).double().mean()) - 1 / 3) < 0.03
    betas = with_anchor[:, 0] / with_anchor.sum(dim=1)
    assert betas.max() < 0.5
    for quantile, level in enumerate(betas.quantile(torch.linspace(0, 1, 5, dtype=torch.float64)).tolist()):
        assert abs(level - quantile / 8) < 0.025


@pytest.mark.parametrize("case", [in_batch(5), rectangular(5, 9, offset=2), bank(4, 9)], ids=["pairs", "part", "bank"])
@pytest.mark.parametrize("copies", [1, 4])
def test_the_single_hardest(case: Case, copies: int) -> None:
    """Of one alone, pairs are that itself, which then counts `1 + s` times; never the anchor, positive or excluded."""
    got = outcome(case, MoCHi(1, copies, 0), info_nce).values[0]
    losses = []
    for i, anchor in enumerate(case.anchors):
        logits = [case.pool[j] @ anchor / case.temperature for j in case.negatives(i)]
        logits += [max(logits)] * copies
        of_positive = anchor @ case.positives[i] / case.temperature
        losses.append(torch.stack([of_positive, *logits]).logsumexp(dim=0) - of_positive)
    torch.testing.assert_close(got, torch.stack(losses).mean(), **EXACT)


@given(case=batches(), number=st.integers(1, 9), seed=st.integers(0, 9))
def test_never_what_is_no_negative(case: Case, number: int, seed: int) -> None:
    """Rows that are none are moved to a width of their own, in which a synthetic one of pairs has nothing."""
    n = len(case.anchors)
    pool = torch.cat([case.pool, torch.ones(len(case.pool), 1, dtype=torch.float64)], dim=1)
    anchors = pool if case.anchors is case.pool else torch.cat([case.anchors, case.anchors[:, :1]], dim=1)
    positives = torch.cat([case.positives, case.positives[:, :1]], dim=1)
    case = case._replace(anchors=anchors, positives=positives, pool=pool)
    for i in range(n):
        marked = pool.clone()
        marked[[j for j in range(len(pool)) if j not in case.negatives(i)], -1] = 1e6
        marked[case.negatives(i), -1] = 0
        own = case._replace(anchors=anchors.detach().clone(), pool=marked)
        if case.anchors is case.pool:
            own = own._replace(own_columns=list(range(n)))
        torch.manual_seed(seed)
        rows = MoCHi(number, 6, 0).synthesised(own.contrast(), slice(i, i + 1))
        if case.negatives(i):
            assert not rows[..., -1].any()


# --- the loss


@each_method
@each_shape
def test_slow_reference(case: Case, method: MoCHi) -> None:
    """Value and gradient, of the same draws, which are constants: gradients of theirs reach the anchor alone."""
    assert_equal(outcome(case, method, seeded(info_nce)), slow(case, method))


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "by-block"])
@pytest.mark.parametrize("rows", [1, 2, 5])
@each_shape
def test_slow_reference_by_block(case: Case, rows: int, kept: bool) -> None:
    method = MoCHi(4, 3, 2)
    with blocks(kept=kept, rows=rows):
        assert len(block_sizes.blocks(7, 8, kept=False)) == math.ceil(7 / rows)
        assert_equal(outcome(case, method, seeded(info_nce)), slow(case, method))


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "by-block"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_other_losses(case: Case, kept: bool) -> None:
    """The decoupled loss and the two numbers that all losses are made of, on every kind of contrast."""
    method = MoCHi(4, 3, 2)
    if isinstance(case, Apart):  # whose contrast excludes nothing further
        case = case._replace(excluded=[[] for _ in case.excluded])
    with blocks(kept=kept):
        synthetic = drawn(case, method)
        made, inputs = leaves(case)
        value = slow_decoupled(made, synthetic)
        gradients = torch.autograd.grad(value, inputs, materialize_grads=True)
        assert_same(outcome(case, method, seeded(decoupled)), Outcome([value], list(gradients)))
        positives, negatives = (torch.stack(sums).log() for sums in slow_sums(made, synthetic))
        sums = total((positives, negatives))
        gradients = torch.autograd.grad(sums, inputs, materialize_grads=True)
        assert_same(outcome(case, method, seeded(log_sums)), Outcome([positives, negatives], list(gradients)))


@pytest.mark.parametrize("s_prime", [0, 5])
def test_gradients_of_synthetic_negatives_reach_the_anchor_alone(s_prime: int) -> None:
    """Of a bank they are the plain loss's, scaled; of the anchors there is more."""
    case, method = bank(1, 9), MoCHi(4, 6, s_prime)
    synthetic = drawn(case, method)[0]
    _, (of_anchor, of_positive, of_pool) = outcome(case, method, seeded(info_nce))
    exponentials = (torch.cat([case.positives, case.pool, synthetic]) @ case.anchors[0] / case.temperature).exp()
    shares = exponentials / exponentials.sum()
    scaled = shares[:, None] * case.anchors / case.temperature
    torch.testing.assert_close(of_pool, scaled[1:10], **EXACT)
    torch.testing.assert_close(of_positive, scaled[:1] - case.anchors / case.temperature, **EXACT)
    towards = shares @ torch.cat([case.positives, case.pool, synthetic]) - case.positives[0]
    torch.testing.assert_close(of_anchor[0], towards / case.temperature, **EXACT)


class Fixed(MoCHi):
    """Rows that are made of the embeddings as they were, since a numeric gradient would follow them."""

    def synthesised(self, contrast: Contrast, rows: slice) -> Tensor:
        return super().synthesised(FIXED[0], rows)


FIXED: list[Contrast] = []


@pytest.mark.parametrize("case", [in_batch(3), bank(3, 7), rectangular(4, 7, offset=2)], ids=["pairs", "bank", "part"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "by-block"])
def test_gradcheck(case: Case, kept: bool) -> None:
    """The same draws in the backward pass as in the forward pass."""
    made, inputs = leaves(case)
    FIXED[:] = [case.contrast()]

    def run(*rows: Tensor) -> Tensor:
        anchors, positives, pool = rows if len(rows) == 3 else (rows[0], rows[1], rows[0])
        torch.manual_seed(0)
        contrast = made._replace(anchors=anchors, positives=positives, pool=pool).contrast()
        return total(log_sums(contrast, Fixed(4, 3, 2)))

    with blocks(kept=kept, rows=2):
        assert torch.autograd.gradcheck(run, inputs)


def test_draws() -> None:
    """New ones in each call; backward leaves the random state as it finds it, and finds its own again."""
    made, inputs = leaves(bank(4, 9))
    method = MoCHi(4, 3, 2)
    want = slow(bank(4, 9), method).gradients
    torch.manual_seed(0)
    value = info_nce(made.contrast(), method)
    other = info_nce(made.contrast(), method)
    assert value != other
    torch.manual_seed(5)
    before = torch.get_rng_state()
    got = torch.autograd.grad(value, inputs)
    assert torch.equal(torch.get_rng_state(), before)
    for one, expected in zip(got, want, strict=True):
        torch.testing.assert_close(one, expected, **EXACT)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "by-block"])
def test_a_temperature_that_is_learned(kept: bool) -> None:
    """Its whole gradient, where anchors are the pool too."""
    method = MoCHi(4, 3, 2)
    for case in (in_batch(4), bank(3, 7), rectangular(5, 9, offset=2)):
        with blocks(kept=kept, rows=2):
            synthetic = drawn(case, method)
            temperature = torch.tensor(case.temperature, dtype=torch.float64, requires_grad=True)
            learned, inputs = leaves(case._replace(temperature=temperature))  # type: ignore[arg-type]
            got, want = seeded(info_nce)(learned.contrast(), method), slow_info_nce(learned, synthetic)
            torch.testing.assert_close(got, want, **EXACT)
            of_got, of_want = (torch.autograd.grad(value, [temperature, *inputs]) for value in (got, want))
        for one, other in zip(of_got, of_want, strict=True):
            torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("method", [MoCHi(4, 3, 2), MoCHi()], ids=repr)
def test_an_anchor_without_negatives(method: MoCHi) -> None:
    """It gets no synthetic ones, and adds 0."""
    for case in (in_batch(1), all_excluded(in_batch(4)), all_excluded(bank(5, 9))):
        _, negatives = log_sums(case.contrast(), method)
        none = torch.tensor([not case.negatives(i) for i in range(len(case.anchors))])
        assert torch.equal(negatives.isneginf(), none)
        value, gradients = outcome(case, method, info_nce)
        assert all(part.isfinite().all() for part in (*value, *gradients))
        if case.anchors is not case.pool:
            assert not gradients[0][none].any()
    pair = random_rows(2, 4, seed=0).requires_grad_()
    info_nce(two_views(pair[:1], pair[1:], 0.1), method).backward()
    assert torch.equal(pair.grad, torch.zeros_like(pair))  # type: ignore[arg-type]


def test_of_one_point() -> None:
    """All negatives the same row: a synthetic one of pairs is that row, however many there are."""
    case = bank(3, 6)
    case = case._replace(pool=case.pool[:1].expand(6, -1).clone())
    got = outcome(case, MoCHi(4, 5, 0), info_nce).values[0]
    of_positive = (case.anchors * case.positives).sum(dim=1) / case.temperature
    of_negative = case.anchors @ case.pool[0] / case.temperature + math.log(6 + 5)
    torch.testing.assert_close(got, (torch.logaddexp(of_positive, of_negative) - of_positive).mean(), **EXACT)


def test_opposite_and_zero_rows_stay_finite() -> None:
    """What mixes to a row of zeros stays one."""
    axes = torch.eye(4, dtype=torch.float64)
    pool = torch.stack([axes[0], -axes[0], torch.zeros(4, dtype=torch.float64)])
    case = Case(axes[1:3], axes[1:3], pool, 0.5, [-1, -1], [[], []], False)
    for seed in range(5):
        torch.manual_seed(seed)
        value, gradients = outcome(case, MoCHi(3, 8, 8), info_nce)
        assert all(part.isfinite().all() for part in (*value, *gradients))


def test_negatives_count_one_each() -> None:
    case = rectangular(5, 9, offset=2)
    assert torch.equal(importance_weights(case.contrast(), MoCHi()), case.is_negative().double())


@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_float32(temperature: float) -> None:
    case = to(in_batch(20, 6, temperature=temperature), torch.float32)
    for method in (MoCHi(8, 5, 3), MoCHi()):
        value, gradients = outcome(case, method, seeded(info_nce))
        assert value[0].dtype == torch.float32
        assert all(part.isfinite().all() for part in (*value, *gradients))
        # Draws are of float32; of the same rows, all but the digits is the same.
        synthetic = drawn(case, method).double()
        rounding = 16 * torch.finfo(torch.float32).eps / temperature
        exact = slow_info_nce(to(case, torch.float64), synthetic)
        torch.testing.assert_close(value[0].double(), exact, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    """The numbers of float32, also under autocast."""
    first, second = (random_rows(9, 6, seed).to(dtype).requires_grad_() for seed in (0, 1))
    contrast, method = two_views(first, second, 0.1), MoCHi(8, 5, 3)
    want = seeded(info_nce)(two_views(first.float(), second.float(), 0.1), method)
    outside = seeded(info_nce)(contrast, method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = seeded(info_nce)(contrast, method)
    assert torch.equal(outside, want)
    assert torch.equal(inside, want)
    of_both = (torch.autograd.grad(value, [first, second], retain_graph=True) for value in (outside, inside))
    assert all(map(torch.equal, *of_both))


def test_a_device_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    make_every_look_cost(monkeypatch)
    made, inputs = leaves(rectangular(5, 9, offset=2))
    contrast = made.contrast()
    with Waits() as waits:
        torch.autograd.grad(info_nce(contrast, MoCHi(4, 3, 2)), inputs)
    assert not waits.seen


@pytest.mark.parametrize("method", [MoCHi(8, 60, 4), MoCHi(8, 1, 0)], ids=repr)
def test_memory_is_linear(method: MoCHi) -> None:
    """What is made for all anchors at once is neither their synthetic rows nor their logits."""
    case = pairs(700)
    with sizes(KEPT_BYTES=0, LEAST_ROWS=16, LONE_BLOCK_BYTES=1):
        Workspace.spare.clear()
        with Largest() as largest:
            outcome(case, method, info_nce)
    assert largest.size < 1400 * 1400 / 8


def test_blocks_by_bytes() -> None:
    """So many anchors at a time that neither their rows nor their logits take more than a block."""
    case = of_pool(pairs(100), random_rows(200, 5, seed=0))
    rows = []

    class Seen(MoCHi):
        def synthesised(self, contrast: Contrast, of: slice) -> Tensor:
            rows.append(of.stop - of.start)
            return super().synthesised(contrast, of)

    for method in (Seen(8, 1, 0), Seen(8, 100, 20)):
        rows.clear()
        size = 8 * (200 + 5 * (method.s + method.s_prime))
        with sizes(LONE_BLOCK_BYTES=10 * size - 1, LEAST_ROWS=1):
            info_nce(case.contrast(), method)
        assert rows == [10] * 20


# --- the rest


def test_softened() -> None:
    """In logarithms, a share of what the synthetic negatives add."""
    case, method = rectangular(5, 9, offset=2), MoCHi(4, 3, 2)
    assert method.softened(0) == Uniform()
    assert method.softened(1) is method
    half = method.softened(0.5)
    assert half == Softened(method, 0.5)
    sums = [log_sums(case.contrast(), Uniform()).negatives, seeded(log_sums)(case.contrast(), method).negatives]
    got = seeded(log_sums)(case.contrast(), half).negatives
    torch.testing.assert_close(got, (sums[0] + sums[1]) / 2, **EXACT)
    _, gradients = outcome(case, half, info_nce)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_copies() -> None:
    weighting = MoCHi(8, 4, 2)
    for other in (pickle.loads(pickle.dumps(weighting)), copy.deepcopy(weighting)):
        assert other == weighting
        assert hash(other) == hash(weighting)
        both = (outcome(bank(4, 9), one, seeded(info_nce)) for one in (other, weighting))
        assert_equal(*both)
    assert repr(weighting) == "MoCHi(N=8, s=4, s_prime=2)"


def test_whole_numbers_that_are_floats() -> None:
    case = bank(4, 9)
    assert_equal(
        outcome(case, MoCHi(4.0, 3.0, 2.0), seeded(info_nce)),  # type: ignore[arg-type]
        outcome(case, MoCHi(4, 3, 2), seeded(info_nce)),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"N": 0}, "N: .*at least 1, got 0"),
        ({"N": 1.5}, r"N: expected a whole number, got 1\.5"),
        ({"s": -1}, "s: .*at least 0, got -1"),
        ({"s": 1.5}, r"s: expected a whole number, got 1\.5"),
        ({"s_prime": -1}, "s_prime: .*at least 0, got -1"),
        ({"s_prime": math.inf}, "s_prime: .*finite.* got inf"),
        ({"s": "4"}, "s: .*got '4'"),
        ({"s": 0, "s_prime": 0}, "s, s_prime: expected at least one above 0, got 0 for both"),
    ],
    ids=str,
)
def test_refuses(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        MoCHi(**settings)  # type: ignore[arg-type]
