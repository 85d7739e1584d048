"""`undimix(host, SimilarityPenalty(alpha, scope))` is the host's own `hardness_mode=scope`, value and gradients."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import BoW
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from integration_tests.text.tiny_models import encoder, features, news
from undimix_plugins import HCL, PositiveAware, SimilarityPenalty, Uniform, Weighting, undimix
from undimix_plugins.toolkit import Contrast, watch
from undimix_sentence_transformers.multiple_negatives_ranking import HardnessMode
from undimix_transformers import SimCSELoss

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
    model: SentenceTransformer,
    alpha: float,
    scale: float = 20.0,
    scope: HardnessMode = "all_negatives",
    **settings: object,
) -> tuple[losses.MultipleNegativesRankingLoss, losses.MultipleNegativesRankingLoss]:
    """The host's hardness and ours."""
    host = losses.MultipleNegativesRankingLoss(model, scale, **settings)
    hard = losses.MultipleNegativesRankingLoss(model, scale, **settings, hardness_mode=scope, hardness_strength=alpha)
    return hard, undimix(host, SimilarityPenalty(alpha, scope))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("count", "scope"),
    [
        *((count, scope) for count in (2, 3, 5) for scope in ("all_negatives", "in_batch_negatives")),
        *((count, "hard_negatives") for count in (3, 5)),
    ],
)
@pytest.mark.parametrize("alpha", [0.5, 9.0])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_is_the_host(
    model: SentenceTransformer, scale: float, alpha: float, count: int, scope: HardnessMode, dtype: torch.dtype
) -> None:
    """With hard negatives, of its own query and of others, and without."""
    hard, ours = pair(model, alpha, scale, scope)
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


DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
LAYOUTS = [(DIRECTIONS, "joint"), (DIRECTIONS[:2], "joint"), ((DIRECTIONS[0], DIRECTIONS[2]), "per_direction")]
each_layout = pytest.mark.parametrize(("directions", "partition_mode"), LAYOUTS, ids=str)


@each_layout
def test_hard_negatives_of_several_directions(
    model: SentenceTransformer, directions: tuple[str, ...], partition_mode: str
) -> None:
    """The host has them in queries against documents alone, as here."""
    settings = {"directions": directions, "partition_mode": partition_mode}
    embeddings = columns(4, 6, torch.float64)
    both = [value_and_gradients(of, embeddings) for of in pair(model, 5.0, 20.0, "hard_negatives", **settings)]
    for wanted, one in zip(*both, strict=True):
        torch.testing.assert_close(one, wanted, rtol=0, atol=1e-10)


def watched(loss: losses.MultipleNegativesRankingLoss, count: int, batch: int = 4) -> list[Contrast]:
    seen: list[Contrast] = []
    with watch(lambda contrast, _: seen.append(contrast)):
        loss.compute_loss_from_embeddings(columns(count, batch, torch.float64), None)
    return seen


def test_the_columns_of_hard_negatives(model: SentenceTransformer) -> None:
    """An anchor's own, and negatives of it; none in other pools; None where the batch has no columns of them."""
    host = losses.MultipleNegativesRankingLoss(model, directions=DIRECTIONS)
    of_docs, *others = watched(undimix(host), 4)
    assert of_docs.hard_negative_columns is not None
    assert of_docs.hard_negative_columns.tolist() == [[4 + i, 8 + i] for i in range(4)]
    assert of_docs.is_negative(slice(0, 4))[of_docs.is_hard_negative(slice(0, 4))].all()
    assert [list(other.hard_negative_columns.shape) for other in others] == [[4, 0]] * 3  # type: ignore[union-attr]
    assert [other.hard_negative_columns for other in watched(undimix(host), 2)] == [None] * 4


@pytest.mark.parametrize("cls", [SimilarityPenalty, PositiveAware])
def test_pairs_have_no_hard_negatives(model: SentenceTransformer, cls: type[Weighting]) -> None:
    loss = undimix(losses.MultipleNegativesRankingLoss(model), cls(scope="hard_negatives"))  # type: ignore[call-arg]
    with pytest.raises(
        ValueError, match=r"^scope: expected a loss with explicit hard negatives .*the dataset needs col"
    ):
        value_and_gradients(loss, columns(2, 4, torch.float64))
    assert value_and_gradients(loss, columns(3, 4, torch.float64))[0].isfinite()


def by_hand(embeddings: list[Tensor], alpha: float, directions: tuple[str, ...], partition_mode: str) -> Tensor:
    """The plain loss, a term at a time, with a factor on the positive's terms."""
    queries, *docs = (torch.nn.functional.normalize(column, dim=1) for column in embeddings)
    n, every, total = len(queries), torch.cat(docs), []
    for i in range(n):
        own = (20 * queries[i] @ docs[0][i]).exp()
        others = {
            "query_to_doc": [queries[i] @ every[j] for j in range(len(every)) if j != i],
            "query_to_query": [queries[i] @ queries[j] for j in range(n) if j != i],
            "doc_to_query": [docs[0][i] @ queries[j] for j in range(n) if j != i],
            "doc_to_doc": [docs[0][i] @ every[j] for j in range(len(every)) if j % n != i],
        }
        sums = []
        for direction in directions:
            positives = own if direction in ("query_to_doc", "doc_to_query") else 0 * own
            sums.append(alpha * positives + sum((20 * s).exp() for s in others[direction]))
        logs = [sum(sums).log()] if partition_mode == "joint" else [part.log() for part in sums]  # type: ignore[union-attr]
        total.append(sum(logs) / len(logs) - own.log())
    return torch.stack(total).mean()  # type: ignore[arg-type]


