"""`undimix(host, SimilarityPenalty(alpha))` is the host's own `hardness_mode="all_negatives"`, value and gradients."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import BoW
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor

from integration_tests.text.tiny_models import encoder, features, news
from undimix_plugins import SimilarityPenalty, Uniform, undimix

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


def pair(
    model: SentenceTransformer, alpha: float, scale: float = 20.0, **settings: object
) -> tuple[losses.MultipleNegativesRankingLoss, losses.MultipleNegativesRankingLoss]:
    """The host's hardness and ours."""
    host = losses.MultipleNegativesRankingLoss(model, scale, **settings)
    hard = losses.MultipleNegativesRankingLoss(
        model, scale, **settings, hardness_mode="all_negatives", hardness_strength=alpha
    )
    return hard, undimix(host, SimilarityPenalty(alpha))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("alpha", [0.5, 9.0])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_is_the_host(model: SentenceTransformer, scale: float, alpha: float, count: int, dtype: torch.dtype) -> None:
    """With hard negatives, of its own query and of others, and without."""
    hard, ours = pair(model, alpha, scale)
    for batch in (1, 2, 7):
        embeddings = columns(count, batch, dtype)
        both = (value_and_gradients(loss, embeddings) for loss in (hard, ours))
        for wanted, one in zip(*both, strict=True):
            torch.testing.assert_close(one, wanted, rtol=0, atol=TOLERANCE[dtype])


def test_it_is_not_the_plain_loss(model: SentenceTransformer) -> None:
    """What the comparison above would not notice."""
    embeddings = columns(3, 7, torch.float64)
    hard, ours = pair(model, 9.0)
    plain = value_and_gradients(undimix(ours, Uniform()), embeddings)
    assert abs(float((value_and_gradients(hard, embeddings)[0] - plain[0]).detach())) > 1e-2


@pytest.mark.parametrize("function", [cos_sim, dot_score], ids=["cos_sim", "dot_score"])
def test_similarity_functions(model: SentenceTransformer, function: object) -> None:
    """The penalty is of the similarity as the loss has it."""
    embeddings = columns(3, 5, torch.float64)
    both = (value_and_gradients(loss, embeddings) for loss in pair(model, 2.0, 1.0, similarity_fct=function))
    for wanted, one in zip(*both, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("count", [2, 4])
def test_real_texts(count: int) -> None:
    """The gradient of a model's parameters, of columns of news."""
    model = encoder().double()
    parameters = list(model.parameters())
    texts = news(columns=count, rows=8)
    values, gradients = [], []
    for loss in pair(model, 9.0):
        value = loss(features(model, texts), None)
        found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        values.append(value)
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    torch.testing.assert_close(values[1], values[0], rtol=1e-10, atol=1e-10)
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-8, atol=1e-10)


def test_the_cached_loss() -> None:
    """The same numbers where gradients are cached between mini-batches."""
    model = encoder().double()
    texts = news(columns=3, rows=8)
    hard, _ = pair(model, 9.0)
    ours = undimix(losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3), SimilarityPenalty(9.0))
    found = []
    for loss in (hard, ours):
        model.zero_grad()
        value = loss(features(model, texts), None)
        value.backward()
        found.append([value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for wanted, one in zip(*found, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-8, atol=1e-10)


def test_two_penalties_are_refused(model: SentenceTransformer) -> None:
    hard, _ = pair(model, 9.0)
    with pytest.raises(ValueError, match=r"hardness_mode: expected None beside weighting=SimilarityPenalty"):
        undimix(hard, SimilarityPenalty(9.0))
