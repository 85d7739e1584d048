"""The three scores against loops and autograd, and what float32 keeps of them at low temperatures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests import references
from tests.contrasts import Case, bank, in_batch, random_rows, rectangular
from undimix_plugins import blocks as block_sizes
from undimix_plugins import components
from undimix_plugins.components import anchor_similarity, diversity, influence

EXACT = {"rtol": 1e-10, "atol": 1e-10}

CASES = {
    "in-batch-4": in_batch(2),
    "in-batch-14": in_batch(7, 3, temperature=0.2),
    "in-batch-raw": in_batch(5, unit=False),
    "bank-3x8": bank(3, 8, temperature=0.2),
    "bank-9x4-raw": bank(9, 4, unit=False),
    "bank-1x5": bank(1, 5),
    "rectangular-5x9": rectangular(5, 9, offset=3),
    "rectangular-7x7-raw": rectangular(7, 7, offset=0, unit=False),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@each_case
def test_anchor_similarity(case: Case) -> None:
    expected = references.similarity(case.anchors, case.pool)
    torch.testing.assert_close(anchor_similarity(case.anchors, case.pool), expected, **EXACT)


@pytest.mark.parametrize("at_weight", [False, True], ids=["embedding", "weight"])
@each_case
def test_influence(case: Case, at_weight: bool) -> None:
    one_batch = case.anchors is case.pool
    result = influence(
        case.anchors,
        case.pool,
        temperature=case.temperature,
        own_columns=None if one_batch else torch.tensor(case.own_columns),
        positives=None if case.positives_in_pool else case.positives,
        anchor_inputs=case.anchor_inputs if at_weight else None,
        pool_inputs=case.pool_inputs if at_weight else None,
    )
    torch.testing.assert_close(result, references.influence(case, at_weight=at_weight), **EXACT)


def test_influence_of_anchors_that_are_not_in_the_pool() -> None:
    """Without `own_columns`, equal tensors that are not the same object are anchors and a pool of others."""
    z = random_rows(5, 4, seed=0)
    nobody = Case(z, z, z, 0.5, [-1] * 5, [[]] * 5, True)
    torch.testing.assert_close(influence(z, z.clone(), temperature=0.5), references.influence(nobody), **EXACT)


def test_influence_of_one_batch_with_columns_given() -> None:
    """`own_columns` means the same whether or not anchors and pool are one object."""
    z = random_rows(3, 4, seed=0)
    case = Case(z, z, z, 0.5, [-1, 0, -1], [[]] * 3, True)
    result = influence(z, z, temperature=0.5, own_columns=torch.tensor(case.own_columns))
    torch.testing.assert_close(result, references.influence(case), **EXACT)


def test_influence_without_candidates() -> None:
    """Nothing to be aligned with, or one thing: a task that is never wrong, and a gradient of 0."""
    z = random_rows(2, 4, seed=0)
    assert torch.equal(
        influence(z[:1], z[:1], temperature=0.5, own_columns=torch.tensor([0])), torch.zeros(1, 1).double()
    )
    assert torch.equal(influence(z, z, temperature=0.5), torch.zeros(2, 2).double())


# At .01 and width 128 the gradients are some exp(-70), and no product of two is a float32 (the weights of UnDiMix need
# them relative to each other alone, see test_undimix.py); random rows of width 8 are closer to each other.
@pytest.mark.parametrize(("temperature", "width"), [(0.05, 128), (0.02, 128), (0.01, 8)])
def test_influence_keeps_its_digits_in_float32(temperature: float, width: int) -> None:
    """Each view has a near-duplicate, so its probability is 1 but for exp(-1/t): p - onehot would cancel to nothing.

    A cosine is off by about eps, so a logit by eps/t, and so is a probability, relatively; a score has two of them.
    """
    pairs = 32
    first = random_rows(pairs, width, seed=0)
    views = normalize(torch.cat([first, first + 0.02 * random_rows(pairs, width, seed=1)]), dim=1).float()
    assert (views[:pairs] * views[pairs:]).sum(dim=1).min() > 0.999
    exact, rows = views.double(), range(2 * pairs)
    delta = torch.stack(
        [references.precise_gradient(exact[i], exact[[j for j in rows if j != i]], temperature) for i in rows]
    )
    expected = delta @ delta.T
    held = expected.abs() > torch.finfo(torch.float32).tiny
    assert held.double().mean() > 0.9
    error = ((influence(views, views, temperature=temperature) - expected) / expected).abs()[held]
    assert error.median() < 8 * torch.finfo(torch.float32).eps / temperature


@pytest.mark.parametrize("temperature", [0.05, 0.1])
def test_influence_of_triplicates_keeps_its_digits(temperature: float) -> None:
    """Where a view stands there three times, its label has an exact twin, which adds nothing to the gradient."""
    views = random_rows(16, 16, seed=0).float()
    views[1] = views[2] = views[0]
    exact, rows = views.double(), range(16)
    delta = torch.stack(
        [references.precise_gradient(exact[i], exact[[j for j in rows if j != i]], temperature) for i in rows]
    )
    expected = (delta @ delta.T)[:3]
    error = ((influence(views, views, temperature=temperature)[:3] - expected) / expected).abs()
    assert error.median() < 8 * torch.finfo(torch.float32).eps / temperature


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_influence_of_concentrated_embeddings_in_float32(temperature: float) -> None:
    """When training starts all rows are alike: gradients are differences of them, which is where the digits are."""
    views = normalize(random_rows(1, 128, seed=0) + 0.01 * random_rows(64, 128, seed=1), dim=1).float()
    exact, rows = views.double(), range(64)
    delta = torch.stack(
        [references.precise_gradient(exact[i], exact[[j for j in rows if j != i]], temperature) for i in rows]
    )
    expected = delta @ delta.T
    error = ((influence(views, views, temperature=temperature) - expected) / expected).abs()
    assert error.median() < 8 * torch.finfo(torch.float32).eps / temperature


def test_references_agree() -> None:
    """The loss that keeps its digits is the cross-entropy."""
    rows = random_rows(6, 4, seed=0)
    for temperature in (0.2, 0.5):
        precise = references.precise_gradient(rows[0], rows[1:], temperature)
        plain = references.last_layer_gradient(rows[0], rows[1:], temperature)
        torch.testing.assert_close(precise, plain, **EXACT)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@each_case
def test_diversity(case: Case, distance: str) -> None:
    # Here the anchor itself is a column to exclude like any other.
    own_columns = torch.tensor(case.own_columns)[:, None]
    excluded = torch.cat([own_columns, case.padded(), own_columns], dim=1)
    negative = case.is_negative()
    expected = references.diversity(case, distance)
    result = diversity(case.pool, excluded, distance=distance)
    assert result.shape == expected.shape
    torch.testing.assert_close(result[negative], expected[negative], **EXACT)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_diversity_of_zeros_and_of_few(distance: str) -> None:
    pool = random_rows(5, 3, seed=0)
    pool[1] = pool[3] = 0
    excluded = [[-1, -1, -1, -1, -1], [0, 2, 4, -1, 0], [0, 1, 2, 3, -1], [4, 3, 2, 1, 0]]
    case = Case(pool[:4], pool[:4], pool, 0.5, [-1] * 4, excluded, True)
    negative = case.is_negative()
    assert negative.sum(dim=1).tolist() == [5, 2, 1, 0]
    result = diversity(pool, torch.tensor(excluded), distance=distance)
    torch.testing.assert_close(result[negative], references.diversity(case, distance)[negative], **EXACT)
    assert torch.equal(result[2:], torch.zeros(2, 5).double())
    if distance == "cosine":
        assert result[1, 1] == 1  # two rows of zeros, whose cosine is 0


def test_euclidean_diversity_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools above one block of distances, with near-duplicates: |a|^2 + |b|^2 - 2ab would lose theirs."""
    monkeypatch.setattr(block_sizes, "PAIRS_AT_ONCE", 2**18)
    pool = random_rows(1, 4, seed=0) + 1e-9 * random_rows(1100, 4, seed=1)
    expected = torch.stack([(pool - row).norm(dim=1).sum() / 1099 for row in pool])
    result = diversity(pool, torch.tensor([[-1]]), distance="euclidean")[0]
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("score", ["similarity", "influence", "diversity"])
def test_same_dtype_under_autocast(score: str) -> None:
    """Scores to be compared with each other need all their digits, whatever surrounds them."""
    z = random_rows(8, 16, seed=0, dtype=torch.float32)
    scores = {
        "similarity": lambda: anchor_similarity(z, z),
        "influence": lambda: influence(z, z, temperature=0.1),
        "diversity": lambda: diversity(z, torch.arange(8)[:, None]),
    }
    expected = scores[score]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result: Tensor = scores[score]()
    assert torch.equal(result, expected)


