"""With `Uniform()`, our MultipleNegativesRankingLoss is the host's: value and gradients, in every direction."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import BoW
from sentence_transformers.util import cos_sim, dot_score, euclidean_sim, manhattan_sim
from torch import Tensor, nn

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


def bilinear(a: Tensor, b: Tensor) -> Tensor:
    """Not symmetric: queries and documents are different things."""
    return a @ torch.diag(torch.linspace(0.5, 2, a.shape[1], dtype=a.dtype)) @ b.roll(1, dims=1).T


SCORERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "distance": euclidean_sim,
    "sum of differences": manhattan_sim,
    "inner product, by another name": lambda a, b: a @ b.T,
    "bilinear": bilinear,
}


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize(("directions", "partition_mode"), LAYOUTS)
def test_any_scorer(model: SentenceTransformer, directions: tuple[str, ...], partition_mode: str, scorer: str) -> None:
    settings = {"directions": directions, "partition_mode": partition_mode, "similarity_fct": SCORERS[scorer]}
    for cls in (losses.MultipleNegativesRankingLoss, losses.CachedMultipleNegativesRankingLoss):
        host = cls(model, scale=0.7, **settings)
        for count, batch in ((2, 6), (3, 5), (2, 1)):
            embeddings = [part / 3 for part in columns(count, batch, torch.float64)]
            wanted = of_any_form(host, embeddings)
            for one, other in zip(of_any_form(undimix(host, Uniform()), embeddings), wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-10, equal_nan=scorer == "distance")
            if batch > 1:
                assert not torch.isclose(of_any_form(undimix(host), embeddings)[0], wanted[0], rtol=1e-4)


def of_any_form(loss: nn.Module, embeddings: list[Tensor]) -> list[Tensor]:
    """The value and gradients of a loss, cached or not, of embeddings."""
    if not hasattr(loss, "calculate_loss"):
        return value_and_gradients(loss, embeddings)
    inputs = [part.detach().clone().requires_grad_() for part in embeddings]
    value = loss.calculate_loss([list(part.split(4)) for part in inputs])
    return [value.detach(), *torch.autograd.grad(value, inputs)]


@pytest.mark.parametrize("weighting", [UnDiMix(), UnDiMix(mixing="linear"), UnDiMix(diversity=0), HCL()], ids=repr)
@pytest.mark.parametrize(("directions", "partition_mode"), LAYOUTS)
def test_a_scorer_of_inner_products_has_the_same_weights(
    model: SentenceTransformer, directions: tuple[str, ...], partition_mode: str, weighting: UnDiMix | HCL
) -> None:
    """Whether the loss knows of the inner products, or is given similarities."""
    settings = {"directions": directions, "partition_mode": partition_mode, "scale": 2.0}
    known, unknown = (
        undimix(losses.MultipleNegativesRankingLoss(model, similarity_fct=function, **settings), weighting)
        for function in (dot_score, SCORERS["inner product, by another name"])
    )
    embeddings = [part / 3 for part in columns(3, 6, torch.float64)]
    wanted, got = (value_and_gradients(loss, embeddings) for loss in (known, unknown))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


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
    embeddings = columns(2, 5, torch.float64)
    loss = undimix(losses.MultipleNegativesRankingLoss(model, similarity_fct=lambda a, b: a.T @ b))
    with pytest.raises(ValueError, match="similarity_fct: expected a similarity of each row to each"):
        loss.compute_loss_from_embeddings(embeddings, None)
    with pytest.raises(ValueError, match="last_layer: expected none with a similarity_fct that is no inner product"):
        undimix(losses.MultipleNegativesRankingLoss(model, similarity_fct=euclidean_sim), last_layer=nn.Linear(2, 2))
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
