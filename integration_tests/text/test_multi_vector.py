"""Late interaction: with Uniform() the losses are sentence-transformers' own, cached or not; weights are as defined."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from integration_tests.matrix.cells import apart
from integration_tests.ranks import on_ranks
from integration_tests.text.tiny_models import saved
from tests.releases import is_older
from undimix_plugins import HCL, Contrast, MoCHi, UnDiMix, Uniform, info_nce, undimix

if is_older("sentence-transformers", "6.0"):
    pytest.skip("sentence-transformers has late interaction from 6.0 on", allow_module_level=True)

from sentence_transformers import (
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
)
from sentence_transformers.multi_vector_encoder import losses, scoring

TEXTS = [
    ("what is a cell", "a cell is a small unit of life", "a cell phone is a telephone"),
    ("where is rome", "rome lies in italy on the tiber", "paris lies in france"),
    ("who wrote hamlet", "shakespeare wrote the play hamlet", "goethe wrote faust"),
    ("how far is the moon", "the moon is a light second away from the earth", "the sun is far"),
    ("when did the war end", "it ended in may", "it began in september of that year"),
]
Make = Callable[..., nn.Module]
LOSSES: dict[str, Make] = {
    "plain": losses.MultiVectorMultipleNegativesRankingLoss,
    "in chunks": partial(losses.MultiVectorMultipleNegativesRankingLoss, mini_batch_size=2, score_mini_batch_size=2),
    "cached": partial(losses.CachedMultiVectorMultipleNegativesRankingLoss, mini_batch_size=2),
    "cached, scored by threes": partial(
        losses.CachedMultiVectorMultipleNegativesRankingLoss, mini_batch_size=2, score_mini_batch_size=3
    ),
}
SCORERS: dict[str, Any] = {"MaxSim": None, "mean": scoring.mean_colbert_scores, "XTR": scoring.XTRScores(top_k=4)}


def model() -> MultiVectorEncoder:
    torch.manual_seed(0)
    encoder = MultiVectorEncoder(saved(), device="cpu")
    return encoder.double()


def outcome(loss: nn.Module, columns: int = 3, rows: int = 5, first: int = 0) -> tuple[Tensor, Tensor]:
    """The value and the gradient at all of the model's parameters."""
    encoder = loss.model
    texts_of = TEXTS[first : first + rows]
    features = [encoder.preprocess([texts[column] for texts in texts_of]) for column in range(columns)]
    encoder.zero_grad()
    value = loss(features, None)
    value.backward()
    gradients = [parameter.grad.flatten() for parameter in encoder.parameters() if parameter.grad is not None]
    return value.detach(), torch.cat(gradients)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("name", LOSSES)
