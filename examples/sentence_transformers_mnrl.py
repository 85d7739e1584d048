"""MultipleNegativesRankingLoss with sentence-transformers, with and without UnDiMix: one line apart.

The data are news articles: the two halves of an article are a pair. The model is an embedding for each token, trained
from scratch. Only its tokenizer is MiniLM's. Nothing is downloaded. The score is the mean reciprocal rank (MRR) of an
article's second half, among those of 98 held-out articles, when its first half is the query.

    python examples/sentence_transformers_mnrl.py
    python examples/sentence_transformers_mnrl.py --data all-nli --max-steps 1000
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from tokenizers import Tokenizer
from transformers import set_seed

from _shared.compare import compare
from _shared.texts import DATA, MINILM, as_pairs, lee_retrieval, lee_split, pairs, quiet, seconds_of, settings
from undimix_plugins import undimix

try:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
except ImportError:  # before sentence-transformers 5.4
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.models import StaticEmbedding


def train(
    weighted: bool,
    *,
    seed: int = 0,
    data: str = "lee",
    epochs: float = 5.0,
    max_steps: int = -1,
    progress: bool = True,
) -> tuple[SentenceTransformer, float, float]:
    """Trains an embedding of tokens; returns the model, its MRR and the seconds of training."""
    quiet()
    set_seed(seed)
    tokenizer = Tokenizer.from_file(str(Path(MINILM) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=256)])
    loss = MultipleNegativesRankingLoss(model)  # its scale is 20, a temperature of .05
    if weighted:
        loss = undimix(loss)  # the one line

    with TemporaryDirectory() as folder:  # the Trainer makes one, though nothing is saved
        args = SentenceTransformerTrainingArguments(
            folder,
            per_device_train_batch_size=32,
            batch_sampler="no_duplicates",
            **settings(seed=seed, epochs=epochs, max_steps=max_steps, progress=progress) | {"learning_rate": 0.05},
        )
        dataset = as_pairs(lee_split()[0]) if data == "lee" else pairs(data)
        trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=dataset, loss=loss)
    seconds = seconds_of(trainer)
    return model, lee_retrieval(lambda texts: model.encode(texts, convert_to_tensor=True)), seconds


def main() -> None:
    plain, method = "MultipleNegativesRankingLoss", "undimix(MultipleNegativesRankingLoss)"
    compare(str(__doc__), train, score="MRR", plain=plain, method=method, data=DATA)


if __name__ == "__main__":
    main()
