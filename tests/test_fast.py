"""The fast path against the plain reference: the same loss, gradients and log-weights, in blocks of any size."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from tests.contrasts import Case, bank, in_batch, make_every_look_cost, random_rows, rectangular
from undimix_plugins import HCL, Contrast, UnDiMix, Uniform, Weighting, decoupled, info_nce, two_views
from undimix_plugins import blocks as block_sizes
from undimix_plugins.fast.logits import LOG2E
from undimix_plugins.fast.memory import Workspace
from undimix_plugins.fast.numerators import Numerators, workspace
from undimix_plugins.fast.scores import Block, Influence
from undimix_plugins.plan import planned
from undimix_plugins.toolkit import log_sums, weighted_log_sum

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
SIZES_AS_THEY_ARE = {
    name: getattr(block_sizes, name) for name in ("KEPT_BYTES", "BLOCK_BYTES", "LONE_BLOCK_BYTES", "LEAST_ROWS", "TILE")
}


@contextmanager
def sizes(**values: int) -> Iterator[None]:
    """Constants of the fast path at these values."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(block_sizes, name, value)
        yield


def blocks(*, kept: bool, rows: int = 3, tile: int = 4) -> AbstractContextManager[None]:
    """Blocks so small that a few rows are many, their scores kept or not."""
    kept_bytes = SIZES_AS_THEY_ARE["KEPT_BYTES"] if kept else 0
    return sizes(KEPT_BYTES=kept_bytes, BLOCK_BYTES=1, LONE_BLOCK_BYTES=1, LEAST_ROWS=rows, TILE=tile)


SMALL = {"kept": {"kept": True}, "kept-2-of-tile-5": {"kept": True, "rows": 2, "tile": 5}, "by-block": {"kept": False}}


