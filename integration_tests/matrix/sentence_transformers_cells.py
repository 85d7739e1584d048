"""sentence-transformers' losses in its own Trainers, on real news."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from peft import LoraConfig, inject_adapter_in_model
from sentence_transformers import (
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from sentence_transformers.sparse_encoder import losses as sparse
from torch import Tensor, nn
from transformers import TrainerCallback

from integration_tests.matrix import trainer_cells
from integration_tests.matrix.cells import LOGITS, TEMPERATURE, Lack, Machinery, Run, plugged, vector_of
from integration_tests.matrix.trainer_cells import BOTH, LOSS, MODEL, SETTINGS, Recording, Toolkit, run_of, train
from integration_tests.text.tiny_models import (
    encoder,
    features,
    news,
    saved,
    sparse_autoencoder,
    splade,
    token_encoder,
)
from tests.releases import is_older


class Row(NamedTuple):
    """A loss, given its model and whether to gather."""

    make: Callable[[Any, bool], nn.Module]
    model: Callable[..., Any] = encoder
    trainer: type[Any] = SentenceTransformerTrainer
    compiles: str = BOTH
    logits: float = LOGITS


def gathering(gather: bool) -> dict[str, bool]:
    """The argument, which sentence-transformers has from 5.1 on."""
    return {"gather_across_devices": True} if gather else {}


def ranking(name: str, **settings: Any) -> Callable[[Any, bool], nn.Module]:
    return lambda model, gather: getattr(losses, name)(model, LOGITS, **gathering(gather), **settings)


def guided(name: str, **settings: Any) -> Callable[[Any, bool], nn.Module]:
    return lambda model, gather: getattr(losses, name)(
        model, encoder(seed=5).double().eval(), TEMPERATURE, **gathering(gather), **settings
    )


def inside(wrap: Callable[[Any, nn.Module], nn.Module], name: str, **settings: Any) -> Callable[[Any, bool], nn.Module]:
    return lambda model, gather: wrap(model, ranking(name, **settings)(model, gather))


def sparse_ranking(model: Any, gather: bool, scale: float) -> nn.Module:
    """Inner products, of which SPLADE's are in the thousands."""
    return sparse.SparseMultipleNegativesRankingLoss(model, scale, **gathering(gather))


def late_interaction(name: str, **settings: Any) -> Callable[[Any, bool], nn.Module]:
    """With a similarity in the model's precision; the toolkit's own are in float32."""
    return lambda model, gather: getattr(multi_vector_encoder.losses, name)(
        model, scale=LOGITS, similarity_fct=mean_maxsim, **gathering(gather), **settings
    )


def mean_maxsim(queries: Tensor, documents: Tensor, queries_mask: Tensor, documents_mask: Tensor) -> Tensor:
    """The mean over a query's tokens of the largest cosine with a document's tokens [queries, documents]."""
    cosines = torch.einsum("qad,ngtd->qngat", queries, documents)
    largest = cosines.masked_fill(~documents_mask[None, :, :, None].bool(), -torch.inf).amax(dim=-1)
    asked = queries_mask.to(largest.dtype)
    return ((largest * asked[:, None, None]).sum(dim=-1) / asked.sum(dim=1)[:, None, None]).flatten(1)


def csr_model(**settings: Any) -> Any:
    saved()  # a file, before anything is drawn for what comes on top
    return sparse_autoencoder()


def matryoshka(model: Any, loss: nn.Module) -> nn.Module:
    return losses.MatryoshkaLoss(model, loss, matryoshka_dims=[16, 8])


