"""The fast path against the plain reference: the same loss, gradients and log-weights, in blocks of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cases import Case, bank, in_batch, random_rows, rectangular
from undimix_plugins import (
    HCL,
    Contrast,
    UnDiMix,
    Uniform,
    Weighting,
    decoupled,
    info_nce,
    log_sums,
    tiled,
    weighted_log_sum,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@contextmanager
def blocks(*, kept: bool, rows: int = 3, tile: int = 4) -> Iterator[None]:
    """Blocks so small that a few rows are many, their scores kept or not."""
    with pytest.MonkeyPatch.context() as patch:
        if not kept:
            patch.setattr(tiled, "KEPT_BYTES", 0)
        for name, value in {"BLOCK_BYTES": 1, "LONE_BLOCK_BYTES": 1, "LEAST_ROWS": rows, "TILE": tile}.items():
            patch.setattr(tiled, name, value)
        yield


SMALL = {"kept": {"kept": True}, "kept-2-of-tile-5": {"kept": True, "rows": 2, "tile": 5}, "by-block": {"kept": False}}


@pytest.fixture(params=SMALL.values(), ids=SMALL, autouse=True)
def small(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    with blocks(**request.param):
        yield request.param


def tiled_log_weights(contrast: Contrast, weighting: Weighting) -> Tensor:
    """The log-weights [n, m] that the fast path works with: its scores less the logits. The only look inside."""
    n, m = len(contrast.anchors), len(contrast.pool)
    parts = []
    with torch.no_grad(), tiled.Numerators.workspace(contrast) as memory:
        out = contrast.pool.new_empty(n, m) if tiled.fits(contrast) else None
        work = tiled.Numerators(contrast, weighting, tiled.prepare(contrast, weighting), out, memory)
        for rows in work.logits.blocks:
            count = rows.stop - rows.start
            logits = work.logits.block(rows, contrast.pool.new_empty(count, m)).clone()
            scores = work.scorer(rows, logits.clone(), torch.empty_like(logits)) - logits
            if isinstance(work.scorer, tiled.UnDiMixScores):
                scores -= work.scorer.log_mean(rows)
            parts.append(scores / tiled.LOG2E)
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
        return Contrast(
            self.anchors,
            self.positives,
            self.pool,
            torch.tensor(self.excluded),
            self.temperature,
            itself=None if self.anchors is self.pool else torch.tensor(self.itself),
            positives_in_pool=self.positives_in_pool,
            anchor_inputs=self.anchor_inputs,
            pool_inputs=self.pool_inputs,
        )


class Apart(Case):
    """The anchors are the pool, and their own columns are named: the positives are of another kind."""

    def contrast(self) -> Contrast:
        itself = torch.tensor(self.itself)
        rows = self.anchors, self.positives, self.pool
        inputs = {"anchor_inputs": self.anchor_inputs, "pool_inputs": self.pool_inputs}
        return Contrast(*rows, None, self.temperature, itself=itself, positives_in_pool=False, **inputs)


def pairs(count: int, width: int = 5, **options: Any) -> Case:
    return Tight(*in_batch(count, width, **options))


def ring(n: int, width: int = 5, **options: Any) -> Case:
    """One batch with itself of any size, an anchor's positive being the next row."""
    case = in_batch(n, width, **options)
    views, inputs, following = case.pool[:n].clone(), random_rows(n, 3, seed=1), [(i + 1) % n for i in range(n)]
    excluded, itself = [[j] for j in following], list(range(n))
    return Case(views, views[following], views, case.temperature, itself, excluded, True, inputs, inputs.clone())


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


def to(case: Case, dtype: torch.dtype) -> Case:
    anchors, positives, pool = (part.to(dtype) for part in (case.anchors, case.positives, case.pool))
    return case._replace(anchors=pool if case.anchors is case.pool else anchors, positives=positives, pool=pool)


def concentrated(count: int, width: int) -> Tensor:
    """Rows whose cosines are .99 on average."""
    return normalize(random_rows(1, width, seed=5) + 0.1 * random_rows(count, width, seed=6), dim=1)


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


EVERY_WAY = ("uniform", "undimix", "linear", "hcl", "hcl-debiased", "harder-half")  # a path through the code each
once = pytest.mark.parametrize("small", [SMALL["kept"]], ids=["kept"], indirect=True)

