"""With `Uniform()` each of our sentence-transformers losses is the host's own, to the gradients of the model."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import pickle
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sparse_encoder import losses as sparse_losses
from sentence_transformers.util import dot_score, fullname
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import set_seed

import undimix_sentence_transformers as ours
from integration_tests.text.tiny_models import encoder, features, news, sparse_autoencoder, splade
from tests.contrasts import Case
from tests.references import log_weights
from tests.releases import needs
from undimix_plugins import HCL, UnDiMix, Uniform, undimix
from undimix_plugins.monitoring.temperature import losses_with_temperature, set_temperature
from undimix_plugins.monitoring.warmup import set_hardness, weighted_losses

ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
Make = Callable[[SentenceTransformer], nn.Module]


def guide() -> SentenceTransformer:
    return encoder(seed=5).double().eval()


PLAIN: dict[str, tuple[int, Make]] = {
    "MNRL": (2, lambda model: losses.MultipleNegativesRankingLoss(model)),
    "MNRL-all": (4, lambda model: losses.MultipleNegativesRankingLoss(model, directions=ALL)),
    "MNRL-hardness": (3, lambda model: losses.MultipleNegativesRankingLoss(model, hardness_mode="all_negatives",
                                                                          hardness_strength=5.0)),
    "Symmetric": (3, lambda model: losses.MultipleNegativesSymmetricRankingLoss(model)),
    "GIST": (2, lambda model: losses.GISTEmbedLoss(model, guide(), temperature=0.1)),
    "GIST-relative": (3, lambda model: losses.GISTEmbedLoss(model, guide(), temperature=0.1, margin=0.1,
                                                           margin_strategy="relative")),
    "GIST-absolute": (3, lambda model: losses.GISTEmbedLoss(model, guide(), temperature=0.1, margin=0.05)),
    "GIST-no-anchors": (3, lambda model: losses.GISTEmbedLoss(model, guide(), 0.1, contrast_anchors=False)),
    "GIST-no-positives": (3, lambda model: losses.GISTEmbedLoss(model, guide(), 0.1, contrast_positives=False)),
}  # fmt: skip
CACHED: dict[str, tuple[int, Make]] = {
    "Cached": (2, lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=5)),
    "Cached-all": (4, lambda model: losses.CachedMultipleNegativesRankingLoss(
        model, mini_batch_size=7, directions=ALL)),
    "Cached-tokens": (3, lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=60)),
    "Cached-hardness": (3, lambda model: losses.CachedMultipleNegativesRankingLoss(
        model, mini_batch_size=5, hardness_mode="hard_negatives", hardness_strength=5.0)),
    "CachedSymmetric": (3, lambda model: losses.CachedMultipleNegativesSymmetricRankingLoss(model, mini_batch_size=5)),
    "CachedGIST": (4, lambda model: losses.CachedGISTEmbedLoss(model, guide(), 0.1, mini_batch_size=5, margin=0.05)),
}  # fmt: skip
EVERY = PLAIN | CACHED


def outcome(
    model: nn.Module, loss: nn.Module, columns: int, labels: Tensor | None = None, rows: int = 12, data: Any = None
) -> list[Tensor]:
    """The value, and the gradients of all parameters."""
    model.zero_grad()
    set_seed(1)
    value = loss(features(model, data or news(columns, rows)), labels)  # type: ignore[arg-type]
    if isinstance(value, dict):
        value = torch.stack(list(value.values())).sum()
    value.backward()
    gradients = (parameter.grad for parameter in model.parameters())
    return [value.detach().clone(), *(gradient.clone() for gradient in gradients if gradient is not None)]


def assert_same(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-10) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["", "dropout"])
@pytest.mark.parametrize("name", EVERY)
def test_uniform_is_the_host(name: str, dropout: float) -> None:
    columns, make = EVERY[name]
    model = encoder(dropout=dropout).double().train()
    host = make(model)
    want = outcome(model, host, columns)
    assert_same(outcome(model, undimix(host, Uniform()), columns), want)
    assert_same(outcome(model, host, columns), want)  # which was left as it was
    if "hardness" not in name:
        weighted = outcome(model, undimix(host), columns)
        assert (weighted[0] - want[0]).abs() > 1e-4  # the control


@pytest.mark.parametrize("name", EVERY)
def test_evaluation_is_the_hosts(name: str) -> None:
    columns, make = EVERY[name]
    model = encoder().double().eval()
    host = make(model)
    inputs = features(model, news(columns, 9))
    with torch.no_grad():
        got, want = (loss(copy.deepcopy(inputs), None) for loss in (undimix(host, Uniform()), host))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


CLASSES = {
    "MNRL": (ours.MultipleNegativesRankingLoss, ()),
    "Symmetric": (ours.MultipleNegativesSymmetricRankingLoss, ()),
    "Cached": (ours.CachedMultipleNegativesRankingLoss, ()),
    "CachedSymmetric": (ours.CachedMultipleNegativesSymmetricRankingLoss, ()),
    "GIST": (ours.GISTEmbedLoss, (guide,)),
    "CachedGIST": (ours.CachedGISTEmbedLoss, (guide,)),
}


@pytest.mark.parametrize("name", CLASSES)
def test_class_and_verb(name: str) -> None:
    ours_class, arguments = CLASSES[name]
    host_class = getattr(losses, ours_class.__name__)
    model = encoder().double()
    further = [make() for make in arguments]
    by_class = ours_class(model, *further, weighting=UnDiMix(hardness=2.0))
    plain = host_class(model, *further)
    by_verb = undimix(plain, hardness=2.0)
    assert type(by_verb) is ours_class
    assert isinstance(by_verb, host_class)
    assert_same(outcome(model, by_class, 3), outcome(model, by_verb, 3))
    assert by_class.get_config_dict()["weighting"] == repr(UnDiMix(hardness=2.0))
    assert getattr(plain, "citation", "").strip() in by_class.citation
    assert "2206.01197" in by_class.citation
    # strict both ways
    assert by_class.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(by_class.state_dict())
    by_class.load_state_dict(plain.state_dict())
    value = outcome(model, by_class, 3)[0]
    for copied in (copy.deepcopy(by_class), pickle.loads(pickle.dumps(by_class))):
        torch.testing.assert_close(outcome(copied.model, copied, 3)[0], value)
    by_class.weighting = HCL()  # a schedule sets it
    assert_same(outcome(model, by_class, 3), outcome(model, undimix(plain, HCL()), 3))


@pytest.mark.parametrize("method", [UnDiMix(), UnDiMix(mixing="linear"), HCL()], ids=repr)
@pytest.mark.parametrize(("cached", "plain"), [("Cached-all", "MNRL-all"), ("CachedGIST", "GIST-own")])
def test_cached_is_uncached(cached: str, plain: str, method: Any) -> None:
    columns, make = CACHED[cached]
    uncached = dict(PLAIN)
    uncached["GIST-own"] = (2, lambda model: losses.GISTEmbedLoss(model, guide(), 0.1, margin=0.05))
    columns = min(columns, 3) if "GIST" in cached else columns
    model = encoder().double()
    got, want = (undimix(of(model), method) for of in (make, uncached[plain][1]))
    assert_same(outcome(model, got, columns), outcome(model, want, columns), 1e-9)


@pytest.mark.parametrize("method", [UnDiMix(), UnDiMix(mixing="linear")], ids=repr)
def test_gist_weighted(method: UnDiMix) -> None:
    """Three contrasts in one softmax, an anchor at a time, their negatives what the guide leaves."""
    n, t, margin = 8, 0.2, 0.05
    generator = torch.Generator().manual_seed(0)
    a, p, h, ga, gp, gh = torch.randn(6, n, 5, generator=generator, dtype=torch.float64)
    model = encoder().double()
    loss = undimix(losses.CachedGISTEmbedLoss(model, guide(), t, margin=margin), method)
    got = loss.calculate_loss([[a[:3], a[3:]], [p], [h]], [[ga], [gp], [gh]])
    a, p, h, ga, gp, gh = (normalize(rows, dim=1) for rows in (a, p, h, ga, gp, gh))
    threshold = [float(ga[i] @ gp[i]) - margin for i in range(n)]
    sums = []
    for anchors, partners, pool, of_anchors, of_pool, own_columns in (
        (a, p, torch.cat([p, h]), ga, torch.cat([gp, gh]), False),
        (a, p, a, ga, ga, True),
        (p, a, p, gp, gp, True),
    ):
        judged = [[j for j in range(len(pool)) if of_anchors[i] @ of_pool[j] > threshold[i]] for i in range(n)]
        excluded = judged if own_columns else [[i, *row] for i, row in enumerate(judged)]
        own = list(range(n)) if own_columns else [-1] * n
        case = Case(anchors, partners, pool, t, own, excluded, not own_columns)
        assert any(0 < len(case.negatives(i)) < len(pool) - 1 for i in range(n))
        weighted = log_weights(case, method).exp() * (anchors @ pool.T / t).exp()
        sums.append(torch.stack([weighted[i, case.negatives(i)].sum() for i in range(n)]))
    positive = ((a * p).sum(dim=1) / t).exp()
    torch.testing.assert_close(got, -(positive / (positive + sum(sums))).log().mean(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["GIST", "CachedGIST"])
def test_a_guide_rates_a_text_that_stands_twice_as_once(name: str) -> None:
    """In float32 too, where rounding would decide whether it is rated above itself; the host keeps it as a negative."""
    data = news(2, 12).to_dict()
    data["positive"] = [data["positive"][i // 2] for i in range(12)]  # each of two questions
    model = encoder()
    rating = encoder(seed=5).eval()
    make = losses.GISTEmbedLoss if name == "GIST" else losses.CachedGISTEmbedLoss
    host = make(model, rating, temperature=0.1)
    got, want = (
        outcome(model, loss, 2, data=type(news()).from_dict(data)) for loss in (undimix(host, Uniform()), host)
    )
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)


def test_a_guide_with_another_tokenizer() -> None:
    model, other = encoder().double(), guide()
    other.max_seq_length = 12  # shorter than the model's: texts have to be tokenised again
    for host in (losses.GISTEmbedLoss(model, other, 0.1), losses.CachedGISTEmbedLoss(model, other, 0.1)):
        assert host.must_retokenize
        assert_same(outcome(model, undimix(host, Uniform()), 3), outcome(model, host, 3))


# --- losses that modify another


def matryoshka(model: SentenceTransformer, loss: nn.Module) -> nn.Module:
    return losses.MatryoshkaLoss(model, loss, matryoshka_dims=[16, 8, 3])


def adaptive(model: SentenceTransformer, loss: nn.Module) -> nn.Module:
    return losses.AdaptiveLayerLoss(model, loss)


def matryoshka_2d(model: SentenceTransformer, loss: nn.Module) -> nn.Module:
    return losses.Matryoshka2dLoss(model, loss, matryoshka_dims=[16, 8])


@pytest.mark.parametrize("wrap", [matryoshka, adaptive, matryoshka_2d], ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("name", ["MNRL", "Symmetric", "GIST", "Cached", "CachedGIST"])
def test_wrappers(name: str, wrap: Callable[[SentenceTransformer, nn.Module], nn.Module]) -> None:
    columns, make = EVERY[name]
    model = encoder().double()
    if name in CACHED and wrap is not matryoshka:
        needs("sentence-transformers", "5.7", "it does not warn of every cached loss in a loss that can't have one")
        with pytest.warns(UserWarning, match="AdaptiveLayerLoss is not compatible with"):
            wrap(model, undimix(make(model)))
        with pytest.warns(UserWarning, match="AdaptiveLayerLoss is not compatible with"):
            wrap(model, make(model))
        return
    if name == "GIST":
        needs("sentence-transformers", "5.7", "its guide writes over the embeddings that a MatryoshkaLoss keeps")
    want = outcome(model, wrap(model, make(model)), columns)
    assert_same(outcome(model, undimix(wrap(model, make(model)), Uniform()), columns), want)
    assert_same(outcome(model, wrap(model, undimix(make(model), Uniform())), columns), want)
    wrapper = wrap(model, make(model))
    weighted = undimix(wrapper)
    assert isinstance(weighted, type(wrapper))
    assert fullname(weighted) == fullname(wrapper)  # which a model's card names
    assert weighted.get_config_dict() == wrapper.get_config_dict()
    assert weighted.state_dict().keys() == wrapper.state_dict().keys()
    assert undimix(weighted) is weighted
    around, within = outcome(model, weighted, columns), outcome(model, wrap(model, undimix(make(model))), columns)
    assert_same(around, within)
    assert (around[0] - want[0]).abs() > 1e-4
    assert_same(outcome(model, wrapper, columns), want)  # which was left as it was
    assert_same(outcome(model, copy.deepcopy(weighted), columns)[:1], around[:1])


@pytest.mark.parametrize("inside", [False, True], ids=["", "weighted-inside"])
@pytest.mark.parametrize("wrap", [matryoshka, adaptive, matryoshka_2d], ids=lambda wrap: wrap.__name__)
def test_settings_of_a_wrapper_reach_the_loss_inside(
    wrap: Callable[[SentenceTransformer, nn.Module], nn.Module], inside: bool
) -> None:
    model = encoder().double()
    host = losses.MultipleNegativesRankingLoss(model)
    loss = undimix(wrap(model, undimix(host) if inside else host))
    innermost = loss.loss.loss if wrap is matryoshka_2d else loss.loss
    assert loss.weighting is innermost.weighting
    assert loss.last_layer is None
    for changed in (loss, pickle.loads(pickle.dumps(loss)), undimix(loss, hardness=2.0)):
        changed.weighting = HCL()
        assert changed.weighting == HCL()
        got = outcome(changed.model, changed, 2)
        assert_same(got, outcome(model, undimix(wrap(model, host), HCL()), 2))
    loss.exclude_duplicates = True
    assert innermost.exclude_duplicates is True
    assert "exclude_duplicates" not in vars(loss)
    with pytest.raises(AttributeError, match="has no attribute 'weight'"):
        loss.weight  # noqa: B018


@pytest.mark.parametrize("name", ["MNRL", "GIST"])
@pytest.mark.parametrize("wrap", [matryoshka, adaptive, matryoshka_2d], ids=lambda wrap: wrap.__name__)
def test_duplicates_inside_a_wrapper(name: str, wrap: Callable[[SentenceTransformer, nn.Module], nn.Module]) -> None:
    """It calls the loss inside several times with the same features, into which the model has written by then."""
    data = news(2, 8).to_dict()
    data["positive"][4] = data["positive"][1]  # a passage of two questions, as if these were of a class
    data, labels = type(news()).from_dict(data), torch.tensor([0, 1, 2, 3, 1, 5, 6, 7])
    model = encoder().double()
    host = losses.MultipleNegativesRankingLoss(model)
    if name == "GIST":  # a margin that leaves duplicates in
        host = losses.GISTEmbedLoss(model, guide(), 0.1, margin=-0.02)
    by_text, by_class = (
        undimix(wrap(model, host), **{name: True}) for name in ("exclude_duplicates", "exclude_same_class")
    )
    got = outcome(model, by_text, 2, data=data)
    assert_same(got, outcome(model, by_class, 2, labels, data=data))
    assert (got[0] - outcome(model, undimix(wrap(model, host)), 2, data=data)[0]).abs() > 1e-4
    if wrap is matryoshka:
        twin: Any = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=5)
        if name == "GIST":
            twin = losses.CachedGISTEmbedLoss(model, guide(), 0.1, mini_batch_size=5, margin=-0.02)
        assert_same(got, outcome(model, undimix(wrap(model, twin), exclude_duplicates=True), 2, data=data), 1e-9)


def test_a_cached_loss_that_sits_in_a_matryoshka_already() -> None:
    """Which has set `calculate_loss` on the object: it would be called in place of a weighted class's."""
    model = encoder().double()
    cached = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=5)
    wrapper = matryoshka(model, cached)
    want = outcome(model, matryoshka(model, undimix(losses.CachedMultipleNegativesRankingLoss(model))), 2)
    inner = undimix(cached)
    assert isinstance(inner, ours.CachedMultipleNegativesRankingLoss)
    wrapper.loss = inner
    assert_same(outcome(model, wrapper, 2), want, 1e-9)
    twice = losses.MatryoshkaLoss(model, cached, matryoshka_dims=[16])  # around the other
    got = outcome(model, undimix(twice), 2)
    assert (got[0] - outcome(model, twice, 2)[0]).abs() > 1e-4


