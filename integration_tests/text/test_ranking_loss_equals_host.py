"""With `Uniform()`, our MultipleNegativesRankingLoss is the host's: value and gradients, in every direction."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import BoW
from sentence_transformers.util import cos_sim, dot_score, euclidean_sim
from torch import Tensor

import undimix_sentence_transformers as ours
from undimix_plugins import HCL, UnDiMix, Uniform, undimix

OTHERS = ("query_to_query", "doc_to_query", "doc_to_doc")
JOINT = [("query_to_doc", *some) for size in range(4) for some in combinations(OTHERS, size)]
PER_DIRECTION = [("query_to_doc",), ("query_to_doc", "doc_to_query")]  # the host allows no others
LAYOUTS = [(directions, "joint") for directions in JOINT] + [(d, "per_direction") for d in PER_DIRECTION]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def model() -> SentenceTransformer:
    return SentenceTransformer(modules=[BoW(vocab=["a", "b"])])


def columns(count: int, batch: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count * batch)
    return [torch.randn(batch, 9, generator=generator, dtype=dtype).requires_grad_() for _ in range(count)]


def value_and_gradients(loss: losses.MultipleNegativesRankingLoss, embeddings: list[Tensor]) -> list[Tensor]:
    value = loss.compute_loss_from_embeddings(embeddings, None)
    return [value, *torch.autograd.grad(value, embeddings, materialize_grads=True, allow_unused=True)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize(("directions", "partition_mode"), LAYOUTS)
def test_uniform_is_the_host(
    model: SentenceTransformer, directions: tuple[str, ...], partition_mode: str, count: int, dtype: torch.dtype
) -> None:
    settings = {"directions": directions, "partition_mode": partition_mode}
    host = losses.MultipleNegativesRankingLoss(model, **settings)
    forms = [undimix(host, Uniform()), ours.MultipleNegativesRankingLoss(model, **settings, weighting=Uniform())]
    for batch in (1, 2, 7):
        embeddings = columns(count, batch, dtype)
        wanted = value_and_gradients(host, embeddings)
        for form in forms:
            for one, other in zip(value_and_gradients(form, embeddings), wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["cosine", "dot"])
def test_similarity_functions(name: str) -> None:
    model = SentenceTransformer(modules=[BoW(vocab=["a", "b"])], similarity_fn_name=name)
    for function in (model.similarity, {"cosine": cos_sim, "dot": dot_score}[name]):
        host = losses.MultipleNegativesRankingLoss(model, scale=1.0, similarity_fct=function)
        embeddings = columns(3, 5, torch.float64)
        for one, other in zip(
            value_and_gradients(undimix(host, Uniform()), embeddings),
            value_and_gradients(host, embeddings),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("weighting", [UnDiMix(), UnDiMix(mixing="linear"), HCL()], ids=repr)
@pytest.mark.parametrize(("directions", "partition_mode"), LAYOUTS)
def test_weighting_changes_the_loss(
    model: SentenceTransformer, directions: tuple[str, ...], partition_mode: str, weighting: UnDiMix | HCL
) -> None:
    host = losses.MultipleNegativesRankingLoss(model, 2.0, directions=directions, partition_mode=partition_mode)
    embeddings = columns(3, 7, torch.float64)
    plain, weighted = value_and_gradients(host, embeddings), value_and_gradients(undimix(host, weighting), embeddings)
    assert (plain[0] - weighted[0]).abs() > 1e-4
    assert all(value.isfinite().all() for value in weighted)


def test_directions_are_weighted_on_their_own(model: SentenceTransformer) -> None:
    """A symmetric loss per direction is the mean of two losses with the columns swapped."""
    both = undimix(losses.MultipleNegativesSymmetricRankingLoss(model))
    one = undimix(losses.MultipleNegativesRankingLoss(model))
    queries, docs = columns(2, 7, torch.float64)
    mean = (
        one.compute_loss_from_embeddings([queries, docs], None)
        + one.compute_loss_from_embeddings([docs, queries], None)
    ) / 2
    torch.testing.assert_close(both.compute_loss_from_embeddings([queries, docs], None), mean, rtol=0, atol=1e-10)


def test_hardness_mode_is_the_hosts_alone(model: SentenceTransformer) -> None:
    host = losses.MultipleNegativesRankingLoss(model, hardness_mode="all_negatives", hardness_strength=5.0)
    embeddings = columns(3, 5, torch.float64)
    uniform = undimix(host, Uniform())
    assert torch.equal(value_and_gradients(uniform, embeddings)[0], value_and_gradients(host, embeddings)[0])
    for weighting in (UnDiMix(), HCL()):
        with pytest.raises(ValueError, match=r"hardness_mode: expected None beside weighting=.*both weight the same"):
            undimix(host, weighting)
        with pytest.raises(ValueError, match="hardness_mode"):
            ours.MultipleNegativesRankingLoss(model, hardness_mode="all_negatives", weighting=weighting)


def test_refused(model: SentenceTransformer) -> None:
    functions: list[Callable[[Tensor, Tensor], Tensor]] = [euclidean_sim, lambda a, b: a @ b.T]
    for function in functions:
        with pytest.raises(ValueError, match="similarity_fct: expected cos_sim or dot_score"):
            undimix(losses.MultipleNegativesRankingLoss(model, similarity_fct=function))
    with pytest.raises(ValueError, match="scale: expected a finite number above 0, got inf"):
        undimix(losses.MultipleNegativesRankingLoss(model, scale=float("inf")))


def test_bad_embeddings(model: SentenceTransformer) -> None:
    loss = undimix(losses.MultipleNegativesRankingLoss(model))
    good = torch.randn(4, 9)
    bad = good.clone()
    bad[1, 0] = torch.inf
    for embeddings, message in [
        ([good], "embeddings: expected at least 2 columns, got 1"),
        ([good, bad], r"embeddings\[1\]: expected finite embeddings, got a non-finite value in row 1"),
        ([good, good, good[:3]], r"embeddings\[2\]: expected 4 rows, as embeddings\[0\] has, got 3"),
        ([good, good.double()], r"embeddings\[1\]: expected torch.float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            loss.compute_loss_from_embeddings(embeddings, None)
    assert loss.compute_loss_from_embeddings([torch.zeros(4, 9).half(), good.half()], None).isfinite()
