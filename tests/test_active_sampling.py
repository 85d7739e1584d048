"""Active sampling's gradients are autograd's, and its picks those of k-means++ as it is defined."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.contrasts import random_rows
from tests.references import last_layer_gradient
from undimix_plugins.components import influence
from undimix_plugins.methods.active_sampling import ActiveSampling, gradient_embeddings, k_means_plus_plus

EXACT = {"rtol": 0, "atol": 1e-10}


def seeding(points: Tensor, seeds: int, generator: torch.Generator) -> list[int]:
    """Arthur and Vassilvitskii's, a point at a time."""
    picked: list[int] = []
    while len(picked) < seeds:
        weights = []
        for i, x in enumerate(points):
            nearest = min((float((x - points[j]).square().sum()) for j in picked), default=1.0)
            weights.append(0.0 if i in picked else nearest)
        if not any(weights):
            weights = [float(i not in picked) for i in range(len(points))]
        picked.append(int(torch.multinomial(torch.tensor(weights, dtype=torch.float64), 1, generator=generator)))
    return picked


@pytest.mark.parametrize("temperature", [1.0, 0.2, 0.07])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize(("n", "m"), [(2, 1), (3, 8), (9, 5)])
def test_gradients_are_those_of_a_real_last_layer(n: int, m: int, unit: bool, temperature: float) -> None:
    queries, candidates = random_rows(n, 4, seed=n, unit=unit), random_rows(m, 4, seed=20 + m, unit=unit)
    inputs = random_rows(m, 3, seed=40, unit=False)
    at_bias = gradient_embeddings(queries, candidates, temperature=temperature)
    at_weight = gradient_embeddings(queries, candidates, temperature=temperature, candidate_inputs=inputs)
    assert at_weight.shape == (m, 12)
    for j in range(m):
        torch.testing.assert_close(at_bias[j], last_layer_gradient(candidates[j], queries, temperature), **EXACT)
        want = last_layer_gradient(candidates[j], queries, temperature, inputs[j])
        torch.testing.assert_close(at_weight[j], want, **EXACT)


def test_they_are_the_pool_s_side_of_influence() -> None:
    queries, candidates = random_rows(4, 5, seed=0), random_rows(7, 5, seed=1)
    of_candidates = gradient_embeddings(queries, candidates, temperature=0.2)
    of_queries = gradient_embeddings(candidates, queries, temperature=0.2)
    got = of_queries @ of_candidates.T
    torch.testing.assert_close(got, influence(queries, candidates, temperature=0.2), **EXACT)


def test_queries_as_their_own_candidates_are_not_left_out() -> None:
    rows = random_rows(5, 4, seed=0)
    same = gradient_embeddings(rows, rows, temperature=0.2)
    assert torch.equal(same, gradient_embeddings(rows, rows.clone(), temperature=0.2))
    for j in range(5):
        torch.testing.assert_close(same[j], last_layer_gradient(rows[j], rows, 0.2), **EXACT)


def test_one_query_leaves_no_doubt() -> None:
    gradients = gradient_embeddings(random_rows(1, 4, seed=0), random_rows(6, 4, seed=1), temperature=0.1)
    assert torch.equal(gradients, torch.zeros(6, 4, dtype=gradients.dtype))
    picked = ActiveSampling(0.1, seeds=6)(random_rows(1, 4, seed=0), random_rows(6, 4, seed=1))
    assert sorted(picked.tolist()) == list(range(6))  # all alike, each once


def test_no_gradient_and_half_precision() -> None:
    queries = random_rows(4, 5, seed=0).requires_grad_()
    assert not gradient_embeddings(queries, random_rows(3, 5, seed=1), temperature=0.2).requires_grad
    half = queries.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = gradient_embeddings(half, half[:3], temperature=0.2)
    assert got.dtype == torch.float32
    assert torch.equal(got, gradient_embeddings(half.float(), half[:3].float(), temperature=0.2))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("m", "seeds"), [(1, 1), (7, 3), (7, 7), (40, 11)])
def test_picks_are_those_of_the_definition(m: int, seeds: int, seed: int) -> None:
    points = random_rows(m, 3, seed=seed, unit=False)
    got = k_means_plus_plus(points, seeds, generator=torch.Generator().manual_seed(seed))
    assert got.tolist() == seeding(points, seeds, torch.Generator().manual_seed(seed))