@pytest.mark.parametrize("wrap", [lambda model, loss: loss, matryoshka], ids=["", "matryoshka"])
@pytest.mark.parametrize("name", ["MNRL", "Cached"])
def test_a_schedule_softens_a_loss_once(name: str, wrap: Callable[[SentenceTransformer, nn.Module], nn.Module]) -> None:
    """Also where the host's loss is inside: a cached loss, or a wrapper."""
    model = encoder().double()
    loss = wrap(model, undimix(EVERY[name][1](model), hardness=2.0))
    (found,) = weighted_losses(loss)
    for share in (0.25, 0.5, 1.0):
        set_hardness(found, share)
        assert found.weighting == UnDiMix(hardness=2.0 * share)
        at_share = wrap(model, undimix(EVERY[name][1](model), hardness=2.0 * share))
        assert_same(outcome(model, loss, 2), outcome(model, at_share, 2))


# --- sparse encoders, as wide as their vocabulary


@pytest.mark.parametrize("cached", [False, True], ids=["SpladeLoss", "CachedSpladeLoss"])
def test_splade(cached: bool) -> None:
    model = splade().double()
    wrap = sparse_losses.CachedSpladeLoss if cached else sparse_losses.SpladeLoss
    settings = {"document_regularizer_weight": 1e-3, "query_regularizer_weight": 1e-3}

    def make(plug: Callable[[nn.Module], nn.Module]) -> nn.Module:
        return wrap(model, plug(sparse_losses.SparseMultipleNegativesRankingLoss(model, scale=0.001)), **settings)

    want = outcome(model, make(lambda loss: loss), 3)
    for loss in (make(lambda inner: undimix(inner, Uniform())), undimix(make(lambda inner: inner), Uniform())):
        assert_same(outcome(model, loss, 3), want)
    weighted = outcome(model, undimix(make(lambda inner: inner)), 3)
    assert (weighted[0] - want[0]).abs() > 1e-4
    assert all(part.isfinite().all() for part in weighted)
    schedule = undimix(make(lambda inner: inner))
    schedule.weighting = Uniform()
    assert_same(outcome(model, schedule, 3), want)