BAD_INFLUENCE = {
    "width": ({"pool": torch.zeros(4, 3)}, r"pool: expected width 2, as anchors has, got shape \[4, 3\]"),
    "positives": ({"positives": torch.zeros(2, 2)}, r"positives: expected 3 rows, as anchors has, got 2"),
    "temperature": ({"temperature": 0.0}, r"temperature: .* above 0, got 0\.0"),
    "anchor_inputs": (
        {"anchor_inputs": torch.zeros(2, 5), "pool_inputs": torch.zeros(4, 5)},
        r"anchor_inputs: expected 3 rows, as anchors has, got 2",
    ),
    "pool_inputs": (
        {"anchor_inputs": torch.zeros(3, 5), "pool_inputs": torch.zeros(4, 6)},
        r"pool_inputs: expected width 5, as anchor_inputs has, got shape \[4, 6\]",
    ),
    "no-pool_inputs": ({"anchor_inputs": torch.zeros(3, 5)}, r"pool_inputs: .*got None"),
    "no-anchor_inputs": ({"pool_inputs": torch.zeros(4, 5)}, r"anchor_inputs: .*got None"),
    "own_columns-dtype": ({"own_columns": torch.zeros(3)}, r"own_columns: .*got torch\.float32"),
    "own_columns-short": ({"own_columns": torch.tensor([0, 1])}, r"own_columns: .*got \[2\]"),
    "own_columns-rank": ({"own_columns": torch.tensor([[0], [1], [2]])}, r"own_columns: .*got \[3, 1\]"),
    "own_columns-range": ({"own_columns": torch.tensor([0, 1, 4])}, r"own_columns: .*got 0 to 4"),
}


