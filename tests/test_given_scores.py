"""A contrast of given similarities has the losses and gradients of one of embeddings with these similarities."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from undimix_plugins import (
    ADNCE,
    BCL,
    HCL,
    Contrast,
    Debiased,
    FalseNegativeAttraction,
    FalseNegativeElimination,
    MoCHi,
    PositiveAware,
    ProGCL,
    Ring,
    SimilarityPenalty,
    UnDiMix,
    Uniform,
    Weighting,
    compose,
    decoupled,
    explain,
    info_nce,
    negative_statistics,
)
from undimix_plugins.components import influence, task_gradients

METHODS: dict[str, Callable[[], Weighting]] = {
    "Uniform": Uniform,
    "UnDiMix": UnDiMix,
    "linear": lambda: UnDiMix(mixing="linear"),
    "euclidean": lambda: UnDiMix(distance="euclidean"),
    "detached": lambda: UnDiMix(detached=True),
    "influence": lambda: UnDiMix(similarity=0, diversity=0),
    "HCL": HCL,
    "HN-NCE": lambda: HCL(beta=0.5, tau_plus=0.0, alpha=0.5),
    "Debiased": lambda: Debiased(tau_plus=0.1),
    "ADNCE": lambda: ADNCE(mu=0.7, sigma=0.5),
    "Ring": Ring,
    "BCL": BCL,
    "ProGCL": lambda: ProGCL(start=1),
    "SimilarityPenalty": SimilarityPenalty,
    "PositiveAware": lambda: PositiveAware(margin=0.05, margin_strategy="relative"),
    "composed": lambda: compose(UnDiMix(), Debiased(tau_plus=0.1)),
}


def rows(count: int, width: int = 5, seed: int = 0) -> Tensor:
    drawn = torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return normalize(drawn, dim=1).requires_grad_()


def assert_same(of_rows: Tensor, of_scores: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(of_scores, of_rows, rtol=1e-10, atol=1e-12)
    wanted, got = (torch.autograd.grad(loss, inputs, materialize_grads=True) for loss in (of_rows, of_scores))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loss", [info_nce, decoupled], ids=lambda loss: loss.__name__)
def test_positives_in_the_pool(loss: Callable[..., Tensor], method: str) -> None:
    anchors, pool = rows(6), rows(11, seed=1)
    columns = torch.tensor([[0, 7], [1, -1], [2, -1], [3, 8], [4, -1], [-1, -1]])
    if loss is decoupled and method == "HN-NCE":
        pytest.skip("the positive has no term that alpha could multiply")
    of_rows = Contrast.of(anchors, columns, pool, None, 0.3)
    of_scores = Contrast.of_scores(anchors @ pool.T, columns, None, 0.3, vectors=pool)
    assert_same(loss(of_rows, METHODS[method]()), loss(of_scores, METHODS[method]()), [anchors, pool])


@pytest.mark.parametrize("method", METHODS)
def test_positives_beside_the_pool(method: str) -> None:
    anchors, positives, pool = rows(6), rows(6, seed=1), rows(11, seed=2)
    excluded = torch.tensor([[3], [-1], [0], [-1], [-1], [10]])
    of_rows = Contrast.of(anchors, positives, pool, excluded, 0.3)
    of_scores = Contrast.of_scores(anchors @ pool.T, anchors @ positives.T, excluded, 0.3, vectors=pool)
    made = METHODS[method]
    assert_same(info_nce(of_rows, made()), info_nce(of_scores, made()), [anchors, positives, pool])


@pytest.mark.parametrize("method", METHODS)
def test_anchors_in_the_pool(method: str) -> None:
    """As in the negatives of queries among queries, by a mask besides, and at a learned temperature."""
    anchors, positives = rows(6), rows(6, seed=1)
    temperature, own = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), torch.arange(6)
    same = torch.zeros(6, 6, dtype=torch.bool)
    same[1, 4] = same[4, 1] = True
    further = {"own_columns": own, "excluded_mask": same.__getitem__}
    of_rows = Contrast.of(anchors, positives, anchors.clone(), None, temperature, **further)
    of_scores = Contrast.of_scores(
        anchors @ anchors.T, anchors @ positives.T, None, temperature, vectors=anchors, **further
    )
    made = METHODS[method]
    assert_same(info_nce(of_rows, made()), info_nce(of_scores, made()), [anchors, positives, temperature])


@given(n=st.integers(1, 6), m=st.integers(1, 9), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_the_influence_is_that_of_embeddings(n: int, m: int, seed: int) -> None:
    """p - y is autograd's gradient of a task at its logits; between them stand the similarities."""
    anchors, pool, temperature = rows(n, seed=seed).detach(), rows(m, seed=seed + 1).detach(), 0.3
    scores = anchors @ pool.T

    def at_logits(logits: Tensor) -> Tensor:
        logits = logits.clone().requires_grad_()
        return torch.autograd.grad(cross_entropy(logits, logits.argmax(dim=1), reduction="sum"), logits)[0]

    of_anchors, of_pool = at_logits(scores / temperature), at_logits(scores.T / temperature)
    formula = of_anchors @ scores.T @ of_pool.T / temperature**2
    torch.testing.assert_close(influence(anchors, pool, temperature=temperature), formula, rtol=1e-8, atol=1e-12)
    given_scores = Contrast.of_scores(scores, torch.zeros(n, 1, dtype=torch.long), None, temperature)
    of_rows, of_candidates = task_gradients(given_scores.anchors, given_scores.pool, temperature, None, None)
    got = of_rows.at_scale(temperature) @ of_candidates.at_scale(temperature).T
    torch.testing.assert_close(got, formula, rtol=1e-8, atol=1e-12)


