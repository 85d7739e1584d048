"""A schedule of the temperature and learned temperatures in transformers' and sentence-transformers' Trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, TrainerCallback

import undimix_sentence_transformers
from integration_tests.text.test_callbacks import (  # noqa: F401  # pairs and sentences are fixtures
    bert,
    history,
    pairs,
    plain_trainer,
    sentence_model,
    sentence_trainer,
    sentences,
)
from undimix_plugins import ISogCLR, cosine_temperature, undimix
from undimix_transformers import ImageTextLoss, SimCSELoss, TemperatureSchedule


class Recorder(TrainerCallback):
    """Records a loss's temperature at each micro-batch."""

    def __init__(self, *losses: Any) -> None:
        self.losses = losses
        self.temperatures: list[float] = []

    def record(self, *args: Any, **kwargs: Any) -> None:
        (temperature,) = {loss.temperature if hasattr(loss, "temperature") else 1 / loss.scale for loss in self.losses}
        self.temperatures.append(temperature)

    on_substep_end = on_optimizer_step = record


def cosines(steps: range, period: float, low: float = 0.05, high: float = 0.5) -> Any:
    return pytest.approx([cosine_temperature(step, period, low, high) for step in steps])


def of_schedule(trainer: Any) -> list[tuple[int, float]]:
    return [(entry["step"], entry["temperature"]) for entry in trainer.state.log_history if "temperature" in entry]


def test_one_callback_for_both_toolkits() -> None:
    assert undimix_sentence_transformers.TemperatureSchedule is TemperatureSchedule


def wrapped(model: SentenceTransformer, loss: Any) -> Any:
    return MatryoshkaLoss(model, loss, matryoshka_dims=[32, 16])


@pytest.mark.parametrize("form", ["plain", "weighted", "plain-wrapped", "weighted-wrapped"])
def test_schedule_in_sentence_transformers(form: str, pairs: Dataset, tmp_path: Path) -> None:  # noqa: F811
    """Its `scale` is 1 over the temperature of the step, which is logged, as is the Trainer's loss."""
    model = sentence_model()
    inner = loss = MultipleNegativesRankingLoss(model)
    if "wrapped" in form:
        loss = wrapped(model, loss)
    if "weighted" in form:
        loss = undimix(loss)
        inner = loss.loss if "wrapped" in form else loss
    trainer = sentence_trainer(model, loss, pairs, tmp_path, gradient_accumulation_steps=2, logging_steps=2)
    recorder = Recorder(inner)
    trainer.add_callback(TemperatureSchedule(0.05, 0.5, share=0.5))
    trainer.add_callback(recorder)
    trainer.train()
    assert recorder.temperatures[::2] == cosines(range(6), 3)
    assert recorder.temperatures[1::2] == recorder.temperatures[::2]
    assert inner.scale == pytest.approx(1 / recorder.temperatures[-1])
    assert [step for step, _ in of_schedule(trainer)] == [2, 4, 6]
    assert [value for _, value in of_schedule(trainer)] == pytest.approx(recorder.temperatures[2::4])
    assert len(history(trainer)) == 3


def test_schedule_of_a_loss_for_each_dataset(pairs: Dataset, tmp_path: Path) -> None:  # noqa: F811
    model = sentence_model()
    losses = {"first": MultipleNegativesRankingLoss(model), "second": undimix(MultipleNegativesRankingLoss(model))}
    data = DatasetDict({"first": pairs.select(range(24)), "second": pairs.select(range(24, 48))})
    trainer = sentence_trainer(model, losses, data, tmp_path)
    recorder = Recorder(*losses.values())
    trainer.add_callback(TemperatureSchedule(0.05, 0.5, steps=4))
    trainer.add_callback(recorder)
    trainer.train()
    assert recorder.temperatures == cosines(range(6), 4)


def test_schedule_resumed_is_schedule_whole(pairs: Dataset, tmp_path: Path) -> None:  # noqa: F811
    def run(resume: str | None) -> tuple[list[float], list[float]]:
        model = sentence_model()
        loss = undimix(MultipleNegativesRankingLoss(model))
        trainer = sentence_trainer(model, loss, pairs, tmp_path, save_strategy="steps")
        recorder = Recorder(loss)
        trainer.add_callback(TemperatureSchedule(0.05, 0.5, share=0.7))
        trainer.add_callback(recorder)
        trainer.train(resume_from_checkpoint=resume)
        return history(trainer), recorder.temperatures

    losses, temperatures = run(None)
    again, temperatures_again = run(str(tmp_path / "checkpoint-3"))
    assert temperatures == cosines(range(6), 4.2)
    assert temperatures_again == temperatures[3:]
    torch.testing.assert_close(torch.tensor(again), torch.tensor(losses), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["loss", "in-a-function", "trainer"])