@pytest.fixture(params=SMALL.values(), ids=SMALL, autouse=True)
def small(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    with blocks(**request.param):
        yield request.param


def fast_log_weights(contrast: Contrast, weighting: Weighting) -> Tensor:
    """The log-weights [n, m] that the fast path works with: its scores less the logits."""
    n, m = len(contrast.anchors), len(contrast.pool)
    parts = []
    with torch.no_grad(), workspace(contrast) as memory:
        out = contrast.pool.new_empty(n, m) if block_sizes.fits(contrast.anchors, contrast.pool) else None
        work = Numerators(planned(contrast, weighting), out, memory)
        for rows in work.rows:
            count = rows.stop - rows.start
            logits = work.logits.block(rows, contrast.pool.new_empty(count, m)).clone()
            own, empty = logits.clone(), torch.empty_like(logits)
            if work.mix is None:
                scores = work.scores(rows, own, empty) - logits
            else:
                scratch = [part[:count] for part in work.scratch]
                mixed = work.mix.block(Block(rows, own, work.excluded.block(rows), empty, scratch))
                scores = mixed.scores - logits - (0 if mixed.log_mean is None else mixed.log_mean)
            parts.append(scores / LOG2E)
    return torch.cat(parts)


def dense_log_weights(contrast: Contrast, weighting: Weighting) -> Tensor:
    return weighting.log_weights(weighting.prepare(contrast), slice(0, len(contrast.anchors))).detach()


def dense_log_sums(contrast: Contrast, weighting: Weighting) -> tuple[Tensor, Tensor]:
    positives = (contrast.anchors * contrast.positives).sum(dim=1) / contrast.temperature
    every = slice(0, len(contrast.anchors))
    negatives = weighted_log_sum(contrast, weighting, weighting.prepare(contrast), every)
    none = negatives.isneginf()
    combined = weighting.combine(contrast, positives, negatives.masked_fill(none, 0), contrast.count.clamp(min=1))
    return positives, combined.masked_fill(none, -torch.inf)


def dense_info_nce(contrast: Contrast, weighting: Weighting) -> Tensor:
    positives, negatives = dense_log_sums(contrast, weighting)
    return torch.logaddexp(negatives - positives, torch.zeros_like(positives)).mean()


def dense_decoupled(contrast: Contrast, weighting: Weighting) -> Tensor:
    positives, negatives = dense_log_sums(contrast, weighting)
    return (negatives - positives).masked_fill(negatives.isneginf(), 0).mean()


Loss = Callable[[Contrast, Weighting], Any]
DENSE: dict[Loss, Loss] = {info_nce: dense_info_nce, decoupled: dense_decoupled, log_sums: dense_log_sums}


def total(result: Any) -> Tensor:
    """A loss as it is; log-sums added up, each with a share of its own."""
    if isinstance(result, Tensor):
        return result
    return sum(  # type: ignore[return-value]
        (part.masked_fill(part.isneginf(), 0) * torch.linspace(start, 1, len(part), dtype=part.dtype)).sum()
        for start, part in zip((0.3, -0.5), result, strict=True)
    )


def leaves(case: Case) -> tuple[Case, list[Tensor]]:
    """The same case with gradients wanted at anchors, positives and pool, at one leaf where anchors are the pool."""
    anchors, positives, pool = (part.clone().requires_grad_() for part in (case.anchors, case.positives, case.pool))
    if case.anchors is case.pool:
        return case._replace(anchors=pool, positives=positives, pool=pool), [pool, positives]
    return case._replace(anchors=anchors, positives=positives, pool=pool), [anchors, positives, pool]


class Outcome(NamedTuple):
    values: list[Tensor]
    gradients: list[Tensor]


def outcome(case: Case, weighting: Weighting, loss: Loss) -> Outcome:
    case, inputs = leaves(case)
    result = loss(case.contrast(), weighting)
    gradients = torch.autograd.grad(total(result), inputs, materialize_grads=True)
    return Outcome([result] if isinstance(result, Tensor) else list(result), list(gradients))


def assert_same(got: Outcome, want: Outcome) -> None:
    for part, expected in zip(got.values, want.values, strict=True):
        tolerance = TOLERANCE[expected.dtype]
        torch.testing.assert_close(part, expected, rtol=tolerance, atol=tolerance)
    for part, expected in zip(got.gradients, want.gradients, strict=True):
        assert part.isfinite().all()
        scale = expected.abs().max().item()
        torch.testing.assert_close(part, expected, rtol=0, atol=TOLERANCE[expected.dtype] * scale)


def assert_equals_dense(case: Case, weighting: Weighting, *losses: Loss) -> None:
    for loss in losses or DENSE:
        assert_same(outcome(case, weighting, loss), outcome(case, weighting, DENSE[loss]))


class Tight(Case):
    """As the adapters make it: excluded columns without padding."""

    def contrast(self) -> Contrast:
        return Contrast.of(
            self.anchors,
            self.positives,
            self.pool,
            torch.tensor(self.excluded),
            self.temperature,
            own_columns=None if self.anchors is self.pool else torch.tensor(self.own_columns),
            positives_in_pool=self.positives_in_pool,
            last_layer=self.last_layer,
        )


class Apart(Case):
    """The anchors are the pool, and their own columns are named: the positives are of another kind."""

    def contrast(self) -> Contrast:
        rows = self.anchors, self.positives, self.pool
        own = torch.tensor(self.own_columns)
        return Contrast.of(*rows, None, self.temperature, own, positives_in_pool=False, last_layer=self.last_layer)


class Bare(Case):
    """As a memory bank comes: nothing of it is said to be excluded, or an anchor itself."""

    def contrast(self) -> Contrast:
        return Contrast.of(self.anchors, self.positives, self.pool, None, self.temperature, last_layer=self.last_layer)


def pairs(count: int, width: int = 5, **options: Any) -> Case:
    return Tight(*in_batch(count, width, **options))


def ring(n: int, width: int = 5, **options: Any) -> Case:
    """One batch with itself of any size, an anchor's positive being the next row."""
    case = in_batch(n, width, **options)
    views, inputs, following = case.pool[:n].clone(), random_rows(n, 3, seed=1), [(i + 1) % n for i in range(n)]
    excluded, own_columns = [[j] for j in following], list(range(n))
    return Case(views, views[following], views, case.temperature, own_columns, excluded, True, inputs, inputs.clone())


def gathered(mine: int, all_of_them: int, width: int = 5, **options: Any) -> Case:
    """Two views of some samples against those of all processes' samples."""
    case = in_batch(all_of_them, width, **options)
    own = [1 + view * all_of_them + i for view in (0, 1) for i in range(mine)]
    other, inputs = own[mine:] + own[:mine], random_rows(2 * all_of_them, 3, seed=1)
    rows = case.pool[own], case.pool[other], case.pool.clone()
    return Tight(*rows, case.temperature, own, [[j] for j in other], True, inputs[own], inputs)


def ranking(n: int, width: int = 5, *, temperature: float = 0.5) -> Case:
    """Queries against three columns of documents, of which an anchor's own are no negatives."""
    rows, inputs = random_rows(4 * n, width, seed=0), random_rows(4 * n, 3, seed=1)
    own = [[i, n + i, 2 * n + i] for i in range(n)]
    return Tight(rows[:n], rows[n : 2 * n], rows[n:], temperature, [-1] * n, own, True, inputs[:n], inputs[n:])


def of_pool(case: Case, pool: Tensor) -> Case:
    """The same batch of pairs with other views."""
    return case._replace(anchors=pool, positives=pool.roll(len(pool) // 2, 0), pool=pool)


def all_excluded(case: Case) -> Case:
    """Nothing is left to the second anchor."""
    everything = list(range(len(case.pool)))
    return case._replace(excluded=[everything if i == 1 else row for i, row in enumerate(case.excluded)])


def with_zeros(case: Case, *columns: int) -> Case:
    """Rows of the pool all 0, to which every candidate is alike: the first is their label."""
    pool = case.pool.clone()
    pool[list(columns)] = 0
    return of_pool(case, pool) if case.anchors is case.pool else case._replace(pool=pool)


def to(case: Case, dtype: torch.dtype) -> Case:
    anchors, positives, pool = (part.to(dtype) for part in (case.anchors, case.positives, case.pool))
    return case._replace(anchors=pool if case.anchors is case.pool else anchors, positives=positives, pool=pool)


class HarderHalf(Weighting):
    """A user's own, detached."""

    def log_weights(self, contrast: Contrast, rows: slice) -> Tensor:
        similarity = contrast.logits(rows).detach()
        harder = similarity > similarity.median(dim=1, keepdim=True).values
        return (1 + harder.to(similarity.dtype)).log()


class ByPlace(Weighting):
    """A user's own that no embedding changes, so that a numeric gradient is the right one."""

    def log_weights(self, contrast: Contrast, rows: slice) -> Tensor:
        n, m = len(contrast.anchors), len(contrast.pool)
        return torch.arange(n * m, dtype=contrast.pool.dtype).view(n, m)[rows].sin()


class Followed(Weighting):
    """A user's own, with gradient."""

    def log_weights(self, contrast: Contrast, rows: slice) -> Tensor:
        return contrast.logits(rows).tanh()


class Halved(UnDiMix):
    """A user's own variant of ours."""

    def log_weights(self, prepared: Any, rows: slice) -> Tensor:
        return super().log_weights(prepared, rows) / 2


OURS: dict[str, Weighting] = {
    "uniform": Uniform(),
    "undimix": UnDiMix(),
    "detached": UnDiMix(detached=True),
    "linear": UnDiMix(mixing="linear"),
    "similarity": UnDiMix(1.0, 0.0, 0.0),
    "influence": UnDiMix(0.0, 1.0, 0.0),
    "diversity": UnDiMix(0.0, 0.0, 1.0),
    "negative": UnDiMix(-0.5, 0.8, -1.2),
    "linear-two": UnDiMix(0.7, 0.0, 0.2, hardness=2.0, mixing="linear"),
    "weight": UnDiMix(gradient="weight"),
    "euclidean": UnDiMix(distance="euclidean"),
}
WEIGHTINGS = OURS | {
    "hcl": HCL(0.5, 0.0),
    "hcl-debiased": HCL(0.5, 0.1),
    "harder-half": HarderHalf(),
    "by-place": ByPlace(),
    "followed": Followed(),
    "halved": Halved(),
}


def each(*names: str) -> pytest.MarkDecorator:
    """The weightings of these names, all of them for none."""
    chosen = {name: WEIGHTINGS[name] for name in names or WEIGHTINGS}
    return pytest.mark.parametrize("weighting", chosen.values(), ids=chosen)


once = pytest.mark.parametrize("small", [SMALL["kept"]], ids=["kept"], indirect=True)

CASES = {
    "pairs-4": pairs(2, temperature=0.4),
    "pairs-14": pairs(7, 3, temperature=0.8),
    "pairs-18-raw": pairs(9, unit=False),
    "pairs-16-of-all-lengths": of_pool(
        pairs(8), random_rows(16, 5, seed=0) * torch.logspace(-1, 1, 16, dtype=torch.float64)[:, None]
    ),
    "pairs-2": pairs(1),
    "pairs-10-width-1": pairs(5, 1, unit=False),
    "pairs-6-wide": pairs(3, 40),
    "padded-14": in_batch(7, 3, temperature=0.8),
    "apart-8": Apart(*in_batch(4)),
    "apart-8-without-some": Apart(*in_batch(4))._replace(own_columns=[0, -1, 2, 3, -1, 5, 6, 7]),
    "bank-3x8": bank(3, 8, temperature=0.4),
    "bank-9x4-raw": bank(9, 4, unit=False),
    "bank-1x1": bank(1, 1),
    "bank-bare-5x9": Bare(*bank(5, 9)),
    "bank-4x9-one-of-zeros": with_zeros(bank(4, 9), 2),
    "pairs-14-two-of-zeros": with_zeros(pairs(7), 3, 9),
    "rectangular-5x9": rectangular(5, 9, offset=3),
    "rectangular-7x7-raw": rectangular(7, 7, offset=0, unit=False),
    "ranking-7x21": ranking(7),
    "gathered-10x16": gathered(5, 8),
    "gathered-2x12-raw": gathered(1, 6, unit=False),
    "all-excluded-of-pairs": all_excluded(in_batch(4)),
    "all-excluded-of-bank": all_excluded(bank(5, 9)),
    "all-excluded-of-what-is-alike": all_excluded(
        of_pool(in_batch(6, 16), normalize(1 + 0.4 * random_rows(12, 16, seed=0), dim=1))
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@each()
@each_case
def test_equals_dense(case: Case, weighting: Weighting) -> None:
    assert_equals_dense(case, weighting)


@each()
@each_case
def test_log_weights(case: Case, weighting: Weighting) -> None:
    contrast, negative = case.contrast(), case.is_negative()
    got, want = fast_log_weights(contrast, weighting), dense_log_weights(contrast, weighting)
    torch.testing.assert_close(got[negative], want[negative], rtol=1e-12, atol=1e-12)


def test_what_fits(small: dict[str, Any]) -> None:
    assert block_sizes.fits(*[pairs(4).contrast().pool] * 2) == small["kept"]


SIZES = (1, 2, 6, 7, 8, 13, 14, 15, 23)
SHAPES = {
    "ring": ring,
    "pairs": lambda n: pairs(n, 4, temperature=0.5),
    "bank": lambda n: bank(n, 11),
    "wide-bank": lambda n: bank(5, n, temperature=0.5),
    "rectangular": lambda n: rectangular(n, n + 6, offset=2),
    "ranking": ranking,
}


@each("uniform", "undimix", "linear", "harder-half", "followed")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("n", SIZES)
@once
def test_sizes_around_a_block_of_7(n: int, shape: Callable[[int], Case], weighting: Weighting) -> None:
    for kept in (True, False):
        with blocks(kept=kept, rows=7, tile=7):
            assert_equals_dense(shape(n), weighting, info_nce, log_sums)


@each("uniform", "undimix", "linear", "harder-half")
@once
def test_blocks_as_they_come(weighting: Weighting) -> None:
    """More than a tile of them, and of an odd number of pairs, so that a block's positives are of two blocks."""
    with sizes(**SIZES_AS_THEY_ARE):
        assert_equals_dense(pairs(551, 8, temperature=0.5), weighting, info_nce)
    with sizes(**SIZES_AS_THEY_ARE | {"KEPT_BYTES": 0, "LONE_BLOCK_BYTES": 2**20}):
        assert_equals_dense(pairs(551, 8, temperature=0.5), weighting, info_nce)


@each(*OURS)
@pytest.mark.parametrize("name", ["pairs-14", "padded-14", "apart-8-without-some", "bank-9x4-raw", "rectangular-5x9"])
def test_where_a_look_costs(name: str, weighting: Weighting, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device whose values cannot be read without waiting for it: nothing is decided by them."""
    make_every_look_cost(monkeypatch)
    assert_equals_dense(CASES[name], weighting)


class Waits(TorchDispatchMode):
    """Collects operations at which a device's host would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "lift_fresh"):
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


@each(*OURS, "hcl", "hcl-debiased")
@pytest.mark.parametrize("name", ["pairs-14", "bank-9x4-raw", "rectangular-5x9"])
def test_a_device_is_not_waited_for(name: str, weighting: Weighting, monkeypatch: pytest.MonkeyPatch) -> None:
    make_every_look_cost(monkeypatch)
    made, inputs = leaves(CASES[name])
    contrast = made.contrast()
    with Waits() as waits:
        torch.autograd.grad(info_nce(contrast, weighting), inputs)
        torch.autograd.grad(total(log_sums(contrast, weighting)), inputs, allow_unused=True)
    assert not waits.seen


@each("uniform", "undimix", "linear", "hcl", "harder-half")
def test_nothing_outlives_the_call(weighting: Weighting) -> None:
    """No cycle that keeps a batch, and all that its graph holds, until somebody collects cycles."""
    contrast = leaves(CASES["pairs-14"])[0].contrast()
    alive = weakref.ref(contrast)
    gc.disable()
    try:
        value = info_nce(contrast, weighting)
        value.backward()
        del contrast, value
        assert alive() is None
    finally:
        gc.enable()


class Learnt(Weighting):
    """A user's own, with a parameter."""

    def __init__(self) -> None:
        self.steepness = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def log_weights(self, contrast: Contrast, rows: slice) -> Tensor:
        return self.steepness * contrast.logits(rows)


def test_a_weighting_learns_from_frozen_embeddings() -> None:
    contrast, weighting = CASES["pairs-14"].contrast(), Learnt()
    got = torch.autograd.grad(info_nce(contrast, weighting), weighting.steepness)
    want = torch.autograd.grad(dense_info_nce(contrast, weighting), weighting.steepness)
    torch.testing.assert_close(got, want)


@once
def test_a_real_batch_of_concentrated_rows(small: dict[str, Any]) -> None:
    """2000 views whose cosines are .99: float32 keeps its digits, where the plain reference loses them."""
    case = to(spread(pairs(1000, 128, temperature=0.1), together=True, seed=0), torch.float32)
    with sizes(**SIZES_AS_THEY_ARE):
        for weighting in (Uniform(), UnDiMix(), UnDiMix(mixing="linear")):
            want = outcome(precise(case), weighting, dense_info_nce)
            rounded = Outcome(*([part.float() for part in parts] for parts in want))
            assert_same(outcome(case, weighting, info_nce), rounded)


@pytest.mark.parametrize("temperature", [0.0205, 0.0214, 0.0225])
def test_negatives_that_are_all_far(temperature: float) -> None:
    """On the far side: beside the bound of all pairs, their exponentials are 0, or have lost their digits."""
    near = normalize(random_rows(1, 6, seed=0) + 0.02 * random_rows(8, 6, seed=1), dim=1)
    pool = torch.cat([near[:2], -near[2:4], near[4:6], -near[6:]])
    case = to(of_pool(pairs(4, 6, temperature=temperature), pool), torch.float32)
    case = case._replace(excluded=[[(i + 4) % 8] for i in range(8)])
    want = outcome(precise(case), Uniform(), dense_decoupled)
    assert_same(outcome(case, Uniform(), decoupled), Outcome(*([part.float() for part in parts] for parts in want)))


@pytest.mark.parametrize("strengths", [(0, 1, 0), (0, 0, 1), (0, 0.5, 0.5)], ids=str)
def test_linear_weights_that_underflow(strengths: tuple[float, float, float]) -> None:
    """A large logit counts however small its weight. (Rounding alone is 1e-4 here, in the dense reference too.)"""
    case = to(spread(pairs(40, 16, temperature=0.005), together=False, seed=3), torch.float32)
    weighting = UnDiMix(*strengths, hardness=40.0, mixing="linear")
    want, got = outcome(precise(case), weighting, dense_info_nce), outcome(case, weighting, info_nce)
    scale = want.gradients[0].abs().max().item()
    torch.testing.assert_close(got.gradients[0].double(), want.gradients[0], rtol=0, atol=1e-3 * scale)


def spread(case: Case, *, together: bool, seed: int) -> Case:
    """The same with other rows, whose cosines are about 0, or .99 on average."""
    count, width = len(case.pool) if case.anchors is case.pool else sum(map(len, case[:3])), case.pool.shape[1]
    rows = random_rows(count, width, seed=2 * seed)
    if together:
        rows = normalize(random_rows(1, width, seed=2 * seed + 1) + 0.1 * rows, dim=1)
    if case.anchors is case.pool:
        return of_pool(case, rows)
    anchors, positives, pool = rows.split(list(map(len, case[:3])))
    if case.positives_in_pool:
        positives = pool[case.excluded[0][0] :][: len(positives)]
    return case._replace(anchors=anchors, positives=positives, pool=pool)


def precise(case: Case) -> Case:
    """A case of float32 in float64, digit by digit."""
    return to(case, torch.float64)


class TestPrecision:
    """Down to small temperatures, and for concentrated rows."""

    pytestmark: ClassVar[list[pytest.MarkDecorator]] = [
        pytest.mark.parametrize("together", [False, True], ids=["apart", "together"]),
        pytest.mark.parametrize("temperature", [0.5, 0.1, 0.02, 0.01]),
        pytest.mark.parametrize(
            "case", [pairs(12, 16), bank(10, 17, 16), rectangular(9, 19, 5, 16)], ids=["pairs", "bank", "rectangular"]
        ),
    ]

    @each(*OURS, "hcl-debiased", "harder-half")
    def test_equals_dense(self, case: Case, temperature: float, together: bool, weighting: Weighting) -> None:
        case = spread(case._replace(temperature=temperature), together=together, seed=0)
        assert_equals_dense(case, weighting, info_nce, log_sums)
        got, want = fast_log_weights(case.contrast(), weighting), dense_log_weights(case.contrast(), weighting)
        negative = case.is_negative()
        torch.testing.assert_close(got[negative], want[negative], rtol=1e-12, atol=1e-12)

    @each(*OURS)
    def test_float32(self, case: Case, temperature: float, together: bool, weighting: Weighting) -> None:
        """Against the dense reference in float64: closer than its own rounding in float32 where that is much."""
        case = to(spread(case._replace(temperature=temperature), together=together, seed=0), torch.float32)
        for loss in (info_nce, log_sums):
            want = outcome(precise(case), weighting, DENSE[loss])
            rounded = Outcome(*([part.float() for part in parts] for parts in want))
            assert_same(outcome(case, weighting, loss), rounded)

    @each(*OURS)
    @once
    def test_log_weights_in_float32(self, case: Case, temperature: float, together: bool, weighting: Weighting) -> None:
        """An error that is no larger than the dense reference's own, in the median of some batches."""
        errors = []
        for seed in range(9):
            batch = to(spread(case._replace(temperature=temperature), together=together, seed=seed), torch.float32)
            negative = batch.is_negative()
            want = dense_log_weights(precise(batch).contrast(), weighting)
            both = (made(batch.contrast(), weighting) for made in (fast_log_weights, dense_log_weights))
            errors.append([(got - want)[negative].abs().max() for got in both])
        ours, own = torch.tensor(errors).median(dim=0).values.tolist()
        assert ours <= max(1e-5, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each(*OURS)
def test_duplicates(weighting: Weighting, dtype: torch.dtype) -> None:
    """Copies of a label are left out of its task, as in the reference; coincident rows stay finite."""
    pool = random_rows(12, 6, seed=3)
    pool[[4, 7, 9]] = pool[1].clone()
    case = to(of_pool(pairs(6, 6, temperature=0.1), pool), dtype)
    assert_equals_dense(case, weighting, info_nce)
    by_columns = info_nce(of_pool(case, case.pool.T.contiguous().T).contrast(), weighting)
    torch.testing.assert_close(by_columns, info_nce(case.contrast(), weighting))
    same = to(of_pool(pairs(6, 6, temperature=0.01), pool[:1].expand(12, -1).clone()), dtype)
    loss, gradients = outcome(same, weighting, info_nce)
    assert all(part.isfinite().all() for part in (*loss, *gradients))


@each(*OURS)
def test_a_gradient_far_above_the_negatives(weighting: Weighting, monkeypatch: pytest.MonkeyPatch) -> None:
    """One uncertain row among confident ones: for those that exclude it, the others' gradients are what counts."""
    axes = torch.eye(8, dtype=torch.float64)
    pool = torch.cat([axes[:6], axes[:6]])
    pool[5] = axes[0] + 0.97 * axes[1]  # between two, and in nobody's way
    pool[11] = axes[2] + axes[7]
    case = to(of_pool(pairs(6, 8, temperature=0.01), normalize(pool, dim=1)), torch.float32)
    rows = []
    far = Influence._write_far
    monkeypatch.setattr(Influence, "_write_far", lambda self, *of: (rows.append(of), far(self, *of))[1])
    assert_equals_dense(case, weighting, info_nce)
    assert bool(rows) == (getattr(weighting, "influence", 0) != 0)


@pytest.mark.parametrize("hardness", [1e6, 1e30])
@pytest.mark.parametrize("similarity", [0.5, -0.5])
@pytest.mark.parametrize("case", [pairs(7), bank(3, 7), pairs(7, temperature=0.03)], ids=["pairs", "bank", "cold"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_weight_on_one(dtype: torch.dtype, case: Case, similarity: float, hardness: float) -> None:
    """What a logit counts by itself is not lost beside what it counts in so hard a weight."""
    assert_equals_dense(to(case, dtype), UnDiMix(similarity, 0.0, 0.0, hardness=hardness))


@pytest.mark.parametrize("weighting", [Uniform(), ByPlace()], ids=["uniform", "by-place"])
@pytest.mark.parametrize("case", [pairs(4), bank(3, 7), rectangular(5, 9, 3)], ids=["pairs", "bank", "rectangular"])
@pytest.mark.parametrize("loss", [info_nce, decoupled, log_sums], ids=["info_nce", "decoupled", "log_sums"])
def test_gradcheck(case: Case, weighting: Weighting, loss: Loss) -> None:
    made, inputs = leaves(case)

    def run(*rows: Tensor) -> Tensor:
        anchors, positives, pool = rows if len(rows) == 3 else (rows[0], rows[1], rows[0])
        return total(loss(made._replace(anchors=anchors, positives=positives, pool=pool).contrast(), weighting))

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("loss", [info_nce, decoupled, log_sums], ids=["info_nce", "decoupled", "log_sums"])
@each("uniform", "undimix")
def test_backward(loss: Loss, weighting: Weighting) -> None:
    """It can be asked again, not twice over; a result outlives the next one, which uses the same memory."""
    made, inputs = leaves(pairs(9))
    value = total(loss(made.contrast(), weighting))
    first = torch.autograd.grad(value, inputs, retain_graph=True)
    outcome(pairs(11), weighting, loss)
    with torch.inference_mode():
        loss(pairs(20).contrast(), weighting)
    assert all(map(torch.equal, first, torch.autograd.grad(value, inputs)))
    again = torch.autograd.grad(total(loss(made.contrast(), weighting)), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(again[0].sum(), inputs)


@pytest.mark.parametrize("loss", [info_nce, log_sums], ids=["info_nce", "log_sums"])
@each("uniform", "undimix", "hcl")
@pytest.mark.parametrize("name", ["pairs-14", "bank-9x4-raw", "rectangular-5x9"])
def test_only_the_gradients_asked_for(name: str, loss: Loss, weighting: Weighting) -> None:
    case = CASES[name]
    _, all_of_them = outcome(case, weighting, loss)
    made, inputs = leaves(case)
    for asked, gradient in enumerate(all_of_them):
        for place, rows in enumerate(inputs):
            rows.requires_grad_(place == asked)
        value = total(loss(made.contrast(), weighting))
        if value.requires_grad:
            got = torch.autograd.grad(value, inputs[asked])[0]
            torch.testing.assert_close(got, gradient, rtol=0, atol=1e-12 * gradient.abs().max().item())
        else:
            assert loss is log_sums
            assert not gradient.any()
    with torch.no_grad():
        without = total(loss(made.contrast(), weighting))
    assert not without.requires_grad
    torch.testing.assert_close(without, value.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", [info_nce, log_sums], ids=["info_nce", "log_sums"])
@each("uniform", "undimix", "linear", "harder-half")
def test_autocast(loss: Loss, weighting: Weighting) -> None:
    """The numbers of full precision, backward too, wherever autocast begins and ends."""
    case = to(pairs(7, temperature=0.05), torch.float32)
    want = outcome(case, weighting, loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = outcome(case, weighting, loss)
    made, inputs = leaves(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = total(loss(made.contrast(), weighting))
    for got in (inside.gradients, torch.autograd.grad(value, inputs)):
        assert all(map(torch.equal, got, want.gradients))
    reference = outcome(case, weighting, DENSE[loss])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = weighted_log_sum(made.contrast(), weighting, weighting.prepare(made.contrast()), slice(0, 14))
    if loss is log_sums:
        assert torch.equal(plain, reference.values[1])


@each("uniform", "undimix", "hcl")
def test_threads(weighting: Weighting) -> None:
    """Losses at work at the same time have memory of their own."""
    cases = [pairs(count, 8, temperature=0.1) for count in (40, 41, 60)] * 8
    want = [outcome(case, weighting, info_nce) for case in cases]
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(lambda case: outcome(case, weighting, info_nce), cases))
    for ours, alone in zip(got, want, strict=True):
        assert_same(ours, alone)


@st.composite
def batches(draw: st.DrawFn) -> Case:
    """Any small contrast, some rows of it the same, some columns excluded."""
    n, m, width = draw(st.integers(1, 7)), draw(st.integers(1, 9)), draw(st.integers(1, 5))
    seed, unit = draw(st.integers(0, 99)), draw(st.booleans())
    of_itself = draw(st.booleans())
    m = n if of_itself else m
    anchors, positives, pool = random_rows(2 * n + m, width, seed, unit=unit).split([n, n, m])
    pool = pool[draw(st.lists(st.integers(0, m - 1), min_size=m, max_size=m))] if draw(st.booleans()) else pool.clone()
    own_columns = list(range(n)) if of_itself else draw(st.lists(st.integers(-1, m - 1), min_size=n, max_size=n))
    excluded = draw(st.lists(st.lists(st.integers(0, m - 1), max_size=3, unique=True), min_size=n, max_size=n))
    temperature, in_pool = draw(st.sampled_from([0.05, 0.2, 1.0])), draw(st.booleans()) or of_itself
    inputs = random_rows(n + m, 3, seed + 100)
    anchor_inputs, pool_inputs = (inputs[n:], inputs[n:]) if of_itself else (inputs[:n], inputs[n:])
    rows = (pool if of_itself else anchors), positives, pool
    return Case(*rows, temperature, own_columns, excluded, in_pool, anchor_inputs, pool_inputs)


@given(case=batches(), rows=st.integers(1, 4), tile=st.integers(1, 5), kept=st.booleans(), weighting=st.data())
@once
def test_any_contrast(case: Case, rows: int, tile: int, kept: bool, weighting: st.DataObject) -> None:
    with blocks(kept=kept, rows=rows, tile=tile):
        assert_equals_dense(case, weighting.draw(st.sampled_from(list(OURS.values()))), info_nce, log_sums)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation made."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else [result]:
            if isinstance(part, Tensor):
                self.size = max(self.size, part.untyped_storage().nbytes() // part.element_size())
        return result


@pytest.mark.parametrize("loss", [info_nce, log_sums], ids=["info_nce", "log_sums"])
@each("uniform", "undimix", "linear", "hcl", "harder-half", "followed")
@once
def test_memory_is_linear(loss: Loss, weighting: Weighting, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is never held whole, neither forward nor backward."""
    for name, value in {"KEPT_BYTES": 0, "LEAST_ROWS": 16, "LONE_BLOCK_BYTES": 1}.items():
        monkeypatch.setattr(block_sizes, name, value)
    Workspace.spare.clear()
    with Largest() as largest:
        outcome(pairs(400), weighting, loss)
    assert largest.size < 800 * 800 / 8


@pytest.mark.parametrize(("rows", "most"), [(99, 2), (3, 9)], ids=["one-block", "four-blocks"])
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("costly", [False, True], ids=["free", "every-look-costs"])
def test_a_mask_is_asked_for_seldom(
    rows: int, most: int, distance: str, costly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a guide model's, or compare texts: once to count, once for the largest bounds, once to write."""
    if costly:
        make_every_look_cost(monkeypatch)
    asked: list[slice] = []

    def mask(block: slice) -> Tensor:
        asked.append(block)
        return torch.eye(12, dtype=torch.bool)[block]

    views = random_rows(12, 8, seed=1).chunk(2)
    contrast = two_views(*views, 0.5, excluded_mask=mask)
    with blocks(kept=True, rows=rows):
        info_nce(contrast, UnDiMix(distance=distance))
    assert 0 < len(asked) <= most
