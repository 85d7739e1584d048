"""SimCSE for `transformers.Trainer`, with its in-batch negatives weighted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase, ProcessorMixin, Trainer

from undimix_plugins.toolkit import (
    Contrast,
    LastLayerInputs,
    WeightedLoss,
    Weighting,
    check_choice,
    check_embeddings,
    check_number,
    info_nce,
    to_length_one,
)
from undimix_transformers.trainer import (
    calling_trainer,
    check_release,
    dispatches,
    of_same_class,
    refuse_uncalled_class,
    trains,
)

WHOLE = (
    'TrainingArguments(accelerator_config={"dispatch_batches": False}) lets each process read the stream, in the same '
    "order, and take whole examples"
)


def _check_collator(collator: object) -> None:
    if isinstance(collator, type):
        raise TypeError(f"collator: expected a data collator, got the class {collator.__name__}; give an object of it")
    if isinstance(collator, (PreTrainedTokenizerBase, ProcessorMixin)):  # which can be called, too
        raise TypeError(
            f"collator: expected a data collator, got a {type(collator).__name__}; give "
            "DataCollatorWithPadding(tokenizer)"
        )
    if not callable(collator):
        raise TypeError(f"collator: expected a data collator, got {collator!r}")
    if isinstance(collator, (TwoViews, SentenceTuples)):
        raise ValueError(f"collator: expected one that gives each example once, got a {type(collator).__name__}")


class TwoViews:
    """A data collator that passes each example to the model twice, in adjacent rows, for `SimCSELoss`.

    The model's dropout makes the two rows two views.

    Args:
        collator: A collator that makes a batch of examples, such as `DataCollatorWithPadding(tokenizer)`.

    Raises:
        TypeError: If `collator` is a tokenizer, a class, or cannot be called.
        ValueError: If `collator` is a `TwoViews` or `SentenceTuples`.

    Examples:
        >>> from transformers import default_data_collator
        >>> collate = TwoViews(default_data_collator)
        >>> collate([{"input_ids": [1]}, {"input_ids": [2]}])["input_ids"].flatten()
        tensor([1, 1, 2, 2])
    """

    rows_per_example: ClassVar[int] = 2

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        _check_collator(collator)
        self.collator = collator

    def __call__(self, examples: Sequence[Any]) -> Any:
        return self.collator([example for example in examples for _ in range(2)])


class SentenceTuples:
    """A data collator that passes the sentences of each example to the model in adjacent rows, for supervised SimCSE.

    Each key of an example holds a list with one entry for each sentence: the sentence itself, its positive and, if
    there are any, hard negatives. All examples have the same number of sentences.

    Args:
        collator: A collator that makes a batch of sentences, such as `DataCollatorWithPadding(tokenizer)`.

    Raises:
        TypeError: If `collator` is a tokenizer, a class, or cannot be called.
        ValueError: If `collator` is a `TwoViews` or `SentenceTuples`. When called: if an example has another number of
            sentences than the first.

    Examples:
        >>> from transformers import default_data_collator
        >>> collate = SentenceTuples(default_data_collator)
        >>> collate([{"input_ids": [[1], [2], [3]]}, {"input_ids": [[4], [5], [6]]}])["input_ids"].flatten()
        tensor([1, 2, 3, 4, 5, 6])
    """

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        _check_collator(collator)
        self.collator = collator
        # Which numbers of sentences examples had so far, in memory that a DataLoader's workers share: a flag for each,
        # only ever set, so that no worker undoes what another wrote. The last one is for all larger numbers.
        flags = torch.zeros(64, dtype=torch.bool, device="cpu")
        self._seen = flags.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def rows_per_example(self) -> int | None:
        """How many sentences examples had so far; None before the first batch, if numbers differ, or above 62."""
        seen = self._seen.nonzero().flatten().tolist()
        return int(seen[0]) if len(seen) == 1 and seen[0] < len(self._seen) - 1 else None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Any:
        labels = [example["labels"] for example in examples if "labels" in example]
        lists = [{key: value for key, value in example.items() if key != "labels"} for example in examples]
        count = len(next(iter(lists[0].values())))
        for row, example in enumerate(lists):
            for key, entries in example.items():
                if len(entries) != count:
                    raise ValueError(
                        f"examples: expected {count} sentences in each, as the first has, got {len(entries)} "
                        f"in {key!r} of example {row}"
                    )
        self._seen[min(count, len(self._seen) - 1)] = True
        rows = [{key: entries[i] for key, entries in example.items()} for example in lists for i in range(count)]
        batch = self.collator(rows)
        if labels:
            batch["labels"] = torch.as_tensor(labels)
        return batch


class SimCSELoss(WeightedLoss):
    """SimCSE as the Trainer's `compute_loss_func`, unsupervised or supervised, with its in-batch negatives weighted.

        loss_i = -log( exp(s_ii / t) / (exp(s_ii / t) + sum over j of w_ij exp(s_ij / t)) ),

    s_ii is the cosine of a sentence and its positive. s_ij are the cosines of the sentence with the positives of all
    other sentences and with all hard negatives of the micro-batch. In unsupervised SimCSE the positive is the sentence
    in another pass, under different dropout, and there are no hard negatives.

    *Rows.* The sentences of an example are `rows_per_example` adjacent rows of a batch. The collator `TwoViews` makes a
    sentence's two views; `SentenceTuples` makes a sentence, its positive and hard negatives. So
    `per_device_train_batch_size` examples are that many times `rows_per_example` rows. Rows that are grouped wrongly
    look like right ones. If the Trainer's collator is neither of the two, the loss warns once, and says what it takes
    the rows for.

    *Classes.* `undimix(SimCSELoss(), exclude_same_class=True)` leaves out the sentences of examples with the anchor's
    label. Batches then need "labels", one for each example. Hard negatives stay.

    *Pooling.* "cls" takes the first token of `last_hidden_state` (the first output). "pooler" takes `pooler_output`:
    for BERT, the first token after a linear layer and a tanh. A mean over tokens is not possible: it would have to
    leave out padding, and the Trainer passes no attention mask. Use the same pooling after training.

    *Gradient accumulation.* The loss is a mean over a micro-batch. Gradients are those of the mean over a step's
    micro-batches, with labels in the batch or without, and in a short last step. By default the Trainer assumes that a
    `compute_loss_func` is already scaled for accumulation. So the loss sets the Trainer's own switch,
    `loss_is_scaled_for_ga`, to False where it is None. If your own function around this loss scales, set the switch to
    True. In-batch negatives come from the micro-batch alone. Without labels in the batch, the Trainer warns at each
    step that it passes none. You can ignore that.

    *`evaluate()`.* The Trainer computes an evaluation loss only for batches with labels. With
    `TrainingArguments(label_names=["labels"])` and any "labels" in the batch (they are not used) it reports this loss
    as `eval_loss`. Dropout is off then, so the two views of a sentence are the same, and the value only says how far
    apart different sentences are. Judge embeddings by a task.

    Args:
        temperature: t. Cosines are divided by it. A finite number above 0.
        weighting: How negatives are weighted. Default: `UnDiMix()`. `Uniform()` is plain SimCSE.
        pooling: "cls" or "pooler".
        rows_per_example: 2 for a sentence and its positive, 3 or more with hard negatives.
        options: Options of `UnDiMix`, in place of a weighting: `SimCSELoss(hardness=2.0)`.

    Raises:
        ValueError: If the temperature is not a finite number above 0, the pooling is another, or `rows_per_example` is
            below 2.
        TypeError: If `weighting` is not a `Weighting`; if options are given with a weighting, or `UnDiMix` does not
            have them; if a Trainer is given the class in place of a loss.

    References:
        Gao, Yao, Chen: SimCSE, EMNLP 2021, arXiv 2104.08821, equations 4 and 5; arXiv 2206.01197 (UnDiMix, section 3).

    Examples:
        >>> from transformers.modeling_outputs import BaseModelOutput
        >>> outputs = BaseModelOutput(last_hidden_state=torch.randn(8, 5, 16))
        >>> loss = SimCSELoss(temperature=0.05)(outputs)
    """

    settings: ClassVar[Mapping[str, Any]] = {"exclude_same_class": False}
    exclude_same_class: bool = False

    def __init__(
        self,
        temperature: float = 0.05,
        weighting: Weighting | None = None,
        pooling: str = "cls",
        rows_per_example: int = 2,
        **options: Any,
    ) -> None:
        super().__init__()
        refuse_uncalled_class(type(self), options)
        check_release(type(self).__name__)
        self.temperature = temperature
        check_choice("pooling", pooling, ("cls", "pooler"))
        self.pooling = pooling
        self.rows_per_example = int(check_number("rows_per_example", rows_per_example, at_least=2))
        self.weigh(weighting, **options)

    def forward(
        self, outputs: Any, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The weighted loss of a micro-batch.

        Args:
            outputs: The model's outputs, with `rows_per_example` rows for each example: a `ModelOutput`, mapping or
                tuple.
            labels: The examples' classes, one for each example or for each row; used only if `exclude_same_class` is
                set.
            num_items_in_batch: The Trainer's count of labels; not used.

        Returns:
            A scalar in the embeddings' dtype (float32 for half precision). It is 0 for a single sentence.

        Raises:
            ValueError: If the number of rows is not a multiple of `rows_per_example`, labels that are used do not
                match, the outputs lack what `pooling` takes, or (on the CPU) embeddings are not finite. On other
                devices, the loss is NaN for non-finite embeddings.
        """
        embeddings = self._pooled(outputs)
        count = self.rows_per_example
        trainer, scale = calling_trainer()
        streamed = dispatches(trainer)
        if trainer is not None:
            self._check_trainer(trainer, streamed)
        # Processes have equal shares of whole examples: where one's rows are a multiple, no share begins within any.
        if len(embeddings) % count:
            raise ValueError(
                f"outputs: expected {count} adjacent rows an example, as the collator "
                f"{'TwoViews makes them (or SentenceTuples)' if count == 2 else 'SentenceTuples makes them'}, "
                f"got {len(embeddings)} rows"
                + (f"; accelerate's dispatch_batches has cut a batch within an example: {WHOLE}" if streamed else "")
            )
        check_embeddings(embeddings=embeddings)
        inputs = self.inputs_of(embeddings)
        embeddings = to_length_one(embeddings)
        sentences, *others = (embeddings[place::count] for place in range(count))
        further: dict[str, Any] = {}
        if self.exclude_same_class:
            if trainer is not None and streamed and isinstance(trainer.data_collator, SentenceTuples):
                raise ValueError(
                    "exclude_same_class: expected a label for each example of SentenceTuples, got them cut as if there "
                    f"was one for each row, by accelerate's dispatch_batches: {WHOLE}"
                )
            if isinstance(labels, Tensor) and labels.shape == embeddings.shape[:1]:
                labels = labels[::count]
            of_positives = of_same_class(labels, len(sentences))
            further["excluded_mask"] = lambda rows: pad(of_positives(rows), (0, (count - 2) * len(sentences)))
        if inputs is not None:
            behind = [inputs[0][place::count] for place in range(count)]
            further["last_layer"] = LastLayerInputs(behind[0], torch.cat(behind[1:]), normalized=True)
        n, own = len(sentences), torch.arange(len(sentences), device=embeddings.device)
        if count > 2:  # the columns of an example's own hard negatives
            hard = torch.stack([own + column * n for column in range(1, count - 1)], dim=1)
            further["hard_negative_columns"] = hard
        contrast = Contrast.of(
            sentences,
            others[0],
            torch.cat(others),
            own[:, None],
            self.temperature,
            positives_in_pool=True,
            **further,
        )
        return info_nce(contrast, self.weighting) / scale

    def _check_trainer(self, trainer: Trainer, streamed: bool) -> None:
        """Errors and warnings for what does not fit the Trainer, as far as it can be told from here."""
        count, collator = self.rows_per_example, trainer.data_collator
        grouped = getattr(collator, "rows_per_example", None)
        if grouped not in (None, count):
            raise ValueError(
                f"rows_per_example: expected {grouped}, as the data_collator gives of each example, got {count}"
            )
        if streamed:
            warnings.warn(
                "SimCSELoss: accelerate's dispatch_batches cuts batches of streamed data by row, the last one maybe "
                f"within an example, which would stop the training: {WHOLE}",
                stacklevel=3,
            )
        if not isinstance(collator, (TwoViews, SentenceTuples)):
            warnings.warn(
                f"SimCSELoss takes {count} adjacent rows of a batch as the sentences of one example; the Trainer's "
                "data_collator is no undimix_transformers.TwoViews or SentenceTuples: make sure that it groups them so",
                stacklevel=3,
            )
        layer = self.last_layer
        if (
            layer is not None
            and not layer.calls
            and trainer.model_init is not None
            and not trains(trainer, layer.layer)
        ):
            raise ValueError(
                "last_layer: expected a layer of the Trainer's model, got one of another; model_init makes a new model "
                "for each training: give the Trainer model= instead"
            )

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
        rows = f"rows_per_example={self.rows_per_example}"
        return f"temperature={self.temperature}, pooling={self.pooling!r}, {rows}, {super().extra_repr()}"