def test_csr() -> None:
    model = sparse_autoencoder().double()
    host = sparse_losses.CSRLoss(model)
    want = outcome(model, host, 3)
    assert_same(outcome(model, undimix(host, Uniform()), 3), want)
    weighted = undimix(host)
    assert (outcome(model, weighted, 3)[0] - want[0]).abs() > 1e-4
    weighted.weighting = Uniform()
    assert_same(outcome(model, weighted, 3), want)


def test_sparse_loss_alone_is_refused_as_by_the_host() -> None:
    model = sparse_autoencoder()
    loss = undimix(sparse_losses.SparseMultipleNegativesRankingLoss(model))
    assert isinstance(loss, ours.SparseMultipleNegativesRankingLoss)
    with pytest.raises(AttributeError, match="Use it with SpladeLoss or CSRLoss"):
        loss(features(model, news()), None)
    with pytest.raises(
        TypeError, match=r"options: expected .* for SparseMultipleNegativesRankingLoss, got exclude_dup"
    ):
        undimix(loss, exclude_duplicates=True)


# --- what the batch says is no negative


def without(negatives: list[list[int]], model: SentenceTransformer, data: Any, scale: float = 20.0) -> Tensor:
    """The plain loss, one query at a time, over the documents (positives, then hard negatives) that are given."""
    columns = [normalize(model(part)["sentence_embedding"], dim=1) for part in features(model, data)]
    queries, docs = columns[0], torch.cat(columns[1:])
    rows = []
    for i, others in enumerate(negatives):
        scores = queries[i] @ docs[[i, *others]].T * scale
        rows.append(-scores.log_softmax(dim=0)[0])
    return torch.stack(rows).mean()