def test_any_scorer() -> None:
    """A scorer that is no inner product, by a loop over the anchors; gradients by `gradcheck`."""
    queries, docs = rows(4), rows(6, seed=1)

    def loss_of(queries: Tensor, docs: Tensor, weighting: Weighting) -> Tensor:
        scores = -torch.cdist(queries, docs)
        return info_nce(Contrast.of_scores(scores, torch.arange(4)[:, None], None, 0.5), weighting)

    logits = -torch.cdist(queries, docs) / 0.5
    plain = torch.stack([logits[i].logsumexp(0) - logits[i, i] for i in range(4)]).mean()
    torch.testing.assert_close(loss_of(queries, docs, Uniform()), plain, rtol=1e-12, atol=1e-12)
    for weighting in (Uniform(), Debiased(tau_plus=0.1)):
        assert torch.autograd.gradcheck(lambda q, d, w=weighting: loss_of(q, d, w), (queries, docs))
    # A slow UnDiMix of similarity alone: weights are the softmax of standardised logits, times their number.
    mixed = UnDiMix(influence=0, diversity=0, mixing="linear")
    losses = []
    for i in range(4):
        others = logits[i, [j for j in range(6) if j != i]].detach()
        weights = ((others - others.mean()) / others.std(correction=0)).softmax(0) * 5
        losses.append((logits[i, i].exp() + (weights * others.exp()).sum()).log() - logits[i, i])
    torch.testing.assert_close(loss_of(queries, docs, mixed), torch.stack(losses).mean(), rtol=1e-10, atol=1e-12)


def test_what_looks_at_it() -> None:
    contrast = Contrast.of_scores(rows(6) @ rows(11, seed=1).T, torch.arange(6)[:, None], None, 0.3)
    weighting = UnDiMix(diversity=0)
    assert 0 < negative_statistics(contrast, weighting)["effective_number"] <= 10
    assert explain(contrast, weighting, 0) is not None