@pytest.mark.parametrize(("change", "message"), BAD_INFLUENCE.values(), ids=BAD_INFLUENCE)
def test_influence_refuses(change: dict[str, object], message: str) -> None:
    good = {"anchors": torch.zeros(3, 2), "pool": torch.zeros(4, 2), "temperature": 0.5}
    with pytest.raises(ValueError, match=f"^{message}"):
        influence(**{**good, **change})  # type: ignore[arg-type]


BAD_DIVERSITY = {
    "pool": (torch.zeros(3), torch.tensor([[0]]), "cosine", r"pool: .*got shape \[3\]"),
    "distance": (torch.zeros(3, 2), torch.tensor([[0]]), "dot", r"distance: .*'cosine', 'euclidean', got 'dot'"),
    "dtype": (torch.zeros(3, 2), torch.zeros(1, 1), "cosine", r"excluded: .*got torch\.float32"),
    "rank": (torch.zeros(3, 2), torch.tensor([0]), "cosine", r"excluded: .*got \[1\]"),
    "above": (torch.zeros(3, 2), torch.tensor([[0, 3]]), "cosine", r"excluded: .*got 0 to 3"),
    "below": (torch.zeros(3, 2), torch.tensor([[-2]]), "cosine", r"excluded: .*got -2 to -2"),
}


@pytest.mark.parametrize(("pool", "excluded", "distance", "message"), BAD_DIVERSITY.values(), ids=BAD_DIVERSITY)
def test_diversity_refuses(pool: Tensor, excluded: Tensor, distance: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        diversity(pool, excluded, distance=distance)


def test_anchor_similarity_refuses() -> None:
    with pytest.raises(ValueError, match=r"^pool: expected width 2, as anchors has, got shape \[3, 3\]"):
        anchor_similarity(torch.zeros(3, 2), torch.zeros(3, 3))


def test_influence_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, anchors = random_rows(50, 4, seed=0), random_rows(37, 4, seed=1)
    pairs = ((pool, pool), (anchors, pool))
    whole = [components.influence(*rows, temperature=0.2) for rows in pairs]
    monkeypatch.setattr(block_sizes, "PAIRS_AT_ONCE", 1)  # the least number of rows
    for rows, want in zip(pairs, whole, strict=True):
        torch.testing.assert_close(components.influence(*rows, temperature=0.2), want, rtol=1e-12, atol=1e-12)