def test_schedule_in_the_plain_trainer(form: str, sentences: list[Any], tmp_path: Path) -> None:  # noqa: F811
    """By epochs: 5 batches each."""
    loss = SimCSELoss()
    given: Any = loss
    if form == "in-a-function":
        given = lambda outputs, labels, num_items_in_batch=None: loss(outputs)  # noqa: E731
    trainer = plain_trainer(bert(), given, sentences, tmp_path, max_steps=-1, num_train_epochs=3)
    of = {"in-a-function": loss, "trainer": trainer}.get(form)
    trainer.add_callback(TemperatureSchedule(0.05, 0.5, epochs=4, of=of))
    recorder = Recorder(loss)
    trainer.add_callback(recorder)
    trainer.train()
    assert recorder.temperatures == pytest.approx([0.5] * 5 + [0.275] * 5 + [0.05] * 5)


@pytest.mark.parametrize("restores", [False, True])
def test_schedule_of_a_longer_training(restores: bool, sentences: list[Any], tmp_path: Path) -> None:  # noqa: F811
    """Where the Trainer restores callbacks, the settings of then and the 4 steps of then; else those of now."""
    begun = plain_trainer(bert(), SimCSELoss(), sentences, tmp_path, save_strategy="steps")
    begun.add_callback(TemperatureSchedule(0.05, 0.5, share=1.0))
    begun.train()
    loss, settings = SimCSELoss(), {"max_steps": 8, "restore_callback_states_from_checkpoint": restores}
    trainer = plain_trainer(bert(), loss, sentences, tmp_path, **settings)
    trainer.add_callback(TemperatureSchedule(0.1, 0.4, share=1.0))
    recorder = Recorder(loss)
    trainer.add_callback(recorder)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert recorder.temperatures == (cosines(range(2, 8), 4) if restores else cosines(range(2, 8), 8, 0.1, 0.4))


def clip() -> CLIPModel:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPModel(CLIPConfig(text_config={**small, "vocab_size": 50}, vision_config={**small, "image_size": 8}))


def test_schedule_refuses(sentences: list[Any], tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(TypeError, match=r"^of: expected the Trainer or its loss, got 5"):
        TemperatureSchedule(of=5)  # type: ignore[arg-type]
    for loss, message in (
        (ImageTextLoss(clip()), r"got ImageTextLoss without one; if its model learns the temperature, no schedule can"),
        (lambda *given, **named: None, r"expected a contrastive loss .* got none; for a loss of your own, or one that"),
    ):
        trainer = plain_trainer(bert(), loss, sentences, tmp_path)
        trainer.add_callback(TemperatureSchedule(steps=4))
        with pytest.raises(ValueError, match=message):
            trainer.train()


def test_learned_temperatures_in_the_plain_trainer(sentences: list[Any], tmp_path: Path) -> None:  # noqa: F811
    """The index comes as the label. In the model, the loss is in its checkpoints, and a resumed run goes on with it."""
    indexed = [{**row, "labels": number} for number, row in enumerate(sentences)]

    def run(resume: str | None) -> tuple[list[float], ISogCLR]:
        model = bert()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.criterion = ISogCLR(size=len(indexed))

        def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            rows = outputs.last_hidden_state[:, 0] + 0.01 * torch.arange(8)[:, None]
            return model.criterion(rows[::2], rows[1::2], labels[::2])

        trainer = plain_trainer(
            model, compute_loss, indexed, tmp_path, max_steps=6, label_names=["labels"], save_strategy="steps"
        )
        trainer.train(resume_from_checkpoint=resume)
        return history(trainer), model.criterion

    losses, criterion = run(None)
    assert (criterion.tau != 0.1).all()  # 5 batches an epoch
    again, resumed = run(str(tmp_path / "checkpoint-4"))
    torch.testing.assert_close(torch.tensor(again), torch.tensor(losses), rtol=0, atol=1e-4)
    torch.testing.assert_close(resumed.state_dict(), criterion.state_dict(), rtol=0, atol=1e-4)


class Individual(nn.Module):
    """ISogCLR of the two columns of a dataset, with the index as label."""

    def __init__(self, model: SentenceTransformer, size: int) -> None:
        super().__init__()
        self.model, self.loss = model, ISogCLR(size)

    def forward(self, features: Any, labels: Tensor | None) -> Tensor:
        anchors, positives = (self.model(column)["sentence_embedding"] for column in features)
        return self.loss(anchors, positives, labels)


def test_learned_temperatures_in_sentence_transformers(pairs: Dataset, tmp_path: Path) -> None:  # noqa: F811
    model = sentence_model()
    loss = Individual(model, len(pairs))
    indexed = pairs.remove_columns("label").add_column("label", list(range(len(pairs))))
    sentence_trainer(model, loss, indexed, tmp_path).train()  # 6 steps of 8, an epoch
    assert (loss.loss.tau != 0.1).all()
    assert loss.loss.log_s.isfinite().all()
    trainer = sentence_trainer(model, loss, pairs.remove_columns("label"), tmp_path)
    with pytest.raises(ValueError, match=r"^index: expected the place of each sample .* got None"):
        trainer.train()