@pytest.mark.parametrize("name", ["MNRL", "Cached"])
def test_duplicates(name: str) -> None:
    data = news(3, 6).to_dict()
    data["positive"][4] = data["positive"][1]  # a passage of two questions
    data["anchor"][5] = data["anchor"][0]  # a question with two passages
    data["negative_1"][3] = data["positive"][2]  # a hard negative that is another's passage
    data["negative_1"][5] = data["anchor"][2]  # and one that is a question
    data = type(news()).from_dict(data)
    model = encoder().double()
    make = EVERY[name][1]
    others = [[j for j in range(12) if j != i] for i in range(6)]
    gone = {0: [5], 1: [4], 2: [9, 11], 3: [], 4: [1], 5: [0]}
    kept = [[j for j in row if j not in gone[i]] for i, row in enumerate(others)]
    for settings, negatives in (({}, others), ({"exclude_duplicates": True}, kept)):
        got = outcome(model, undimix(make(model), Uniform(), **settings), 3, data=data)[0]
        torch.testing.assert_close(got, without(negatives, model, data), rtol=1e-10, atol=1e-10)
    chosen = undimix(make(model), exclude_duplicates=True)
    assert "exclude_duplicates=True" in repr(chosen)
    assert chosen.get_config_dict()["exclude_duplicates"] is True
    assert outcome(model, chosen, 3, data=data)[0].isfinite()