@given(
    m=st.integers(1, 12),
    copies=st.integers(1, 12),
    scale=st.sampled_from([1.0, 1e-30, 1e30, 0.0]),
    seed=st.integers(0, 2**31),
)
def test_picks_are_different_and_copies_come_last(m: int, copies: int, scale: float, seed: int) -> None:
    """Also in float32 at scales whose squares it does not have."""
    distinct = (scale * random_rows(m, 3, seed=seed)).float()
    points = torch.cat([distinct] * copies)
    picked = k_means_plus_plus(points, len(points), generator=torch.Generator().manual_seed(seed))
    assert sorted(picked.tolist()) == list(range(len(points)))
    if scale:
        assert sorted((picked[:m] % m).tolist()) == list(range(m))


def test_frequencies() -> None:
    """Of 0, 1 and 3 on a line: the second pick's chances by the squares of distances from the first."""
    points, counts = torch.tensor([[0.0], [1.0], [3.0]]), torch.zeros(3, 3)
    generator = torch.Generator().manual_seed(0)
    draws = 3000
    for _ in range(draws):
        first, second = k_means_plus_plus(points, 2, generator=generator).tolist()
        counts[first, second] += 1
    chances = torch.tensor([[0, 1 / 10, 9 / 10], [1 / 5, 0, 4 / 5], [9 / 13, 4 / 13, 0]]) / 3
    deviation = (chances * (1 - chances) / draws).sqrt()
    assert ((counts / draws - chances).abs() <= 4 * deviation).all()


def test_one_call_is_both_steps() -> None:
    queries, candidates = random_rows(4, 5, seed=0), random_rows(30, 5, seed=1)
    inputs = random_rows(30, 3, seed=2)
    for given_inputs in (None, inputs):
        gradients = gradient_embeddings(queries, candidates, temperature=0.2, candidate_inputs=given_inputs)
        for seeds in (None, 9):
            want = k_means_plus_plus(gradients, seeds or 4, generator=torch.Generator().manual_seed(3))
            got = ActiveSampling(0.2, seeds)(
                queries, candidates, candidate_inputs=given_inputs, generator=torch.Generator().manual_seed(3)
            )
            assert torch.equal(got, want)


def test_uncertain_and_diverse_ones_are_chosen() -> None:
    """Near a query there is no doubt; in the middle of two there is, one kind for each two."""
    queries = torch.eye(4, dtype=torch.float64)
    certain = queries.repeat(50, 1)
    between = torch.stack([(queries[0] + queries[1]) / 2, (queries[2] + queries[3]) / 2]).repeat(5, 1)
    candidates = torch.cat([certain, between])
    doubts = [set((ActiveSampling(0.05, seeds=3)(queries, candidates) - 200).clamp(min=-1).tolist()) for _ in range(20)]
    # The first is drawn from all; of the next, by distance, one of each kind of doubt.
    assert all({pick % 2 for pick in picks if pick >= 0} == {0, 1} for picks in doubts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"temperature: .*above 0, got 0\.0"),
        ({"temperature": math.nan}, r"temperature: .*got nan"),
        ({"temperature": 0.1, "seeds": 0}, r"seeds: .*at least 1, got 0"),
        ({"temperature": 0.1, "seeds": 1.5}, r"seeds: expected a whole number, got 1\.5"),
    ],
    ids=str,
)
def test_refuses_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        ActiveSampling(**settings)  # type: ignore[arg-type]


def test_refuses_what_does_not_fit() -> None:
    rows = torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"^candidates: expected width 4, as queries has"):
        gradient_embeddings(rows, torch.randn(5, 3), temperature=0.1)
    with pytest.raises(ValueError, match=r"^temperature: .*above 0, got -1"):
        gradient_embeddings(rows, rows, temperature=-1)
    with pytest.raises(ValueError, match=r"inputs: expected 5 rows, as \w+ has, got 2"):
        gradient_embeddings(rows, rows, temperature=0.1, candidate_inputs=rows[:2])
    with pytest.raises(ValueError, match=r"^seeds: .*at least 1 and below 6, got 6"):
        k_means_plus_plus(rows, 6)
    with pytest.raises(ValueError, match=r"^seeds: expected a whole number, got 2\.5"):
        k_means_plus_plus(rows, 2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^points: expected finite embeddings"):
        k_means_plus_plus(torch.full((2, 2), math.nan), 1)
    with pytest.raises(ValueError, match=r"^candidates: expected at least 7, as many as are picked, got 5"):
        ActiveSampling(0.1)(torch.randn(7, 4), rows)
