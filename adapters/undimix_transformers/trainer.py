"""What a `compute_loss_func` has to tell the Trainer that calls it, which passes nothing of itself."""

from __future__ import annotations

import sys

from torch import Tensor
from transformers import Trainer

from undimix_plugins import same_label
from undimix_plugins.contrast import Verdicts


def calling_trainer() -> tuple[Trainer | None, int]:
    """Tells the Trainer that calls, through functions of the user's or not, that a loss is a mean per micro-batch.

    Returns:
        The Trainer, or None; and what its `compute_loss` is going to multiply the loss by, as if it were a share of a
        sum over all processes.
    """
    caller, frame = None, sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        trainer = frame.f_locals.get("self")
        if not isinstance(trainer, Trainer):
            continue
        caller = trainer
        if trainer.loss_is_scaled_for_ga is None:
            trainer.loss_is_scaled_for_ga = False
        if frame.f_code is Trainer.compute_loss.__code__:
            counted = frame.f_locals["num_items_in_batch"] is not None
            if not counted or not trainer.args.average_tokens_across_devices:
                return caller, 1
            if trainer.args.n_gpu > 1:
                return caller, int(trainer.args.n_gpu)
            return caller, int(trainer.accelerator.num_processes // trainer.get_tp_size())
    return caller, 1


def of_same_class(labels: Tensor | None, examples: int) -> Verdicts:
    """Verdicts on examples: those of an anchor's class are none of its negatives; a ValueError without labels."""
    if not isinstance(labels, Tensor) or labels.shape != (examples,):
        came = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"exclude_same_class: expected labels of shape [{examples}], one for each example, got {came}")
    return same_label(labels, labels)