CACHED = {"mini_batch_size": 5}
ROWS = {
    "MultipleNegativesRankingLoss": Row(ranking("MultipleNegativesRankingLoss")),
    "MultipleNegativesSymmetricRankingLoss": Row(ranking("MultipleNegativesSymmetricRankingLoss")),
    "CachedMultipleNegativesRankingLoss": Row(ranking("CachedMultipleNegativesRankingLoss", **CACHED), compiles=MODEL),
    "CachedMultipleNegativesSymmetricRankingLoss": Row(
        ranking("CachedMultipleNegativesSymmetricRankingLoss", **CACHED), compiles=MODEL
    ),
    "GISTEmbedLoss": Row(guided("GISTEmbedLoss")),
    "CachedGISTEmbedLoss": Row(guided("CachedGISTEmbedLoss", **CACHED), compiles=MODEL),
    "SparseMultipleNegativesRankingLoss in SpladeLoss": Row(
        lambda model, gather: sparse.SpladeLoss(model, sparse_ranking(model, gather, 0.005), 1e-5, 1e-5),
        lambda **settings: splade(),
        SparseEncoderTrainer,
        logits=65.0,
    ),
    "SparseMultipleNegativesRankingLoss in CSRLoss": Row(
        lambda model, gather: sparse.CSRLoss(model, sparse_ranking(model, gather, 1.0)),
        csr_model,
        SparseEncoderTrainer,
    ),
    "MultipleNegativesRankingLoss in MatryoshkaLoss": Row(
        inside(matryoshka, "MultipleNegativesRankingLoss"), compiles=LOSS
    ),
    "MultipleNegativesRankingLoss in Matryoshka2dLoss": Row(
        inside(
            lambda model, loss: losses.Matryoshka2dLoss(model, loss, matryoshka_dims=[16, 8]),
            "MultipleNegativesRankingLoss",
        ),
        compiles=LOSS,
    ),
    "MultipleNegativesRankingLoss in AdaptiveLayerLoss": Row(
        inside(losses.AdaptiveLayerLoss, "MultipleNegativesRankingLoss")
    ),
    "CachedMultipleNegativesRankingLoss in MatryoshkaLoss": Row(
        inside(matryoshka, "CachedMultipleNegativesRankingLoss", **CACHED), compiles=MODEL
    ),
}


@cache
def data() -> Dataset:
    return news(columns=3, rows=32)


def make(row: Row, kind: str, dropout: float = 0.0, gather: bool = False) -> tuple[nn.Module, nn.Module]:
    model = row.model(dropout=dropout).double()
    model.max_seq_length = 12
    return model, plugged(row.make(model, gather), kind)


def recording(trainer: type[Any]) -> type[Any]:
    return type(trainer.__name__, (Recording, trainer), {})


# For each Trainer one that records, and the class of its arguments.
TRAINERS = {
    SentenceTransformerTrainer: (recording(SentenceTransformerTrainer), SentenceTransformerTrainingArguments),
    SparseEncoderTrainer: (recording(SparseEncoderTrainer), SparseEncoderTrainingArguments),
}
if not is_older("sentence-transformers", "6.0"):  # which it came with
    from sentence_transformers import (
        MultiVectorEncoderTrainer,
        MultiVectorEncoderTrainingArguments,
        multi_vector_encoder,
    )

    ROWS["MultiVectorMultipleNegativesRankingLoss"] = Row(
        late_interaction("MultiVectorMultipleNegativesRankingLoss"), token_encoder, MultiVectorEncoderTrainer
    )
    ROWS["CachedMultiVectorMultipleNegativesRankingLoss"] = Row(
        late_interaction("CachedMultiVectorMultipleNegativesRankingLoss", **CACHED),
        token_encoder,
        MultiVectorEncoderTrainer,
        compiles=MODEL,
    )
    TRAINERS[MultiVectorEncoderTrainer] = (recording(MultiVectorEncoderTrainer), MultiVectorEncoderTrainingArguments)


def make_trainer(
    row: Row,
    model: nn.Module,
    loss: Any,
    root: Path,
    callbacks: list[TrainerCallback] | None = None,
    dataset: Any = None,
    **settings: Any,
) -> Any:
    trainer, arguments = TRAINERS[row.trainer]
    return trainer(
        model=model,
        args=arguments(output_dir=str(root), **{**SETTINGS, **settings}),
        train_dataset=data() if dataset is None else dataset,
        loss=loss,
        callbacks=callbacks,
    )


