"""Late interaction with sentence-transformers, with and without UnDiMix: one line apart.

A text has a vector for each token, and the similarity of two texts is MaxSim. The data are news articles, whose halves
are a pair, cut to 48 tokens. They and MiniLM need no download. The score is the mean reciprocal rank (MRR) of an
article's second half, among those of 98 held-out articles, when its first half is the query.

    python examples/sentence_transformers_multi_vector.py
    python examples/sentence_transformers_multi_vector.py --data all-nli --max-steps 1000
"""

from __future__ import annotations

from tempfile import TemporaryDirectory

from sentence_transformers import (
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
)
from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss
from torch import Tensor
from transformers import set_seed

from _shared.compare import compare
from _shared.texts import DATA, MINILM, as_pairs, lee_mrr, lee_split, pairs, quiet, seconds_of, settings
from undimix_plugins import undimix


def train(
    weighted: bool,
    *,
    seed: int = 0,
    data: str = "lee",
    epochs: float = 1.0,
    max_steps: int = -1,
    progress: bool = True,
) -> tuple[MultiVectorEncoder, float, float]:
    """Trains MiniLM's token vectors; returns the model, its MRR and the seconds of training."""
    quiet()
    set_seed(seed)
    model = MultiVectorEncoder(MINILM)
    model.max_seq_length = 48
    loss = MultiVectorMultipleNegativesRankingLoss(model)
    if weighted:
        loss = undimix(loss)  # the one line

    with TemporaryDirectory() as folder:  # the Trainer makes one, though nothing is saved
        args = MultiVectorEncoderTrainingArguments(
            folder,
            per_device_train_batch_size=16,
            batch_sampler="no_duplicates",
            **settings(seed=seed, epochs=epochs, max_steps=max_steps, progress=progress),
        )
        dataset = as_pairs(lee_split()[0]) if data == "lee" else pairs(data)
        trainer = MultiVectorEncoderTrainer(model=model, args=args, train_dataset=dataset, loss=loss)
    seconds = seconds_of(trainer)

    def similarities(queries: list[str], documents: list[str]) -> Tensor:
        return model.similarity(model.encode_query(queries), model.encode_document(documents))

    return model, lee_mrr(similarities), seconds


def main() -> None:
    name = "MultiVectorMultipleNegativesRankingLoss"
    compare(str(__doc__), train, score="MRR", plain=name, method=f"undimix({name})", data=DATA)


if __name__ == "__main__":
    main()
