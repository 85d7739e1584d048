"""MultipleNegativesRankingLoss with sentence-transformers, with and without UnDiMix: one line apart.

The data are news articles: the two halves of an article are a pair. They and MiniLM need no download. The score is the
correlation of cosines with people's judgments of other documents.

    python examples/sentence_transformers_mnrl.py
    python examples/sentence_transformers_mnrl.py --data all-nli --max-steps 1000
"""

from __future__ import annotations

from tempfile import TemporaryDirectory

from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import set_seed

from _shared.compare import compare
from _shared.texts import DATA, MINILM, lee_correlation, pairs, quiet, seconds_of, settings
from undimix_plugins import undimix


def train(
    weighted: bool,
    *,
    seed: int = 0,
    data: str = "lee",
    epochs: float = 0.5,
    max_steps: int = -1,
    progress: bool = True,
    scale: float = 5.0,
) -> tuple[SentenceTransformer, float, float]:
    """Fine-tunes MiniLM; returns the model, its correlation with people and the seconds of training.

    Start with a scale of 5 for `undimix`, a temperature of .2. The host's default is 20. The demo sets 10.
    """
    quiet()
    set_seed(seed)
    model = SentenceTransformer(MINILM)
    longest = model.max_seq_length
    loss = MultipleNegativesRankingLoss(model, scale=scale)
    if weighted:
        loss = undimix(loss)  # the one line

    with TemporaryDirectory() as folder:  # the Trainer makes one, though nothing is saved
        args = SentenceTransformerTrainingArguments(
            folder,
            per_device_train_batch_size=32,
            batch_sampler="no_duplicates",
            **settings(seed=seed, epochs=epochs, max_steps=max_steps, progress=progress),
        )
        trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs(data), loss=loss)
    model.max_seq_length = 48  # so that a step takes seconds on a CPU
    seconds = seconds_of(trainer)
    model.max_seq_length = longest
    return model, lee_correlation(lambda texts: model.encode(texts, convert_to_tensor=True)), seconds


def main() -> None:
    plain, method = "MultipleNegativesRankingLoss", "undimix(MultipleNegativesRankingLoss)"
    compare(str(__doc__), train, score="correlation with people", plain=plain, method=method, data=DATA)


if __name__ == "__main__":
    main()