@pytest.mark.parametrize("name", ["MNRL", "Cached"])
def test_labels(name: str) -> None:
    data, labels = news(3, 6), torch.tensor([0, 1, 0, 2, 1, 0])
    model = encoder().double()
    make = EVERY[name][1]
    negatives = [[j for j in range(12) if j >= 6 or labels[j] != labels[i]] for i in range(6)]
    loss = undimix(make(model), Uniform(), exclude_same_class=True)
    got = outcome(model, loss, 3, labels, data=data)[0]
    torch.testing.assert_close(got, without(negatives, model, data), rtol=1e-10, atol=1e-10)
    assert_same(
        outcome(model, undimix(loss, Uniform(), exclude_same_class=False), 3, labels), outcome(model, make(model), 3)
    )
    with pytest.raises(
        ValueError, match=r"exclude_same_class: expected a class for each sample, got none; the dataset needs"
    ):
        loss(features(model, data), None)
    with pytest.raises(ValueError, match=r"labels: expected one for each sample, of shape \[6\], got \[5\]"):
        loss(features(model, data), labels[:5])


def test_settings_where_there_are_no_texts() -> None:
    model = encoder()
    columns, labels = list(torch.randn(2, 4, 8)), torch.tensor([0, 1, 0, 2])
    loss = undimix(losses.MultipleNegativesRankingLoss(model), exclude_same_class=True)
    plain = undimix(losses.MultipleNegativesRankingLoss(model))
    with_labels = loss.compute_loss_from_embeddings(columns, labels)
    assert (with_labels - plain.compute_loss_from_embeddings(columns, None)).abs() > 1e-4
    with pytest.raises(ValueError, match="exclude_same_class: expected a class for each sample"):
        loss.compute_loss_from_embeddings(columns, None)
    with pytest.raises(ValueError, match="exclude_duplicates: expected the loss to be called with texts"):
        undimix(plain, exclude_duplicates=True).compute_loss_from_embeddings(columns, None)