def step(row: Row, model: Any, loss: nn.Module) -> Tensor:
    value = loss(features(model, data().select(range(8))), None)
    return torch.stack(list(value.values())).sum() if isinstance(value, dict) else value


def of_card(trainer: Any, folder: Path) -> Any:
    """The settings of the loss that the model's card tells."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    found = re.search(r"\* Loss: .*?```json\n(.*?)\n *```", card, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


TOOLKIT = Toolkit(__name__, ROWS, make, make_trainer, step, of_card)


def several_datasets(row: Row, kind: str, root: Path) -> Run:
    model, loss = make(row, kind)
    start = vector_of(model)
    both = DatasetDict(one=data().select(range(16)), other=data().select(range(16, 32)))
    return run_of(train(TOOLKIT, row, model, loss, root, dataset=both), model, start)


def several_losses(row: Row, kind: str, root: Path) -> Run:
    """A loss for each dataset, one of them plain."""
    model, loss = make(row, kind)
    start, plain = vector_of(model), row.make(model, False)
    both = DatasetDict(one=data().select(range(16)), other=data().select(range(16, 32)))
    trainer = train(TOOLKIT, row, model, {"one": loss, "other": plain}, root, dataset=both)
    return run_of(trainer, model, start)


def prompts(row: Row, kind: str, root: Path) -> Run:
    model, loss = make(row, kind)
    start = vector_of(model)
    texts = {"anchor": "a question: ", "positive": "a passage: "}
    return run_of(train(TOOLKIT, row, model, loss, root, prompts=texts), model, start)


def no_duplicates(row: Row, kind: str, root: Path) -> Run:
    model, loss = make(row, kind)
    start, twice = vector_of(model), concatenate_datasets([data().select(range(16))] * 2)
    trainer = train(TOOLKIT, row, model, loss, root, dataset=twice, batch_sampler=BatchSamplers.NO_DUPLICATES)
    return run_of(trainer, model, start)


def peft(row: Row, kind: str, root: Path) -> Run:
    model, loss = make(row, kind)
    # As `model.add_adapter` does, which takes no release of peft before 0.22.
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["query", "value"]), model.transformers_model)
    model.double()
    start = vector_of(model)
    run = run_of(train(TOOLKIT, row, model, loss, root), model, start)
    assert 0 < (run.moved != 0).sum() <= sum(p.numel() for p in model.parameters() if p.requires_grad)
    return run


MACHINERY = {
    **trainer_cells.machinery(TOOLKIT),
    "several datasets": Machinery(several_datasets),
    "several losses": Machinery(several_losses),
    "prompts": Machinery(prompts),
    "no duplicates": Machinery(no_duplicates),
    "PEFT": Machinery(peft),
}
IN_ADAPTIVE = "MultipleNegativesRankingLoss in AdaptiveLayerLoss"
IN_MATRYOSHKA_2D = "MultipleNegativesRankingLoss in Matryoshka2dLoss"
IN_CSR = "SparseMultipleNegativesRankingLoss in CSRLoss"
HOOKED = Lack(
    "a model that was trained with the toolkit's loss cannot be pickled: its hooks are local functions",
    AttributeError,
    "Can't pickle local object 'install_output_capuring_hook",
)
LACKS: dict[tuple[str, str], Lack] = {
    (IN_CSR, "pickle"): Lack(
        "the toolkit's `SparseAutoEncoder` cannot be pickled: it has a local function",
        AttributeError,
        "Can't pickle local object 'SparseAutoEncoder",
    ),
    (IN_MATRYOSHKA_2D, "pickle"): HOOKED,
    (IN_ADAPTIVE, "pickle"): HOOKED,
}
OF_COMPILED = {
    LOSS: "the loss is compiled, with its model: if the `Trainer` compiles, too, the toolkit's loss raises "
    "an `AssertionError`",
    MODEL: "the model is compiled, the loss is not: when compiled, the toolkit's loss raises a `RuntimeError`",
}
NOTES = {(name, "compile"): OF_COMPILED[row.compiles] for name, row in ROWS.items() if row.compiles != BOTH}
