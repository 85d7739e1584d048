"""What is said of the negatives, against slow loops over anchors and negatives; who sees what is compared."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import pstdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from tests import references
from tests.contrasts import Case, bank, in_batch, random_rows, rectangular
from undimix_plugins import (
    BCL,
    HCL,
    Contrast,
    Ring,
    UnDiMix,
    Uniform,
    Weighting,
    compose,
    decoupled,
    info_nce,
    negative_statistics,
    two_views,
    watch,
)
from undimix_plugins.monitoring import statistics
from undimix_plugins.monitoring.statistics import mean_statistics
from undimix_plugins.plan import OBSERVERS
from undimix_plugins.toolkit import GatheredPool, log_sums, mean_loss

CASES = {
    "in-batch-6": in_batch(3),
    "in-batch-10-raw": in_batch(5, 3, temperature=0.2, unit=False),
    "bank-3x7": bank(3, 7, temperature=0.2),
    "bank-5x4-raw": bank(5, 4, unit=False),
    "rectangular-4x9": rectangular(4, 9, offset=3, temperature=0.2),
    "spread-4x9": rectangular(4, 9, offset=2, temperature=0.05),
    "one-has-none": bank(3, 4)._replace(excluded=[[], [3, 0, 2, 1], [2]]),
}
WEIGHTINGS = {
    "UnDiMix": UnDiMix(hardness=1.5),
    "linear-weight": UnDiMix(mixing="linear", gradient="weight"),
    "no-influence": UnDiMix(influence=0.0, distance="euclidean"),
    "Uniform": Uniform(),
    "HCL": HCL(beta=2.0),
}


def weights_of(case: Case, weighting: Weighting, i: int) -> list[float]:
    """Of an anchor's negatives, in any unit."""
    negatives = case.negatives(i)
    if isinstance(weighting, UnDiMix):
        return references.log_weights(case, weighting)[i, negatives].exp().tolist()
    beta = weighting.beta if isinstance(weighting, HCL) else 0.0
    return [math.exp(beta * (case.anchors[i] @ case.pool[j]).item() / case.temperature) for j in negatives]


def correlation(one: list[float], other: list[float]) -> float:
    means = sum(one) / len(one), sum(other) / len(other)
    both = sum((x - means[0]) * (y - means[1]) for x, y in zip(one, other, strict=True))
    squares = sum((x - means[0]) ** 2 for x in one) * sum((y - means[1]) ** 2 for y in other)
    return both / math.sqrt(squares)


def expected(case: Case, weighting: Weighting, anchors: int, labels: list[int] | None) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    if isinstance(weighting, (UnDiMix, HCL)):
        found["hardness"] = [weighting.hardness if isinstance(weighting, UnDiMix) else weighting.beta]
    similarity, influence, diversity = (
        scores(case)  # type: ignore[operator]
        for scores in (
            lambda case: references.similarity(case.anchors, case.pool),
            references.influence,
            lambda case: references.diversity(case, "cosine"),
        )
    )
    for i in range(min(anchors, len(case.anchors))):
        candidates = [case.pool[j] for j in range(len(case.pool)) if j != case.own_columns[i]]
        candidates += [] if case.positives_in_pool else [case.positives[i]]
        gradient = references.last_layer_gradient(case.anchors[i], torch.stack(candidates), case.temperature)
        found.setdefault("gradient_norm", []).append(math.hypot(*gradient.tolist()))
        negatives = case.negatives(i)
        if not negatives:
            continue
        weights = weights_of(case, weighting, i)
        found.setdefault("count", []).append(len(negatives))
        if isinstance(weighting, UnDiMix) and weighting.mixing == "geometric":
            spread = pstdev([similarity[i, j].item() / case.temperature for j in negatives])
            found.setdefault("hardness_in_force", []).append(weighting.hardness * references.share(spread))
        found.setdefault("effective_number", []).append(sum(weights) ** 2 / sum(w * w for w in weights))
        nearest = sorted(range(len(negatives)), key=lambda k: -similarity[i, negatives[k]].item())
        hardest = nearest[: math.ceil(len(negatives) / 100)]
        found.setdefault("weight_on_hardest", []).append(sum(weights[k] for k in hardest) / sum(weights))
        pairs = {
            "similarity_influence": (similarity, influence),
            "similarity_diversity": (similarity, diversity),
            "influence_diversity": (influence, diversity),
        }
        for name, (one, other) in pairs.items():
            scores = one[i, negatives].tolist(), other[i, negatives].tolist()
            if all(max(values) - min(values) > 1e-12 for values in scores):
                found.setdefault(name, []).append(correlation(*scores))
        if labels is not None:
            same = [labels[i % len(labels)] == labels[j % len(labels)] for j in negatives]
            found.setdefault("false_negatives", []).append(sum(same) / len(negatives))
            wrong = sum(weight for weight, false in zip(weights, same, strict=True) if false)
            found.setdefault("weight_on_false_negatives", []).append(wrong / sum(weights))
    return {name: sum(values) / len(values) for name, values in found.items()}


