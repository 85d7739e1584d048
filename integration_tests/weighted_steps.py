"""A weighted training step in each toolkit. `make wheel` runs this with what is installed, not with the checkout."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from lightly.loss import NTXentLoss
from open_clip.loss import ClipLoss
from pytorch_metric_learning.losses import SupConLoss
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GIN
from transformers import BertConfig, BertModel, Trainer, TrainingArguments, default_data_collator

from undimix_plugins import undimix
from undimix_pyg import GraphCL, GraphCLLoss
from undimix_transformers import SimCSELoss, TwoViews

try:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
except ImportError:  # before sentence-transformers 5.4
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.models import StaticEmbedding

FOLDER = TemporaryDirectory()
ONE_STEP: dict[str, Any] = {"max_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True}


Step = tuple[nn.Module, Callable[[], Any]]  # a model and what trains it for a step


def descend(model: nn.Module, loss: Tensor) -> None:
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def lightly() -> Step:
    model = nn.Linear(16, 8)
    criterion = undimix(NTXentLoss(temperature=0.5))
    first, second = torch.randn(2, 32, 16)
    return model, lambda: descend(model, criterion(model(first), model(second)))


def sentence_transformers() -> Step:
    words = [f"word{place}" for place in range(64)]
    tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="word0"))
    tokenizer.pre_tokenizer = Whitespace()
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(FOLDER.name, per_device_train_batch_size=32, **ONE_STEP),
        train_dataset=Dataset.from_dict({"anchor": words[:32], "positive": words[32:]}),
        loss=undimix(MultipleNegativesRankingLoss(model, scale=5)),
    )
    return model, trainer.train


def torch_geometric() -> Step:
    model = GraphCL(GIN(4, 8, num_layers=2), hidden_channels=8)
    criterion = GraphCLLoss(temperature=0.2)
    batch = Batch.from_data_list([Data(torch.randn(5, 4), torch.randint(5, (2, 8))) for _ in range(16)])
    return model, lambda: descend(model, criterion(*model(batch)))


def transformers() -> Step:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertModel(BertConfig(vocab_size=64, **size))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(FOLDER.name, per_device_train_batch_size=16, **ONE_STEP),
        train_dataset=[{"input_ids": [place, place + 1]} for place in range(16)],
        data_collator=TwoViews(default_data_collator),
        compute_loss_func=SimCSELoss(temperature=0.05),
    )
    return model, trainer.train


def pytorch_metric_learning() -> Step:
    model = nn.Linear(16, 8)
    criterion = undimix(SupConLoss(temperature=0.2))
    rows, labels = torch.randn(32, 16), torch.arange(32) % 4
    return model, lambda: descend(model, criterion(model(rows), labels))


def open_clip() -> Step:
    model = nn.Linear(16, 8)
    criterion = undimix(ClipLoss())
    images, texts = torch.randn(2, 32, 16)
    unit = nn.functional.normalize
    return model, lambda: descend(model, criterion(unit(model(images)), unit(model(texts)), torch.tensor(5.0)))


def stable_pretraining() -> Step:
    from stable_pretraining.losses import NTXEntLoss

    model = nn.Linear(16, 8)
    criterion = undimix(NTXEntLoss(temperature=0.5))
    first, second = torch.randn(2, 32, 16)
    return model, lambda: descend(model, criterion(model(first), model(second)))


if __name__ == "__main__":
    toolkits = [lightly, sentence_transformers, torch_geometric, transformers, pytorch_metric_learning, open_clip]
    if find_spec("stable_pretraining"):  # not in "all"
        toolkits.append(stable_pretraining)
    for toolkit in toolkits:
        torch.manual_seed(0)
        model, step = toolkit()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        step()
        after = list(model.parameters())
        if not all(parameter.isfinite().all() for parameter in after) or all(map(torch.equal, before, after)):
            raise SystemExit(f"{toolkit.__name__}: expected a step to other, finite parameters")
        print(f"{toolkit.__name__}: a weighted step")
