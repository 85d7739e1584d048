"""MultipleNegativesRankingLoss with sentence-transformers, with and without UnDiMix: one line apart.

After sentence-transformers' own example, on news articles and a MiniLM that need no download: the two halves
of an article are a pair. The score is the correlation of cosines with people's judgments of other documents.

    python examples/sentence_transformers_mnrl.py
    python examples/sentence_transformers_mnrl.py --data all-nli --max-steps 1000
"""

from __future__ import annotations

import time
from tempfile import TemporaryDirectory

import torch
from compare import compare
from datasets import Dataset, load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from texts import MINILM, halves, lee_articles, lee_correlation, quiet
from transformers import PrinterCallback, set_seed

from undimix_plugins import undimix

DATA = ("lee", "all-nli")


def pairs(data: str) -> Dataset:
    """Columns anchor and positive; all-nli is downloaded, as in sentence-transformers' examples."""
    if data == "all-nli":
        return load_dataset("sentence-transformers/all-nli", "pair", split="train")
    anchors, positives = zip(*map(halves, lee_articles()), strict=True)
    return Dataset.from_dict({"anchor": anchors, "positive": positives})


def train(
    weighted: bool,
    *,
    seed: int = 0,
    data: str = "lee",
    epochs: float = 0.5,
    max_steps: int = -1,
    progress: bool = True,
) -> tuple[SentenceTransformer, float, float]:
    """Fine-tunes MiniLM.

    Args:
        weighted: Whether the loss is UnDiMix's or plain.
        seed: Of dropout and the order of the pairs.
        data: "lee" or "all-nli".
        epochs: Passes over the pairs; 0 leaves the model as it was pretrained.
        max_steps: How many steps to take instead; -1 for the epochs.
        progress: Whether to show the Trainer's progress bar.

    Returns:
        The model, its correlation with Lee's judgments and the seconds of training.
    """
    quiet()
    set_seed(seed)
    model = SentenceTransformer(MINILM)
    longest = model.max_seq_length
    loss = MultipleNegativesRankingLoss(model, scale=10.0)
    if weighted:
        loss = undimix(loss)  # the one line

    with TemporaryDirectory() as folder:  # the Trainer makes one, though nothing is saved
        args = SentenceTransformerTrainingArguments(
            folder,
            num_train_epochs=epochs,
            max_steps=max_steps,
            per_device_train_batch_size=32,
            learning_rate=1e-4,
            batch_sampler="no_duplicates",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=not progress,
            seed=seed,
        )
        trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs(data), loss=loss)
    trainer.pop_callback(PrinterCallback)
    model.max_seq_length = 48  # so that a step takes seconds on a CPU
    start = time.perf_counter()
    if epochs:
        trainer.train()
    seconds = time.perf_counter() - start
    model.max_seq_length = longest
    return model, lee_correlation(lambda texts: model.encode(texts, convert_to_tensor=True)), seconds


def main() -> None:
    compare(
        str(__doc__),
        train,
        score="correlation with people",
        plain="MultipleNegativesRankingLoss",
        weighted="undimix(MultipleNegativesRankingLoss)",
        data=DATA,
        epochs=0.5,
    )


if __name__ == "__main__":
    main()
