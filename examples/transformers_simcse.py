"""Unsupervised SimCSE with the plain `transformers.Trainer`, with and without UnDiMix: one argument apart.

Dropout makes two views of each text. The texts are news articles, cut to 64 tokens. They and MiniLM need no download.
The score is the correlation of cosines with people's judgments of other documents.

    python examples/transformers_simcse.py
    python examples/transformers_simcse.py --data all-nli --max-steps 1000
"""

from __future__ import annotations

from tempfile import TemporaryDirectory

from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from _shared.compare import compare
from _shared.texts import DATA, MINILM, lee_correlation, quiet, seconds_of, settings, single_texts
from undimix_plugins import UnDiMix, Uniform
from undimix_transformers import SimCSELoss, TwoViews


def train(
    weighted: bool,
    *,
    seed: int = 0,
    data: str = "lee",
    epochs: float = 0.3,
    max_steps: int = -1,
    progress: bool = True,
) -> tuple[PreTrainedModel, float, float]:
    """Fine-tunes MiniLM; returns the model, its correlation with people and the seconds of training."""
    quiet()
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    model = AutoModel.from_pretrained(MINILM)
    loss = SimCSELoss(temperature=0.05, weighting=Uniform())
    if weighted:
        loss = SimCSELoss(temperature=0.05, weighting=UnDiMix())  # the one argument; it is the default, too

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return tokenizer(batch["text"], truncation=True, max_length=64)

    dataset = single_texts(data).map(tokenize, batched=True, remove_columns="text")
    collator = TwoViews(DataCollatorWithPadding(tokenizer))
    options = settings(seed=seed, epochs=epochs, max_steps=max_steps, progress=progress)
    with TemporaryDirectory() as folder:  # the Trainer makes one, though nothing is saved
        args = TrainingArguments(folder, per_device_train_batch_size=16, **options)
        trainer = Trainer(model, args, collator, train_dataset=dataset, compute_loss_func=loss)
    seconds = seconds_of(trainer)

    def embed(documents: list[str]) -> Tensor:
        tokens = tokenizer(documents, padding=True, truncation=True, return_tensors="pt").to(model.device)
        return model(**tokens).last_hidden_state[:, 0]  # as the loss pools

    model.eval()
    return model, lee_correlation(embed), seconds


def main() -> None:
    plain, method = "SimCSELoss with Uniform()", "SimCSELoss with UnDiMix()"
    compare(str(__doc__), train, score="correlation with people", plain=plain, method=method, data=DATA)


if __name__ == "__main__":
    main()
