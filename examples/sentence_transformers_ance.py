"""ANCE with sentence-transformers: `undimix` of a ranking loss, with and without negatives that a process mines.

The two halves of a news article are a pair. Hard negatives are mined among the second halves of all articles while the
model trains. The score is the correlation of cosines with people's judgments of other documents.

    python examples/sentence_transformers_ance.py
    python examples/sentence_transformers_ance.py --data all-nli --max-steps 1000
"""

from __future__ import annotations

from tempfile import TemporaryDirectory

import torch
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from transformers import set_seed

from _shared.compare import compare
from _shared.texts import DATA, MINILM, lee_correlation, pairs, quiet, seconds_of, settings
from undimix_plugins import undimix
from undimix_sentence_transformers import ANCE

try:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
except ImportError:  # before sentence-transformers 5.4
    from sentence_transformers.losses import MultipleNegativesRankingLoss


def train(
    mined: bool,
    *,
    seed: int = 0,
    data: str = "lee",
    epochs: float = 0.25,
    max_steps: int = -1,
    progress: bool = True,
) -> tuple[SentenceTransformer, float, float]:
    """Fine-tunes MiniLM; returns the model, its correlation with people and the seconds of training."""
    quiet()
    set_seed(seed)
    model = SentenceTransformer(MINILM)
    longest = model.max_seq_length
    model.max_seq_length = 24  # so that a step takes seconds on a CPU
    dataset, callbacks = pairs(data), []
    if mined:
        every = 2 if data == "lee" else 2000  # a quarter of an epoch of Lee's news is 5 steps
        device = "cuda" if torch.cuda.is_available() else "cpu"
        ance = ANCE(dataset, every=every, range_max=50, relative_margin=0.05, device=device, seed=seed)
        dataset, callbacks = ance.dataset, [ance]
    loss = undimix(MultipleNegativesRankingLoss(model, scale=5.0))

    with TemporaryDirectory() as folder:  # the Trainer makes one, though nothing is saved
        args = SentenceTransformerTrainingArguments(
            folder,
            per_device_train_batch_size=16,
            batch_sampler="no_duplicates",
            **settings(seed=seed, epochs=epochs, max_steps=max_steps, progress=progress),
        )
        trainer = SentenceTransformerTrainer(
            model=model, args=args, train_dataset=dataset, loss=loss, callbacks=callbacks
        )
    seconds = seconds_of(trainer)
    model.max_seq_length = longest
    return model, lee_correlation(lambda texts: model.encode(texts, convert_to_tensor=True)), seconds


def main() -> None:
    loss = "undimix(MultipleNegativesRankingLoss)"
    plain, method = f"{loss}, negatives of the batch", f"{loss}, ANCE's too"
    compare(str(__doc__), train, score="correlation with people", plain=plain, method=method, data=DATA)


if __name__ == "__main__":
    main()