def same(one: dict[str, float], other: dict[str, float], tolerance: float = 1e-10) -> bool:
    return one == pytest.approx(other, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_loops(case: Case, weighting: Weighting) -> None:
    samples = len(case.anchors) // 2 if case.anchors is case.pool else None
    labels = None if samples is None else [j % 3 for j in range(samples)]
    got = negative_statistics(case.contrast(), weighting, labels=None if labels is None else torch.tensor(labels))
    assert same(got, expected(case, weighting, 128, labels))
    assert {type(value) for value in got.values()} == {float}


@pytest.mark.parametrize(("entries", "hardest"), [(1, 1), (100, 1), (101, 2), (200, 2), (350, 4)])
def test_the_hardest_hundredth_is_rounded_up(entries: int, hardest: int) -> None:
    case = bank(3, entries)
    plain = negative_statistics(case.contrast(), Uniform())
    assert plain["weight_on_hardest"] == pytest.approx(hardest / entries, abs=1e-12)
    shares = []
    for i in range(3):
        weights = sorted(weights_of(case, HCL(beta=2.0), i))
        shares.append(sum(weights[-hardest:]) / sum(weights))
    weighted = negative_statistics(case.contrast(), HCL(beta=2.0))
    assert weighted["weight_on_hardest"] == pytest.approx(sum(shares) / 3, abs=1e-10)


@pytest.mark.parametrize("most", [1, 4, 100])
def test_the_first_anchors(most: int) -> None:
    case, labels = rectangular(6, 9, offset=2), [0, 1, 0]
    got = negative_statistics(case.contrast(), UnDiMix(), labels=torch.tensor(labels), most_anchors=most)
    assert same(got, expected(case, UnDiMix(), most, labels))


def test_by_default_so_few_that_it_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(300, 4, seed=0)
    for pairs, most in ((2**20, 128), (3000, 11), (7, 1)):
        monkeypatch.setattr(statistics, "MOST_PAIRS", pairs)
        contrast = Contrast.of(rows, rows.flip(0), rows.clone(), None, 0.5)
        whole = negative_statistics(contrast, Uniform(), most_anchors=most)
        assert negative_statistics(contrast, Uniform()) == whole


def test_labels_of_whole_columns_of_the_batch() -> None:
    """A query's candidates are all documents, then all hard negatives; a SimCLR view's all first views, then second."""
    labels = torch.tensor([7, 7, 3, 5])
    queries, docs, hard = random_rows(12, 5, seed=0).split(4)
    own = torch.arange(4)[:, None]
    contrasts = {
        "two columns": Contrast.of(queries, docs, torch.cat([docs, hard]), own, 0.5, positives_in_pool=True),
        "views": two_views(queries, docs, 0.5),
        "queries": Contrast.of(queries, docs, queries, None, 0.5, own_columns=own[:, 0]),
    }
    false = {
        # An own hard negative is taken for one of the class, beside the other's two documents.
        "two columns": [3 / 7, 3 / 7, 1 / 7, 1 / 7],
        "views": [2 / 6, 2 / 6, 0, 0] * 2,
        "queries": [1 / 3, 1 / 3, 0, 0],
    }
    for name, contrast in contrasts.items():
        got = negative_statistics(contrast, Uniform(), labels=labels)
        rate = sum(false[name]) / len(false[name])
        assert got["false_negatives"] == pytest.approx(rate, abs=1e-12)
        assert got["weight_on_false_negatives"] == pytest.approx(rate, abs=1e-12)
        strings = negative_statistics(contrast, UnDiMix(), labels=labels.double())
        assert same(strings, negative_statistics(contrast, UnDiMix(), labels=labels))


def test_labels_that_are_not_of_the_pool() -> None:
    memory = bank(4, 12).contrast()
    no_itself = Contrast.of(memory.anchors, memory.positives, memory.pool, None, 0.5)
    for contrast in (memory, no_itself):
        with pytest.raises(ValueError, match=r"^labels: expected none, .*, got some with a memory bank"):
            negative_statistics(contrast, UnDiMix(), labels=torch.arange(4))


def test_a_pool_of_all_processes() -> None:
    """The tasks of its rows come from all processes; whose samples they are is not known."""
    case = rectangular(4, 9, offset=3)
    alone = case.contrast()
    gathered = GatheredPool(lambda: case.anchors, torch.tensor(case.own_columns), torch.arange(9), lambda rows: rows)
    contrast = replace(alone, gathered=gathered)
    for weighting in WEIGHTINGS.values():
        got = negative_statistics(contrast, weighting)
        assert same(got, negative_statistics(alone, weighting))
        with pytest.raises(ValueError, match=r"^labels: .*, got some with the batches of all processes$"):
            negative_statistics(contrast, weighting, labels=torch.arange(4))
    halved = replace(gathered, anchors=lambda: case.anchors[:2], own_columns=torch.tensor(case.own_columns[:2]))
    assert not same(negative_statistics(replace(alone, gathered=halved), UnDiMix()), got)


ONE_EACH = (
    r"labels: expected one for each sample of the batch, whose number divides those of the anchors \(8\) and of the "
    r"pool \(8\), got"
)
BAD = {
    "too-many": (torch.arange(6), rf"{ONE_EACH} 6$"),
    "of-both-views": (
        torch.arange(16),
        rf"{ONE_EACH} 16; two views of a sample have one label: labels\[::2\] if they are adjacent rows$",
    ),
    "none": (torch.arange(0), r"labels: expected one for each sample.*, got 0"),
    "matrix": (torch.zeros(4, 2), r"labels: expected a label for each sample, of shape \[samples\], got \[4, 2\]"),
    "list": ([0, 1, 2, 3], r"labels: expected a label for each sample, of shape \[samples\], got list"),
}


@pytest.mark.parametrize(("labels", "message"), BAD.values(), ids=BAD)
def test_refuses_labels(labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        negative_statistics(in_batch(4).contrast(), UnDiMix(), labels=labels)


def test_refuses() -> None:
    contrast = in_batch(4).contrast()
    for most in (0, -1, math.nan):
        with pytest.raises(ValueError, match=r"^most_anchors: expected a finite number at least 1"):
            negative_statistics(contrast, UnDiMix(), most_anchors=most)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^weighting: expected an instance of Weighting"):
        negative_statistics(contrast, UnDiMix)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^contrast: expected a Contrast, got Tensor"):
        negative_statistics(contrast.pool, UnDiMix())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradient='weight' needs the last layer's inputs"):
        negative_statistics(two_views(contrast.pool, contrast.pool, 0.5), UnDiMix(gradient="weight"))


def test_what_has_no_value_is_left_out() -> None:
    one_pair = two_views(*random_rows(2, 4, seed=0).split(1), 0.5)
    assert negative_statistics(one_pair, UnDiMix(), labels=torch.tensor([0])) == {
        "hardness": 1.0,
        "gradient_norm": 0.0,
    }
    alike = normalize(torch.ones(8, 4, dtype=torch.double), dim=1)
    got = negative_statistics(two_views(alike, alike, 0.5), UnDiMix())
    assert got == pytest.approx(
        {"hardness": 1, "hardness_in_force": 1, "count": 14, "effective_number": 14}
        | {"weight_on_hardest": 1 / 14, "gradient_norm": 0.0},
        abs=1e-12,
    )


class NoWeight(Weighting):
    def log_weights(self, contrast: Contrast, rows: slice) -> Tensor:
        weights = torch.zeros_like(contrast.logits(rows))
        weights[0] = -torch.inf
        return weights


def test_an_anchor_whose_negatives_have_no_weight() -> None:
    contrast = in_batch(4).contrast()
    got = negative_statistics(contrast, NoWeight(), labels=torch.arange(4))
    assert got["effective_number"] == got["count"] == pytest.approx(6)
    assert got["weight_on_hardest"] == pytest.approx(1 / 6)
    assert negative_statistics(contrast, NoWeight(), most_anchors=1).keys() == {
        "similarity_influence",
        "similarity_diversity",
        "influence_diversity",
        "gradient_norm",
    }


@given(
    seed=st.integers(0, 1000),
    pairs=st.integers(2, 20),
    temperature=st.floats(0.02, 5),
    hardness=st.floats(0, 50),
    mixing=st.sampled_from(["geometric", "linear"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_ranges(seed: int, pairs: int, temperature: float, hardness: float, mixing: str, dtype: torch.dtype) -> None:
    views = random_rows(2 * pairs, 6, seed, dtype=dtype)
    contrast = two_views(*views.split(pairs), temperature)
    labels = torch.arange(pairs) % 3
    got = negative_statistics(contrast, UnDiMix(hardness=hardness, mixing=mixing), labels=labels)
    slack = 1e-4
    assert got["count"] == 2 * pairs - 2
    assert 1 - slack <= got["effective_number"] <= got["count"] * (1 + slack)
    for name in ("weight_on_hardest", "false_negatives", "weight_on_false_negatives"):
        assert 0 <= got[name] <= 1 + slack
    for name in ("similarity_influence", "similarity_diversity", "influence_diversity"):
        assert abs(got.get(name, 0)) <= 1 + slack
    assert 0 <= got["gradient_norm"] <= 2 / temperature * (1 + slack)  # probabilities times chords of the sphere
    assert all(map(math.isfinite, got.values()))


@given(seed=st.integers(0, 1000), temperature=st.floats(0.05, 2))
def test_what_no_unit_changes(seed: int, temperature: float) -> None:
    """A rotation, or the order of the samples, changes nothing."""
    views, labels = random_rows(12, 5, seed), torch.arange(6) % 2
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(random_rows(5, 5, seed + 1)).Q
    first, second = views.split(6)
    whole = negative_statistics(two_views(first, second, temperature), UnDiMix(), labels=labels)
    turned = two_views(first @ rotation, second @ rotation, temperature)
    assert same(negative_statistics(turned, UnDiMix(), labels=labels), whole, 1e-6)
    shuffled = two_views(first[order], second[order], temperature)
    assert same(negative_statistics(shuffled, UnDiMix(), labels=labels[order]), whole, 1e-6)


def test_float32_and_autocast() -> None:
    views = random_rows(24, 8, seed=0)
    whole = negative_statistics(two_views(*views.split(12), 0.2), UnDiMix())
    contrast = two_views(*views.float().split(12), 0.2)
    assert same(negative_statistics(contrast, UnDiMix()), whole, 1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(negative_statistics(contrast, UnDiMix()), whole, 1e-4)


def test_a_learned_temperature() -> None:
    views = random_rows(12, 4, seed=0)
    temperature = torch.tensor(0.3, dtype=torch.double, requires_grad=True)
    learned = negative_statistics(two_views(*views.split(6), temperature), HCL())
    assert same(learned, negative_statistics(two_views(*views.split(6), 0.3), HCL()), 1e-10)


LOSSES = {
    "info_nce": info_nce,
    "decoupled": decoupled,
    "log_sums": lambda *compared: log_sums(*compared).negatives.sum(),
    "mean_loss": lambda *compared: mean_loss(*compared, lambda margin: (margin.square(), 2 * margin)),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("weighting", [UnDiMix(), HCL()], ids=str)
def test_watching_sees_all_and_changes_nothing(loss: object, weighting: Weighting) -> None:
    views = random_rows(12, 4, seed=0).requires_grad_()

    def step() -> Tensor:
        value = loss(two_views(*views.split(6), 0.5), weighting)  # type: ignore[operator]
        return torch.stack([value, *torch.autograd.grad(value, views)[0].flatten()]).detach()

    seen: list[tuple[Contrast, Weighting]] = []
    numbers: list[dict[str, float]] = []
    unseen = step()
    with watch(lambda *compared: seen.append(compared)):
        assert torch.equal(step(), unseen)
        with watch(lambda *compared: numbers.append(negative_statistics(*compared))):
            assert torch.equal(step(), unseen)
    assert torch.equal(step(), unseen)
    assert (len(seen), len(numbers)) == (2, 1)

    contrast, shown = seen[0]
    assert shown is weighting
    assert contrast.is_own_pool
    assert torch.equal(contrast.pool, views.detach())
    tensors = [value for value in vars(contrast).values() if isinstance(value, Tensor)]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert same(numbers[0], negative_statistics(two_views(*views.detach().split(6), 0.5), weighting))


def test_watching_ends_with_an_error() -> None:
    def fail(*compared: object) -> None:
        raise RuntimeError("seen")

    contrast = in_batch(4).contrast()
    with pytest.raises(RuntimeError, match="seen"), watch(fail):
        info_nce(contrast, Uniform())
    assert OBSERVERS.values() == []
    info_nce(contrast, Uniform())


def test_a_compiled_loss_is_not_watched_nor_broken() -> None:
    weighting = UnDiMix()
    compiled = torch.compile(lambda a, b: info_nce(two_views(a, b, 0.5), weighting), fullgraph=True, backend="eager")
    views = random_rows(12, 4, seed=0).split(6)
    seen: list[object] = []
    plain = compiled(*views)
    with watch(lambda *compared: seen.append(compared)), torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(*views), plain)
    assert seen == []


def test_the_mean_over_several_contrasts() -> None:
    assert mean_statistics([]) == {}
    assert mean_statistics([{"a": 1.0, "b": 2.0}, {"a": 3.0}]) == {"a": 2.0, "b": 2.0}


@pytest.mark.parametrize(
    ("weighting", "hardness"),
    [
        (UnDiMix(hardness=2.0).softened(0.25), 0.5),
        (HCL(beta=2.0).softened(0.25), 0.5),
        (BCL(beta=0.75), 0.75),
        (BCL().softened(0.25), 0.25),
        (compose(Ring(), UnDiMix(hardness=2.0)), 2.0),
        (Ring(), None),
        (Uniform(), None),
    ],
    ids=repr,
)
def test_the_hardness_in_force(weighting: Weighting, hardness: float | None) -> None:
    assert negative_statistics(in_batch(6).contrast(), weighting).get("hardness") == hardness


def test_labels_are_refused_where_rows_are_parts_of_samples() -> None:
    """Several positives: regions of images, nodes of graphs, of which row j is not sample j % b."""
    rows = torch.randn(8, 4)
    contrast = Contrast.of(rows[:4], torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]]), rows, None, 0.5)
    with pytest.raises(ValueError, match=r"^labels: .*, got some with several positives"):
        negative_statistics(contrast, UnDiMix(), labels=torch.arange(4) % 2)