CASES = {
    "pairs-4": pairs(2, temperature=0.1),
    "pairs-14": pairs(7, 3, temperature=0.2),
    "pairs-18-raw": pairs(9, unit=False),
    "pairs-16-of-all-lengths": of_pool(
        pairs(8), random_rows(16, 5, seed=0) * torch.logspace(-1, 1, 16, dtype=torch.float64)[:, None]
    ),
    "pairs-2": pairs(1),
    "pairs-10-width-1": pairs(5, 1, unit=False),
    "pairs-6-wide": pairs(3, 40),
    "padded-14": in_batch(7, 3, temperature=0.2),
    "apart-8": Apart(*in_batch(4)),
    "apart-8-without-some": Apart(*in_batch(4))._replace(itself=[0, -1, 2, 3, -1, 5, 6, 7]),
    "bank-3x8": bank(3, 8, temperature=0.1),
    "bank-9x4-raw": bank(9, 4, unit=False),
    "bank-1x1": bank(1, 1),
    "rectangular-5x9": rectangular(5, 9, offset=3),
    "rectangular-7x7-raw": rectangular(7, 7, offset=0, unit=False),
    "ranking-7x21": ranking(7),
    "all-excluded-of-pairs": all_excluded(in_batch(4)),
    "all-excluded-of-bank": all_excluded(bank(5, 9)),
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
    got, want = tiled_log_weights(contrast, weighting), dense_log_weights(contrast, weighting)
    torch.testing.assert_close(got[negative], want[negative], rtol=1e-12, atol=1e-12)


def test_what_fits(small: dict[str, Any]) -> None:
    assert tiled.fits(pairs(4).contrast()) == small["kept"]


SIZES = (1, 2, 6, 7, 8, 13, 14, 15, 23)
SHAPES = {
    "ring": ring,
    "pairs": lambda n: pairs(n, 4, temperature=0.1),
    "bank": lambda n: bank(n, 11),
    "wide-bank": lambda n: bank(5, n, temperature=0.1),
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
    """An odd number of pairs, so that a block's positives are of two blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.undo()
    case = pairs(551, 8, temperature=0.1)
    assert_equals_dense(case, weighting, info_nce)


TEMPERATURES = (0.5, 0.1, 0.02, 0.01)
SPREADS = {
    "pairs": pairs(12, 16),
    "pairs-concentrated": of_pool(pairs(12, 16), concentrated(24, 16)),
    "bank": bank(10, 17, 16),
    "bank-concentrated": bank(10, 17, 16)._replace(
        **dict(zip(("anchors", "positives", "pool"), concentrated(37, 16).split([10, 10, 17]), strict=True))
    ),
    "rectangular": rectangular(9, 19, 5, 16),
}
each_spread = pytest.mark.parametrize("case", SPREADS.values(), ids=SPREADS)
each_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)


def str_of_shape(case: Case) -> str:
    return "x".join(str(len(rows)) for rows in (case.anchors, case.pool))


class TestPrecision:
    @each(*OURS, "hcl-debiased", "harder-half")
    @each_spread
    @each_temperature
    def test_equals_dense(self, case: Case, temperature: float, weighting: Weighting) -> None:
        assert_equals_dense(case._replace(temperature=temperature), weighting, info_nce, log_sums)

    @each(*OURS, "hcl-debiased", "harder-half")
    @pytest.mark.parametrize("case", [SPREADS["pairs"], SPREADS["bank"], SPREADS["rectangular"]], ids=str_of_shape)
    @each_temperature
    def test_equals_dense_in_float32(self, case: Case, temperature: float, weighting: Weighting) -> None:
        assert_equals_dense(to(case._replace(temperature=temperature), torch.float32), weighting, info_nce, log_sums)

    @each(*OURS)
    @each_spread
    @each_temperature
    def test_log_weights(self, case: Case, temperature: float, weighting: Weighting) -> None:
        case, negative = case._replace(temperature=temperature), case.is_negative()
        got, want = tiled_log_weights(case.contrast(), weighting), dense_log_weights(case.contrast(), weighting)
        torch.testing.assert_close(got[negative], want[negative], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each(*OURS)
def test_duplicates(weighting: Weighting, dtype: torch.dtype) -> None:
    """Copies of a label are left out of its task, as in the reference; coincident rows stay finite."""
    pool = random_rows(12, 6, seed=3)
    pool[[4, 7, 9]] = pool[1].clone()
    assert_equals_dense(to(of_pool(pairs(6, 6, temperature=0.1), pool), dtype), weighting, info_nce)
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
    far = tiled.UnDiMixScores._write_far
    monkeypatch.setattr(tiled.UnDiMixScores, "_write_far", lambda self, *of: (rows.append(of), far(self, *of)))
    assert_equals_dense(case, weighting, info_nce)
    assert bool(rows) == (getattr(weighting, "influence", 0) != 0)


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
def test_memory_is_linear(loss: Loss, weighting: Weighting, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is never held whole, neither forward nor backward."""
    for name, value in {"KEPT_BYTES": 0, "LEAST_ROWS": 16, "LONE_BLOCK_BYTES": 1}.items():
        monkeypatch.setattr(tiled, name, value)
    tiled.Workspace.spare.clear()
    with Largest() as largest:
        outcome(pairs(700), weighting, loss)
    assert largest.size < 1400 * 1400 / 8