@pytest.mark.parametrize(
    ("weighting", "words"),
    [
        (MoCHi(N=4, s=2, s_prime=1), "does without embeddings, which this loss lacks; MoCHi mixes them"),
        (FalseNegativeElimination(k=2), "which this loss lacks; FalseNegativeElimination compares them"),
        (FalseNegativeAttraction(k=2), "which this loss lacks; FalseNegativeAttraction compares them"),
        (UnDiMix(), r"diversity: expected 0 where the loss gives similarities and no vectors.* got 0.25"),
        (UnDiMix(mixing="linear"), "diversity: expected 0"),
        (UnDiMix(diversity=0, gradient="weight"), "gradient='weight' needs the last layer's inputs"),
    ],
    ids=repr,
)
def test_what_a_method_needs_and_scores_lack(weighting: Weighting, words: str) -> None:
    contrast = Contrast.of_scores(rows(6) @ rows(11, seed=1).T, torch.arange(6)[:, None], None, 0.3)
    with pytest.raises(ValueError, match=words):
        info_nce(contrast, weighting)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"scores": torch.zeros(3)}, "scores: expected a tensor of shape"),
        (
            {"scores": torch.full((3, 4), torch.nan)},
            "scores: expected finite embeddings, got a non-finite value in row 0",
        ),
        (
            {"positives": torch.zeros(3, 4)},
            r"positives: expected torch.float32 \[3, 3\], the similarity of",
        ),
        ({"positives": torch.zeros(3)}, "positives: expected a tensor of shape"),
        ({"positives": torch.zeros(3, 3, dtype=torch.float64)}, "positives: expected torch.float32"),
        ({"positives": torch.tensor([[4], [0], [0]])}, "positives: expected columns from -1"),
        ({"vectors": torch.zeros(3, 2)}, "vectors: expected one for each of the 4 candidates"),
        ({"vectors": torch.zeros(4)}, "vectors: expected a tensor of shape"),
        ({"temperature": 0.0}, "temperature: expected"),
    ],
)
def test_bad_input(given: dict[str, Tensor], words: str) -> None:
    arguments = {"scores": torch.zeros(3, 4), "positives": torch.zeros(3, 3), "excluded": None, "temperature": 0.5}
    with pytest.raises(ValueError, match=words):
        Contrast.of_scores(**{**arguments, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize("lowest", [-1e9, -1e6, -torch.inf])
def test_what_cannot_be_compared_is_no_negative(lowest: float) -> None:
    """In float32, beside so low a similarity, others would lose their digits."""
    scores = (5 * rows(6) @ rows(11, seed=1).T).float().detach()
    scores[:, 9], scores[2, 3] = lowest, lowest
    scores.requires_grad_()
    plain = cross_entropy(scores / 0.3, torch.arange(6))
    wanted = torch.autograd.grad(plain, scores)[0]
    contrast = Contrast.of_scores(scores, torch.arange(6)[:, None], None, 0.3)
    loss = info_nce(contrast, Uniform())
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, scores)[0], wanted, rtol=1e-5, atol=1e-6)
    assert contrast.count.tolist() == [9, 9, 8, 9, 9, 9]
    kept = [column for column in range(11) if column != 9]
    left = info_nce(contrast.without(torch.tensor([[-1], [-1], [3], [-1], [-1], [-1]])), UnDiMix(diversity=0))
    less = scores[:, kept].masked_fill(scores[:, kept] < -1e5, 0)
    own = Contrast.of_scores(less, torch.arange(6)[:, None], torch.tensor([[-1], [-1], [3], [-1], [-1], [-1]]), 0.3)
    mixed = UnDiMix(influence=0, diversity=0)
    torch.testing.assert_close(info_nce(contrast, mixed), info_nce(own, mixed), rtol=1e-5, atol=1e-5)
    assert left.isfinite()


def test_a_positive_may_be_that_low() -> None:
    scores = torch.tensor([[-1e9, 1.0], [0.5, 2.0]])
    loss = info_nce(Contrast.of_scores(scores, torch.tensor([[0], [1]]), None, 1.0), Uniform())
    torch.testing.assert_close(loss, cross_entropy(scores, torch.arange(2)), rtol=1e-6, atol=0)