@pytest.mark.parametrize("name", ["MNRL-hardness", "Cached-hardness"])
def test_settings_beside_a_hardness_mode_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="hardness_mode: expected None beside exclude_duplicates, got '"):
        undimix(EVERY[name][1](encoder()), Uniform(), exclude_duplicates=True)


@pytest.mark.parametrize("name", ["GIST", "CachedGIST", "MNRL-all", "Symmetric", "CachedSymmetric"])
def test_exclusions_in_every_contrast(name: str) -> None:
    """A batch of which every second text is the one before: the duplicates leave each contrast."""
    columns, make = EVERY[name]
    if "GIST" in name:  # a margin that leaves duplicates in

        def make(model: SentenceTransformer) -> nn.Module:
            host = losses.GISTEmbedLoss if name == "GIST" else losses.CachedGISTEmbedLoss
            return host(model, guide(), 0.1, margin=-0.02)

    single = news(columns, 6)
    double = type(single).from_dict(
        {key: [text for text in texts for _ in range(2)] for key, texts in single.to_dict().items()}
    )
    model = encoder().double()
    plain, excluding = (undimix(make(model), Uniform(), exclude_duplicates=choice) for choice in (False, True))
    with_all, without_duplicates = (outcome(model, loss, columns, data=double)[0] for loss in (plain, excluding))
    assert with_all - without_duplicates > 1e-3
    assert_same(outcome(model, excluding, columns, data=single), outcome(model, plain, columns, data=single))


