"""Unsupervised SimCSE for `transformers.Trainer`, its in-batch negatives weighted."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import Trainer

from undimix_plugins import WeightedLoss, Weighting, as_full_precision, in_batch_negatives, info_nce, reweight
from undimix_plugins.checks import check_choice, check_embeddings, check_number


class TwoViews:
    """A data collator that gives every example to the model twice, in adjacent rows, for `SimCSELoss`.

    The model's dropout makes two views of the two rows.

    Args:
        collator: The collator that makes a batch of examples, such as `DataCollatorWithPadding(tokenizer)`.

    Raises:
        TypeError: For a collator that can't be called.
        ValueError: For one that is a `TwoViews` already.

    Examples:
        >>> from transformers import default_data_collator
        >>> collate = TwoViews(default_data_collator)
        >>> collate([{"input_ids": [1]}, {"input_ids": [2]}])["input_ids"].flatten()
        tensor([1, 1, 2, 2])
    """

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        if not callable(collator):
            raise TypeError(f"collator: expected a data collator, got {collator!r}")
        if isinstance(collator, TwoViews):
            raise ValueError("collator: expected one that gives each example once, got a TwoViews")
        self.collator = collator

    def __call__(self, examples: Sequence[Any]) -> Any:
        return self.collator([example for example in examples for _ in range(2)])


class SimCSELoss(WeightedLoss):
    """Unsupervised SimCSE as the Trainer's `compute_loss_func`, its in-batch negatives weighted.

        loss_i = -log( exp(s_ii / t) / (exp(s_ii / t) + sum over j != i of w_ij exp(s_ij / t)) ),

    s_ij the cosine of sentence i in one pass and sentence j in another, under different dropout; j over the other
    sentences of the micro-batch.

    *Pairs.* Rows 2i and 2i + 1 of a batch are the two views of sentence i, as the collator `TwoViews` makes them, so a
    batch of `per_device_train_batch_size` sentences passes through the model as twice as many rows. An odd number of
    rows is refused. Rows that are paired wrongly cannot be told from right ones, so in a Trainer whose collator is no
    `TwoViews` the loss warns once of what it takes them for.

    *Pooling.* The Trainer passes the model's outputs and no attention mask, so a mean over tokens, which must leave
    padding out, can't be had. "cls" takes the first token of `last_hidden_state` (the first output); "pooler" takes
    `pooler_output`, for BERT the first token through a linear layer and tanh.

    *Gradient accumulation.* The loss is a mean per micro-batch, and gradients equal those of the mean over the
    micro-batches of a step, with labels in the batch or without, in a last short step too. Unless told otherwise, the
    Trainer takes a `compute_loss_func` as scaled for accumulation already; the loss sets the Trainer's own switch,
    `loss_is_scaled_for_ga`, to False where it is None. A function of your own around this loss that does scale sets it
    to True. In-batch negatives come from the micro-batch alone. Without labels in the batch, the Trainer warns at each
    step that it passes none; nothing is amiss.

    *`evaluate()`.* The Trainer works out an evaluation loss only where it finds labels: it reports no `eval_loss` for
    batches without. With `TrainingArguments(label_names=["labels"])` and any "labels" in the batch (they are not
    used) it reports this loss. Dropout is off then, so a sentence's two views are one, and the value only says how far
    apart different sentences are. Judge embeddings by a task.

    Args:
        temperature: t, what cosines are divided by, a finite number above 0.
        weighting: How much each negative counts; defaults to `UnDiMix()`. `Uniform()` is plain SimCSE.
        pooling: "cls" or "pooler".

    Raises:
        ValueError: For a temperature that is no finite number above 0, or another pooling.
        TypeError: For a weighting that is no `Weighting`.

    References:
        Gao, Yao, Chen: SimCSE, EMNLP 2021, arXiv 2104.08821, equation 4; arXiv 2206.01197 (UnDiMix, section 3).

    Examples:
        >>> from transformers.modeling_outputs import BaseModelOutput
        >>> outputs = BaseModelOutput(last_hidden_state=torch.randn(8, 5, 16))
        >>> loss = SimCSELoss(temperature=0.05)(outputs)
    """

    def __init__(self, temperature: float = 0.05, weighting: Weighting | None = None, pooling: str = "cls") -> None:
        super().__init__()
        self.temperature = check_number("temperature", temperature, above=0)
        check_choice("pooling", pooling, ("cls", "pooler"))
        self.pooling = pooling
        self.weigh(weighting)

    def forward(
        self, outputs: Any, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The weighted loss of a micro-batch.

        Args:
            outputs: The model's outputs for 2n rows: a `ModelOutput`, mapping or tuple.
            labels: Not used.
            num_items_in_batch: What the Trainer counts where the batch has labels; not used.

        Returns:
            A scalar in the embeddings' dtype (float32 for half precision). 0 for a single sentence.

        Raises:
            ValueError: For an odd number of rows, outputs without what `pooling` takes, or (on the CPU) embeddings
                that are not finite. On other devices, these give a loss of NaN.
        """
        embeddings = self._pooled(outputs)
        if len(embeddings) % 2:
            raise ValueError(
                f"outputs: expected two adjacent rows a sentence, as the collator TwoViews makes them, "
                f"got {len(embeddings)} rows"
            )
        check_embeddings(embeddings=embeddings)
        embeddings = normalize(as_full_precision(embeddings), dim=1)
        contrast = in_batch_negatives(embeddings[0::2], embeddings[1::2], self.temperature)
        return info_nce(contrast, self.weighting) / _undone_by_trainer()

    def _pooled(self, outputs: Any) -> Tensor:
        name = "last_hidden_state" if self.pooling == "cls" else "pooler_output"
        named = outputs.get(name) if isinstance(outputs, Mapping) else None
        if named is None and isinstance(outputs, tuple):
            place = ("last_hidden_state", "pooler_output").index(name)
            named = outputs[place] if place < len(outputs) else None
        rank = 3 if self.pooling == "cls" else 2
        if not isinstance(named, Tensor) or named.dim() != rank:
            came = list(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
            if isinstance(named, Tensor):
                came = f"shape {list(named.shape)}"
            raise ValueError(f"outputs: pooling={self.pooling!r} expected a {name} of rank {rank}, got {came}")
        return named[:, 0] if self.pooling == "cls" else named

    def extra_repr(self) -> str:
        """The settings."""
        return f"temperature={self.temperature}, pooling={self.pooling!r}, {super().extra_repr()}"


def _undone_by_trainer() -> int:
    """Tells the Trainer that calls, through functions of the user's or not, that the loss is a mean per micro-batch.

    Returns:
        What `Trainer.compute_loss` is going to multiply the loss by, as if it were a share of a sum over all processes.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        trainer = frame.f_locals.get("self")
        if not isinstance(trainer, Trainer):
            continue
        if trainer.loss_is_scaled_for_ga is None:
            trainer.loss_is_scaled_for_ga = False
        if not isinstance(trainer.data_collator, TwoViews):
            warnings.warn(
                "SimCSELoss takes rows 2i and 2i + 1 of a batch as two views of one sentence; the Trainer's "
                "data_collator is no undimix_transformers.TwoViews: make sure that it pairs them so",
                stacklevel=2,
            )
        if frame.f_code is Trainer.compute_loss.__code__:
            counted = frame.f_locals["num_items_in_batch"] is not None
            if not counted or not trainer.args.average_tokens_across_devices:
                return 1
            if trainer.args.n_gpu > 1:
                return int(trainer.args.n_gpu)
            return int(trainer.accelerator.num_processes // trainer.get_tp_size())
    return 1


def weighted(loss: nn.Module, weighting: Weighting | None, **settings: Any) -> nn.Module:
    """The adapter of `undimix()` for this package's own losses."""
    return reweight(loss, weighting, {SimCSELoss: SimCSELoss}, **settings)