def test_uniform_is_the_hosts(name: str, scorer: str) -> None:
    encoder, settings = model(), {"similarity_fct": SCORERS[scorer], "scale": 2.0}
    for columns, rows in ((2, 5), (3, 4), (2, 1)):
        plain = outcome(LOSSES[name](encoder, **settings), columns, rows)
        uniform = outcome(undimix(LOSSES[name](encoder, **settings), Uniform()), columns, rows)
        for one, other in zip(uniform, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # scores are in float32
    assert plain[1].abs().sum() < 1e-5  # of a single pair


@pytest.mark.parametrize("method", [UnDiMix(), UnDiMix(mixing="linear"), UnDiMix(diversity=0), HCL()], ids=repr)
def test_weights_are_of_the_scores_and_of_the_means_of_tokens(method: Any) -> None:
    encoder = model()
    loss = undimix(losses.MultiVectorMultipleNegativesRankingLoss(encoder), method)
    features = [encoder.preprocess([texts[column] for texts in TEXTS]) for column in range(3)]
    outputs = [encoder(dict(part), task="document" if column else "query") for column, part in enumerate(features)]
    parts = [zip(of["token_embeddings"], of["attention_mask"], strict=True) for of in outputs]
    tokens = [[row[mask.bool()] for row, mask in part] for part in parts]
    documents = [tokens[column][i] for i in range(len(TEXTS)) for column in (1, 2)]  # query by query
    scores = torch.stack([torch.stack([(q @ d.T).amax(dim=1).sum() for d in documents]) for q in tokens[0]]).float()
    vectors = torch.stack([document.mean(dim=0) for document in documents])
    positives = torch.arange(len(TEXTS))[:, None] * 2
    wanted = info_nce(Contrast.of_scores(scores, positives, None, 1.0, vectors=vectors), method)
    torch.testing.assert_close(outcome(loss)[0], wanted.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [UnDiMix(), UnDiMix(mixing="linear"), HCL()], ids=repr)
def test_cached_is_the_same(method: Any) -> None:
    encoder = model()
    results = [outcome(undimix(LOSSES[name](encoder, scale=0.5), method)) for name in LOSSES]
    plain = outcome(LOSSES["plain"](encoder, scale=0.5))
    for value, gradient in results[1:]:
        torch.testing.assert_close(value, results[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-4, atol=1e-5)
    assert not torch.isclose(results[0][0], plain[0], rtol=1e-3)


def test_the_line_keeps_the_class_and_its_settings() -> None:
    for name, make in LOSSES.items():
        host = make(model(), scale=0.5, similarity_fct=scoring.mean_colbert_scores)
        loss = undimix(host, hardness=2.0)
        assert isinstance(loss, type(host))
        assert loss.similarity_fct is scoring.mean_colbert_scores
        assert loss.weighting == UnDiMix(hardness=2.0)
        assert undimix(loss) is loss
        value = outcome(loss)[0]
        assert loss.similarity_fct is scoring.mean_colbert_scores, name
        for same in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert torch.equal(outcome(same)[0], value)
        config = loss.get_config_dict()
        assert config["weighting"] == repr(loss.weighting)
        assert config["similarity_fct"] == host.get_config_dict()["similarity_fct"]
        assert "2206.01197" in loss.citation


def test_evaluation_without_gradients() -> None:
    for make in LOSSES.values():
        loss = undimix(make(model(), scale=0.5))
        value = outcome(loss)[0]
        features = [loss.model.preprocess([texts[column] for texts in TEXTS]) for column in range(3)]
        with torch.no_grad():
            torch.testing.assert_close(loss(features, None), value, rtol=1e-5, atol=1e-6)


def test_what_is_refused() -> None:
    encoder = model()
    with pytest.raises(ValueError, match="expected one that does without embeddings, which this loss lacks; MoCHi"):
        outcome(undimix(LOSSES["plain"](encoder), MoCHi(N=2, s=1, s_prime=1)))
    with pytest.raises(ValueError, match="last_layer: expected none with late interaction"):
        undimix(LOSSES["plain"](encoder), last_layer=nn.Linear(2, 2))
    with pytest.raises(TypeError, match="MultiVectorMarginMSELoss has no negatives to weight"):
        undimix(losses.MultiVectorMarginMSELoss(encoder))
    broken = undimix(LOSSES["plain"](encoder, similarity_fct=lambda *given, **masks: torch.full((5, 10), torch.nan)))
    with pytest.raises(ValueError, match="scores: expected finite"):
        outcome(broken)
    assert broken.similarity_fct.__name__ == "<lambda>"


@pytest.mark.parametrize("name", ["plain", "cached"])
def test_the_hosts_own_trainer(name: str, tmp_path: Path) -> None:
    moved = []
    for kind in ("plain", "uniform", "undimix"):
        encoder = model().float()
        start = torch.cat([parameter.detach().flatten() for parameter in encoder.parameters()])
        loss = LOSSES[name](encoder, scale=0.5)
        if kind != "plain":
            loss = undimix(loss, Uniform() if kind == "uniform" else None)
        arguments = MultiVectorEncoderTrainingArguments(
            str(tmp_path / kind),
            max_steps=3,
            optim="sgd",
            learning_rate=0.1,
            per_device_train_batch_size=5,
            use_cpu=True,
            report_to="none",
            seed=0,
        )
        columns = zip(("query", "positive", "negative"), zip(*TEXTS, strict=True), strict=True)
        data = Dataset.from_dict({name: list(texts) for name, texts in columns})
        MultiVectorEncoderTrainer(model=encoder, args=arguments, train_dataset=data, loss=loss).train()
        moved.append(torch.cat([parameter.detach().flatten() for parameter in encoder.parameters()]) - start)
    assert apart(moved[1], moved[0]) < 1e-4
    assert apart(moved[2], moved[0]) > 1e-2


# --- several processes

RANKS, ROWS = 2, 2
METHODS: dict[str, Any] = {"uniform": Uniform(), "undimix": UnDiMix(), "linear": UnDiMix(mixing="linear"), "hcl": HCL()}


def on_a_rank(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    torch.manual_seed(0)
    encoder = MultiVectorEncoder(folder, device="cpu").double()
    results: dict[str, Any] = {}
    for name in ("plain", "cached"):
        host = LOSSES[name](encoder, scale=0.5, gather_across_devices=True)
        results[name] = {"host": outcome(host, rows=ROWS, first=ROWS * rank)}
        for method, weighting in METHODS.items():
            results[name][method] = outcome(undimix(host, weighting), rows=ROWS, first=ROWS * rank)
        with pytest.raises(ValueError, match="expected as many rows on every process"):
            outcome(undimix(host), rows=ROWS - (rank == ranks - 1), first=ROWS * rank)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], MultiVectorEncoder]:
    """What each rank got, and the model that they had."""
    root: Path = tmp_path_factory.mktemp("ranks")
    encoder = model()
    encoder.save(str(root / "model"))
    return on_ranks(on_a_rank, RANKS, root, str(root / "model")), encoder


@pytest.mark.parametrize("name", ["plain", "cached"])
def test_uniform_is_the_host_on_every_rank(name: str, ranks: tuple[list[dict[str, Any]], MultiVectorEncoder]) -> None:
    for results in ranks[0]:
        for one, other in zip(results[name]["uniform"], results[name]["host"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # scores are in float32


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["plain", "cached"])
def test_the_ranks_together_are_one_process(
    name: str, method: str, ranks: tuple[list[dict[str, Any]], MultiVectorEncoder]
) -> None:
    results, encoder = ranks
    want = outcome(undimix(LOSSES[name](encoder, scale=0.5), METHODS[method]), rows=RANKS * ROWS)
    means = [torch.stack(parts).mean(dim=0) for parts in zip(*(of[name][method] for of in results), strict=True)]
    for one, other in zip(means, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if method != "uniform":
        assert not torch.isclose(means[0], results[0][name]["host"][0], rtol=1e-4)