def test_duplicates_of_a_static_embedding_and_of_flattened_inputs() -> None:
    from undimix_sentence_transformers.exclusions import text_keys

    padded = {
        "input_ids": torch.tensor([[7, 8, 0, 0], [7, 8, 9, 4], [0, 0, 7, 8], [8, 7, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]]),
    }
    flat = torch.tensor([7, 8, 7, 8, 9, 4, 7, 8, 8, 7])
    keys = text_keys(padded)
    assert torch.equal(keys, text_keys({"input_ids": flat, "offsets": torch.tensor([0, 2, 6, 8])}))
    assert torch.equal(keys, text_keys({"input_ids": flat[None], "cu_seq_lens_q": torch.tensor([0, 2, 6, 8, 10])}))
    assert keys[0] == keys[2]
    assert len(keys.unique()) == 3
    with pytest.raises(
        ValueError, match=r"exclude_duplicates: expected inputs with 'input_ids'.*got \['pixel_values'\]"
    ):
        text_keys({"pixel_values": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"exclude_duplicates: expected texts alone.*got \['pixel_values'\] beside"):
        text_keys({**padded, "pixel_values": torch.zeros(4, 3)})
    written = {**padded, "sentence_embedding": torch.zeros(4, 3)}
    assert torch.equal(text_keys(written), keys)  # of before the model wrote
    padded["input_ids"][3] = padded["input_ids"][0]
    for late in (written, {**written, "input_ids": padded["input_ids"].clone()}):
        with pytest.raises(ValueError, match=r"exclude_duplicates: expected inputs as the model is given them"):
            text_keys(late)


def test_keys_do_not_collide() -> None:
    """All texts of three tokens out of 40, and empty ones."""
    tokens = torch.cartesian_prod(*[torch.arange(40)] * 3)
    keys = ours.exclusions.text_keys({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    assert len(keys.unique()) == 40**3


# --- gradients at the last layer's weight


@pytest.mark.parametrize("name", ["MNRL", "MNRL-all", "Cached", "GIST", "CachedGIST"])
def test_gradients_at_the_weight(name: str) -> None:
    """The layer's inputs reach the contrasts: as worked out from embeddings and inputs that are taken by hand."""
    columns, make = EVERY[name]
    model = encoder(dense=True).double()
    linear = model[-1].linear
    weighted = undimix(make(model), last_layer=linear)
    assert weighted.weighting == UnDiMix(gradient="weight")
    at_weight = outcome(model, weighted, columns)
    assert_same(outcome(model, weighted, columns), at_weight)
    at_embedding = outcome(model, undimix(make(model)), columns)
    assert (at_weight[0] - at_embedding[0]).abs() > 1e-5  # the control
    with pytest.raises(TypeError, match=r"last_layer: expected the nn.Linear .*, got Dense"):
        undimix(make(model), last_layer=model[-1])
    if name != "MNRL":
        return
    taken: list[Tensor] = []
    handle = linear.register_forward_hook(lambda layer, inputs, out: taken.append(inputs[0].detach()))
    embeddings = [model(part)["sentence_embedding"] for part in features(model, news(columns, 12))]
    handle.remove()
    z, g = [normalize(part, dim=1).detach() for part in embeddings], [[], []]
    for side in range(2):
        for i in range(12):
            candidates = z[1 - side]
            logits = candidates @ normalize(linear(taken[side][i]), dim=0) * 5
            task = nn.functional.cross_entropy(logits[None], logits.argmax()[None])
            g[side].append(torch.autograd.grad(task, linear.weight)[0].flatten())
    scores = torch.stack(g[0]) @ torch.stack(g[1]).T
    method = UnDiMix(similarity=0, diversity=0, influence=1.0, gradient="weight")
    rows = []
    for i in range(12):
        others = [j for j in range(12) if j != i]
        chosen = scores[i, others]
        weights = ((chosen - chosen.mean()) / chosen.std(correction=0)).softmax(dim=0) * 11
        negative = (weights * (z[0][i] @ z[1][others].T * 5).exp()).sum()
        positive = (z[0][i] @ z[1][i] * 5).exp()
        rows.append(-(positive / (positive + negative)).log())
    loss = losses.MultipleNegativesRankingLoss(model, scale=5)  # at which weights do not fade
    got = outcome(model, undimix(loss, method, last_layer=linear), columns)[0]
    torch.testing.assert_close(got, torch.stack(rows).mean(), rtol=1e-8, atol=1e-8)


def test_a_last_layer_inside_matryoshka_is_refused() -> None:
    """Whose embeddings are cut, so that they are no longer the layer's outputs."""
    model = encoder(dense=True).double()
    loss = matryoshka(model, undimix(losses.MultipleNegativesRankingLoss(model), last_layer=model[-1].linear))
    with pytest.raises(ValueError, match="last_layer: expected the loss to be given this Linear's outputs as they are"):
        outcome(model, loss, 2)


@pytest.mark.parametrize("name", ["MNRL", "Cached", "GIST", "CachedGIST"])
def test_the_last_layer_of_another_model(name: str) -> None:
    """As a Trainer with `model_init` puts one into the loss."""
    columns, make = EVERY[name]
    model, other = encoder(dense=True).double(), encoder(dense=True).double()
    want = outcome(model, undimix(make(model), last_layer=model[-1].linear), columns)
    loss = undimix(make(encoder(seed=3, dense=True).double()), last_layer=None)
    loss = undimix(loss, last_layer=loss.model[-1].linear)
    trainer = SentenceTransformerTrainer.__new__(SentenceTransformerTrainer)
    trainer.override_model_in_loss(loss, other)
    assert_same(outcome(other, loss, columns), want)
    with pytest.raises(TypeError, match=r"^last_layer: expected the nn.Linear .*, got NoneType"):
        trainer.override_model_in_loss(loss, encoder())


def test_import_warns_of_no_loss_that_nobody_uses() -> None:
    module = ours.multiple_negatives_ranking
    spec = importlib.util.spec_from_file_location("again", module.__file__)
    assert spec is not None
    assert spec.loader is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_deprecated_losses_warn_as_the_hosts() -> None:
    needs("sentence-transformers", "5.3", "these losses are not deprecated")
    model = encoder()
    for cls in (ours.MultipleNegativesSymmetricRankingLoss, ours.CachedMultipleNegativesSymmetricRankingLoss):
        with pytest.warns(DeprecationWarning, match=rf"The {cls.__name__} is deprecated") as caught:
            cls(model)
        assert Path(caught[0].filename) == Path(__file__)


class Registered:
    """A user's base that keeps account of its subclasses."""

    tags: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, tag: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Registered.tags[cls.__name__] = tag


@pytest.mark.parametrize("base", [ours.MultipleNegativesRankingLoss, ours.MultipleNegativesSymmetricRankingLoss])
def test_a_subclass_with_another_base(base: type[Any]) -> None:
    """What bases do with their subclasses is done, other warnings than the host's of a deprecated loss are given."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = types.new_class(f"My{base.__name__}", (base, Registered), {"tag": "mine"})
    assert Registered.tags[made.__name__] == "mine"

    class Deprecating:
        def __init_subclass__(cls) -> None:
            warnings.warn("another deprecation", DeprecationWarning, stacklevel=2)

    with pytest.warns(DeprecationWarning, match="another deprecation") as caught:
        types.new_class("Warned", (base, Deprecating))
    assert len(caught) == 1


def test_a_temperature_for_a_scale_is_told_once() -> None:
    model = encoder()
    for make in (ours.MultipleNegativesRankingLoss, ours.CachedMultipleNegativesRankingLoss):
        with pytest.warns(UserWarning, match="all candidates count nearly the same") as caught:
            make(model, scale=0.2)
        assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.MultipleNegativesRankingLoss(model, scale=0.05, similarity_fct=dot_score)


def test_a_cached_loss_has_its_own_settings() -> None:
    """In new releases these are those of a loss inside, which is not shared."""
    host = losses.CachedMultipleNegativesRankingLoss(encoder(), mini_batch_size=5)
    weighted = undimix(host)
    weighted.scale = 5.0
    assert (host.scale, weighted.scale, undimix(weighted, UnDiMix(hardness=2.0)).scale) == (20.0, 5.0, 5.0)
    for changed in (weighted, undimix(host)):
        (loss,) = losses_with_temperature(changed)
        set_temperature(loss, 0.1)
        assert (changed.scale, host.scale) == (pytest.approx(10.0), 20.0)


# --- what can't be weighted


def made_without_a_model(package: str, name: str) -> nn.Module:
    cls = getattr(importlib.import_module(f"sentence_transformers.{package}.losses"), name)
    return cls.__new__(cls)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda model: losses.CoSENTLoss(model), "CoSENTLoss has no negatives to weight or is not supported"),
        (lambda model: losses.TripletLoss(model), "TripletLoss can't be weighted: it compares an anchor with one neg"),
        (lambda model: losses.MatryoshkaLoss(model, losses.CoSENTLoss(model), [16]), "CoSENTLoss has no negatives"),
        (
            lambda model: made_without_a_model("cross_encoder", "MultipleNegativesRankingLoss"),
            "can't be weighted: a cross-encoder scores a pair of texts at once",
        ),
        (
            lambda model: made_without_a_model("multi_vector_encoder", "MultiVectorMarginMSELoss"),
            "MultiVectorMarginMSELoss has no negatives to weight or is not supported",
        ),
    ],
)
def test_refused_with_a_reason(make: Make, why: str) -> None:
    with pytest.raises(TypeError, match=why):
        undimix(make(encoder()))


def test_a_model_is_told_from_a_loss() -> None:
    message = (
        r"^loss: SentenceTransformer looks like a model, not a loss: weight the loss that trains it; supported: "
        r"sentence_transformers: \w+Loss(, \w+Loss)*$"
    )
    with pytest.raises(TypeError, match=message):
        undimix(encoder())
