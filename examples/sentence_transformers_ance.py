"""Hard negatives that a process mines while sentence-transformers trains (ANCE), behind a weighted loss, or none.

The two halves of a news article are a pair; negatives come from the second halves of all. The score is the correlation
of cosines with people's judgments of other documents.

    python examples/sentence_transformers_ance.py
    python examples/sentence_transformers_ance.py --data all-nli --max-steps 1000
"""

from __future__ import annotations

import time
from tempfile import TemporaryDirectory

import torch
from compare import compare
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers_mnrl import DATA, pairs
from texts import MINILM, lee_correlation, quiet
from transformers import PrinterCallback, set_seed

from undimix_plugins import undimix
from undimix_sentence_transformers import ANCE


def train(
    mined: bool,
    *,
    seed: int = 0,
    data: str = "lee",
    epochs: float = 0.25,
    max_steps: int = -1,
) -> tuple[SentenceTransformer, float, float]:
    """Fine-tunes MiniLM with UnDiMix.

    Args:
        mined: Whether to have ANCE's negatives beside those of the batch.
        seed: Of dropout, the order of the pairs and the negatives.
        data: "lee" or "all-nli".
        epochs: Passes over the pairs; 0 leaves the model as it was pretrained.
        max_steps: How many steps to take instead; -1 for the epochs.

    Returns:
        The model, its correlation with Lee's judgments and the seconds of training.
    """
    quiet()
    set_seed(seed)
    model = SentenceTransformer(MINILM)
    longest = model.max_seq_length
    model.max_seq_length = 24  # so that a step takes seconds on a CPU
    dataset, callbacks = pairs(data), []
    if mined:
        # So that a quarter of an epoch of Lee's news, 5 steps, sees more than the first negatives.
        every = 2 if data == "lee" else 2000
        device = "cuda" if torch.cuda.is_available() else "cpu"
        ance = ANCE(dataset, every=every, range_max=50, relative_margin=0.05, device=device, seed=seed)
        dataset, callbacks = ance.dataset, [ance]

    with TemporaryDirectory() as folder:  # the Trainer makes one, though nothing is saved
        args = SentenceTransformerTrainingArguments(
            folder,
            num_train_epochs=epochs,
            max_steps=max_steps,
            per_device_train_batch_size=16,
            learning_rate=1e-4,
            batch_sampler="no_duplicates",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
        )
        trainer = SentenceTransformerTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            loss=undimix(MultipleNegativesRankingLoss(model, scale=10.0)),
            callbacks=callbacks,
        )
    trainer.pop_callback(PrinterCallback)
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
        plain="undimix(MultipleNegativesRankingLoss), negatives of the batch",
        weighted="undimix(MultipleNegativesRankingLoss), ANCE's too",
        data=DATA,
        epochs=0.25,
    )


if __name__ == "__main__":
    main()
