"""What a `compute_loss_func` has to tell the Trainer that calls it, which passes nothing of itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from types import FrameType
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor, nn
from transformers import Trainer

from undimix_plugins.toolkit import ExcludedMask, release, same_label


def trainers_above() -> Iterator[tuple[Trainer, FrameType]]:
    """The frames in which a Trainer's method calls, however far away, from the nearest on."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, Trainer):
            yield trainer, frame
        frame = frame.f_back


def calling_trainer() -> tuple[Trainer | None, int]:
    """Tells the Trainer that calls, through functions of the user's or not, that a loss is a mean per micro-batch.

    Returns:
        The Trainer, or None; and what the Trainer is going to multiply the loss by, as if it were a share of a sum over
        all processes or, before transformers 5.20, which can't be told otherwise, over all micro-batches.
    """
    caller, factor = None, 1
    can_be_told = hasattr(Trainer, "loss_is_scaled_for_ga")
    for trainer, frame in trainers_above():
        caller = trainer
        if can_be_told and trainer.loss_is_scaled_for_ga is None:
            trainer.loss_is_scaled_for_ga = False
        counted = frame.f_locals.get("num_items_in_batch") is not None
        if frame.f_code is Trainer.compute_loss.__code__:
            factor = _of_processes(trainer) if counted and trainer.args.average_tokens_across_devices else 1
            if can_be_told:
                break
        elif frame.f_code is Trainer.training_step.__code__ and not can_be_told:
            if trainer.compute_loss_func is not None or (trainer.model_accepts_loss_kwargs and counted):
                factor *= trainer.current_gradient_accumulation_steps
            break
    return caller, factor


def _of_processes(trainer: Trainer) -> int:
    """What `Trainer.compute_loss` multiplies a loss by, as if it were a share of a sum over all processes."""
    if trainer.args.n_gpu > 1:
        return int(trainer.args.n_gpu)
    processes = int(trainer.accelerator.num_processes)
    if hasattr(Trainer, "loss_is_scaled_for_ga"):
        return processes // trainer.get_tp_size()
    # Before the switch, releases whose code names the configuration divide by the parts of a tensor; others do not.
    config = getattr(trainer.accelerator, "parallelism_config", None)
    divides = "parallelism_config" in Trainer.compute_loss.__code__.co_consts
    return processes // config.tp_size if divides and config is not None else processes


def check_release(loss: str) -> None:
    """Raises a TypeError if the Trainer of the installed release calls no loss without labels."""
    if release(version("transformers")) < (4, 57):
        raise TypeError(
            f"loss: expected transformers 4.57 or newer for {loss}, got {version('transformers')}, whose Trainer calls "
            "no loss of a batch without labels"
        )


def trains(trainer: Trainer, module: nn.Module) -> bool:
    """Whether a module is the Trainer's model or a part of it: not so where `model_init` has made another since."""
    return trainer.model is not None and any(part is module for part in trainer.model.modules())


def dispatches(trainer: Trainer | None) -> bool:
    """Whether accelerate reads batches in one process, as it does streamed data, and cuts them by row for all.

    The batches of the training or of the evaluation, whichever goes on: either may be streamed without the other.
    """
    if trainer is None or trainer.model is None or trainer.accelerator.num_processes == 1:
        return False
    handler = trainer.callback_handler
    loader = handler.train_dataloader if trainer.model.training else handler.eval_dataloader
    return isinstance(loader, DataLoaderDispatcher)


def of_same_class(labels: Tensor | None, examples: int) -> ExcludedMask:
    """Returns the mask of the examples that have the anchor's class. Raises a ValueError without labels."""
    expected = f"exclude_same_class: expected labels of shape [{examples}], one for each example, got"
    if labels is None:
        raise ValueError(
            f'{expected} None; let the collator put "labels" into the batch, and the Trainer keep them: '
            'TrainingArguments(label_names=["labels"], remove_unused_columns=False)'
        )
    if not isinstance(labels, Tensor):
        raise ValueError(f"{expected} {type(labels).__name__}")
    if labels.shape != (examples,):
        raise ValueError(f"{expected} {list(labels.shape)}")
    return same_label(labels, labels)


def refuse_uncalled_class(loss: type[nn.Module], options: Mapping[str, Any]) -> None:
    """A TypeError where the Trainer calls a class, given as `compute_loss_func`, in place of a loss."""
    if "num_items_in_batch" in options:
        name = loss.__name__
        raise TypeError(f"compute_loss_func: expected a loss object such as {name}(...), got the class {name}")
