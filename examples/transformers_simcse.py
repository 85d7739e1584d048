"""Unsupervised SimCSE with the plain `transformers.Trainer`, with and without UnDiMix: one argument apart.

Dropout makes two views of each text. The texts are news articles, cut short; they and MiniLM need no
download. The score is the correlation of cosines with people's judgments of other documents.

    python examples/transformers_simcse.py
    python examples/transformers_simcse.py --data all-nli --max-steps 1000
"""

from __future__ import annotations

import time
from tempfile import TemporaryDirectory

import torch
from compare import compare
from datasets import Dataset, load_dataset
from texts import MINILM, lee_articles, lee_correlation, quiet
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from undimix_plugins import UnDiMix, Uniform
from undimix_transformers import SimCSELoss, TwoViews

DATA = ("lee", "all-nli")


def texts(data: str) -> Dataset:
    """A column text; all-nli's sentences are downloaded."""
    if data == "all-nli":
        pairs = load_dataset("sentence-transformers/all-nli", "pair", split="train")
        return pairs.select_columns("anchor").rename_column("anchor", "text")
    return Dataset.from_dict({"text": lee_articles()})


def train(
    weighted: bool,
    *,
    seed: int = 0,
    data: str = "lee",
    epochs: float = 0.3,
    max_steps: int = -1,
    progress: bool = True,
) -> tuple[PreTrainedModel, float, float]:
    """Fine-tunes MiniLM.

    Args:
        weighted: Whether the loss is UnDiMix's or plain.
        seed: Of dropout and the order of the texts.
        data: "lee" or "all-nli".
        epochs: Passes over the texts; 0 leaves the model as it was pretrained.
        max_steps: How many steps to take instead; -1 for the epochs.
        progress: Whether to show the Trainer's progress bar.

    Returns:
        The model, its correlation with Lee's judgments and the seconds of training.
    """
    quiet()
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    model = AutoModel.from_pretrained(MINILM)
    loss = SimCSELoss(temperature=0.05, weighting=Uniform())
    if weighted:
        loss = SimCSELoss(temperature=0.05, weighting=UnDiMix())  # the one argument; it is the default, too

    train_dataset = texts(data).map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=64),
        batched=True,
        remove_columns="text",
    )
    with TemporaryDirectory() as folder:  # the Trainer makes one, though nothing is saved
        args = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            max_steps=max_steps,
            per_device_train_batch_size=16,
            learning_rate=1e-4,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=not progress,
            seed=seed,
        )
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=TwoViews(DataCollatorWithPadding(tokenizer)),
            compute_loss_func=loss,
        )
    trainer.pop_callback(PrinterCallback)
    start = time.perf_counter()
    if epochs:
        trainer.train()
    seconds = time.perf_counter() - start

    def embed(documents: list[str]) -> Tensor:
        tokens = tokenizer(documents, padding=True, truncation=True, return_tensors="pt").to(model.device)
        return model(**tokens).last_hidden_state[:, 0]  # as the loss pools

    model.eval()
    return model, lee_correlation(embed), seconds


def main() -> None:
    compare(
        str(__doc__),
        train,
        score="correlation with people",
        plain="SimCSELoss with Uniform()",
        weighted="SimCSELoss with UnDiMix()",
        data=DATA,
        epochs=0.3,
    )


if __name__ == "__main__":
    main()