@each_layout
def test_alpha_of_hn_nce(model: SentenceTransformer, directions: tuple[str, ...], partition_mode: str) -> None:
    """In one softmax over several directions, each of the positive's terms has the factor; 1 changes nothing."""
    host = losses.MultipleNegativesRankingLoss(model, directions=directions, partition_mode=partition_mode)
    embeddings = columns(3, 5, torch.float64)
    for alpha in (0.5, 1e-3, 1.0):
        got = value_and_gradients(undimix(host, HCL(0.0, 0.0, alpha)), embeddings)
        want = by_hand(embeddings, alpha, directions, partition_mode)
        for one, wanted in zip(got, [want, *torch.autograd.grad(want, embeddings)], strict=True):
            torch.testing.assert_close(one, wanted, rtol=1e-10, atol=1e-10)
    for one, same in zip(got, value_and_gradients(undimix(host, HCL(0.0, 0.0)), embeddings), strict=True):
        assert torch.equal(one, same)


@pytest.mark.parametrize("scope", ["all_negatives", "in_batch_negatives", "hard_negatives"])
@pytest.mark.parametrize(("margin", "strategy"), [(-0.1, "absolute"), (0.1, "relative")])
def test_positive_aware(model: SentenceTransformer, margin: float, strategy: str, scope: str) -> None:
    """A loop over queries and documents; the query's own hard negatives are of another kind than the rest."""
    embeddings = columns(3, 7, torch.float64)
    queries, *docs = (torch.nn.functional.normalize(column, dim=1) for column in embeddings)
    every, terms = torch.cat(docs), []
    for i in range(7):
        positive = queries[i] @ docs[0][i]
        limit = positive - margin * (abs(positive) if strategy == "relative" else 1)
        logits = [20 * positive]
        for j in range(14):
            s, hard = queries[i] @ every[j], j == i + 7
            inside = scope == "all_negatives" or (scope == "hard_negatives") == hard
            if j != i and not (inside and s > limit):
                logits.append(20 * s)
        terms.append(torch.stack(logits).logsumexp(dim=0) - logits[0])
    weighting = PositiveAware(margin, strategy, scope)
    got = value_and_gradients(undimix(losses.MultipleNegativesRankingLoss(model), weighting), embeddings)
    want = torch.stack(terms).mean()
    for one, wanted in zip(got, [want, *torch.autograd.grad(want, embeddings)], strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("contrast_anchors", [True, False])
def test_a_guide_has_hard_negatives_too(contrast_anchors: bool) -> None:
    tiny, seen = encoder(), []
    loss = undimix(losses.CachedGISTEmbedLoss(tiny, tiny, 0.2, contrast_anchors=contrast_anchors))
    with watch(lambda contrast, _: seen.append(contrast)):
        for count in (4, 2):
            parts = [[column] for column in columns(count, 5, torch.float64)]
            loss.calculate_loss(parts, [[column[0].detach()] for column in parts])
    k = 2 + contrast_anchors
    assert seen[0].hard_negative_columns is not None
    assert seen[0].hard_negative_columns.tolist() == [[5 + i, 10 + i] for i in range(5)]
    assert [list(other.hard_negative_columns.shape) for other in seen[1:k]] == [[5, 0]] * (k - 1)  # type: ignore[union-attr]
    assert [other.hard_negative_columns for other in seen[k:]] == [None] * k


@pytest.mark.parametrize("rows_per_example", [2, 3, 4])
def test_simcse_has_hard_negatives_too(rows_per_example: int) -> None:
    rows = torch.randn(5 * rows_per_example, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outputs = BaseModelOutput(last_hidden_state=rows[:, None])
    loss = SimCSELoss(0.05, SimilarityPenalty(5.0, "hard_negatives"), rows_per_example=rows_per_example)
    if rows_per_example == 2:
        with pytest.raises(ValueError, match=r"^scope: expected a loss with explicit hard negatives"):
            loss(outputs)
        return
    unit = torch.nn.functional.normalize(rows, dim=1)
    anchors, terms = unit[::rows_per_example], []
    for i in range(5):
        logits = [anchors[i] @ unit[rows_per_example * i + 1] / 0.05]
        for j in range(5):
            for place in range(1, rows_per_example):
                if (j, place) != (i, 1):
                    s = anchors[i] @ unit[rows_per_example * j + place]
                    logits.append(s / 0.05 + (5.0 * s if j == i else 0))
        terms.append(torch.stack(logits).logsumexp(dim=0) - logits[0])
    torch.testing.assert_close(loss(outputs), torch.stack(terms).mean(), rtol=1e-10, atol=1e-10)


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
