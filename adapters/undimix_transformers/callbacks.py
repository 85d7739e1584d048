"""Callbacks for transformers' and sentence-transformers' Trainers: a warm-up of the hardness, what the weights do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from undimix_plugins.toolkit import (
    WeightedLoss,
    check_number,
    check_warmup,
    hardness_share,
    mean_statistics,
    negative_statistics,
    set_hardness,
    watch,
    weighted_losses,
)
from undimix_transformers.trainer import trainers_above


class _OfTransformers(TrainerCallback):
    """Tells Lightning's Trainer, which asks a callback for hooks that these do not have, what it has instead."""

    def __getattr__(self, name: str) -> Any:
        if name in ("setup", "on_exception"):  # the first one, and the one for its error
            raise TypeError(
                f"callbacks: expected undimix_lightly.{type(self).__name__} for a Lightning Trainer, got that of "
                "transformers' Trainer"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class HardnessWarmup(_OfTransformers, ExportableState):
    """Begins with the plain loss and comes to the full weighting.

    The share of the hardness at a step (`Weighting.softened` says of what) is

        linear: x,    cosine: (1 - cos(pi * x)) / 2,    x = min(global_step / steps, 1).

    It follows the Trainer's own `global_step`, which counts the optimiser's steps, so that a resumed run goes on where
    it was. With `restore_callback_states_from_checkpoint`, the checkpoint's settings hold instead of these, and a
    `share` stays that of the training as it was when it began. When training ends, losses have their full weighting
    again; where it was broken off, they keep that beside the softened one, and `undimix(loss)` or the next training
    comes to it. An evaluation in between is of the loss as it is then. A loss under `torch.compile` is compiled a
    second time, for hardnesses in general.

    Args:
        of: A module that is the loss or has it inside, where it isn't found: in a function that calls it. A Trainer,
            or None for the Trainer that trains, has its losses looked up when training begins: those of
            sentence-transformers' trainers, the `compute_loss_func`, and what is inside the model.
        steps: How many steps the warm-up takes, at least 1.
        share: How much of the training it takes instead, above 0 and at most 1.
        shape: "linear" or "cosine".

    Raises:
        TypeError: For what is no Trainer and no module.
        ValueError: For both or neither of `steps` and `share`, or one out of its range; another `shape`. When training
            begins: where there is no weighted loss.

    Examples:
        >>> import tempfile
        >>> from undimix_transformers import SimCSELoss
        >>> model, loss = torch.nn.Linear(2, 2), SimCSELoss(temperature=0.05)  # any encoder
        >>> args = TrainingArguments(tempfile.mkdtemp(), report_to="none", use_cpu=True)
        >>> warmup = HardnessWarmup(share=0.1)
        >>> trainer = Trainer(model=model, args=args, compute_loss_func=loss, callbacks=[warmup])
    """

    def __init__(
        self,
        of: Trainer | nn.Module | None = None,
        *,
        steps: float | None = None,
        share: float | None = None,
        shape: str = "linear",
    ) -> None:
        if of is not None and not isinstance(of, (Trainer, nn.Module)):
            raise TypeError(f"of: expected the Trainer or its loss, got {of!r}")
        check_warmup(steps, share, shape)
        self.of, self.steps, self.share, self.shape = of, steps, share, shape
        self.total: int | None = None  # steps of the training that is being warmed up
        self._losses: list[WeightedLoss] = []

    def state(self) -> dict[str, Any]:
        """What the Trainer puts into its checkpoints."""
        settings = {"steps": self.steps, "share": self.share, "shape": self.shape}
        return {"args": settings, "attributes": {"total": self.total}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finds the losses."""
        if state.global_step == 0 or self.total is None:
            self.total = state.max_steps
        trainer = next((trainer for trainer, _ in trainers_above()), None)
        of = trainer if self.of is None else self.of
        if trainer is not None and trainer.model_init is not None and isinstance(of, type(trainer.model)):
            of = trainer.model  # made anew for this training
        self._losses = [] if of is None else _losses(of)
        if not self._losses:
            raise ValueError(
                "HardnessWarmup: expected a weighted loss in the Trainer's loss, compute_loss_func or model, got none; "
                "where a function calls it, pass the loss: HardnessWarmup(loss, ...)"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the hardness of the step."""
        assert self.total is not None  # since training began
        share = hardness_share(state.global_step, self.total, steps=self.steps, share=self.share, shape=self.shape)
        for loss in self._losses:
            set_hardness(loss, share)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the full weighting."""
        for loss in self._losses:
            set_hardness(loss, 1)


def _losses(of: Trainer | nn.Module) -> list[WeightedLoss]:
    if isinstance(of, nn.Module):
        return weighted_losses(of)
    loss = getattr(of, "loss", None)
    parts = [*(loss.values() if isinstance(loss, dict) else [loss]), of.compute_loss_func, of.model]
    found = [inner for part in parts if isinstance(part, nn.Module) for inner in weighted_losses(part)]
    return list(dict.fromkeys(found))


class NegativeStatistics(_OfTransformers):
    """Logs what the weights do to the negatives, as "negatives/effective_number" and so on.

    The numbers are those of `undimix_plugins.negative_statistics`, averaged over what the losses of the step's
    micro-batches compare. They go through `Trainer.log`, into its history and to where it reports to.

    Args:
        trainer: The Trainer, also one of sentence-transformers; its `compute_loss` is put where it can be watched.
        every: At how many of the Trainer's steps they are worked out, at least 1: after this many, twice as many, and
            so on.
        labels: A function from the inputs of `Trainer.compute_loss` to a class for each sample that the loss compares
            [samples], to find false negatives by; None to do without.

    Raises:
        TypeError: For what is no Trainer.
        ValueError: For an `every` below 1; in training, for labels that do not fit what is compared.

    Warns:
        UserWarning: Where a step has no weighted loss to be seen, as one under `torch.compile` is not; when training
            ends, where it had no step that is a multiple of `every`.

    Examples:
        >>> import tempfile
        >>> from undimix_transformers import SimCSELoss
        >>> model, loss = torch.nn.Linear(2, 2), SimCSELoss(temperature=0.05)  # any encoder
        >>> args = TrainingArguments(tempfile.mkdtemp(), report_to="none", use_cpu=True)
        >>> trainer = Trainer(model=model, args=args, compute_loss_func=loss)
        >>> trainer.add_callback(NegativeStatistics(trainer, every=50))
    """

    def __init__(self, trainer: Trainer, every: int = 50, labels: Callable[[Any], Tensor] | None = None) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(f"trainer: expected a Trainer, got {trainer!r}")
        self.trainer, self.every, self.labels = trainer, int(check_number("every", every, at_least=1)), labels
        self._watching, self._seen = False, list[dict[str, float]]()
        self._watched_any = False  # of this training's steps
        # Callbacks are not shown the batch, nor when the loss is worked out.
        self._compute_loss = trainer.compute_loss
        vars(trainer)["compute_loss"] = self._watched

    def _watched(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not (self._watching and model.training):  # a callback may evaluate amid a step
            return self._compute_loss(model, inputs, *args, **kwargs)
        labels = None if self.labels is None else self.labels(inputs)
        with watch(lambda *compared: self._seen.append(negative_statistics(*compared, labels=labels))):
            return self._compute_loss(model, inputs, *args, **kwargs)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forgets an earlier training."""
        self._watching, self._watched_any = False, False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins to watch the losses, at some steps."""
        self._watching, self._seen = (state.global_step + 1) % self.every == 0, []
        self._watched_any |= self._watching

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Logs what was seen."""
        if not self._watching:
            return
        self._watching = False
        if not self._seen:
            warnings.warn(
                "NegativeStatistics saw no weighted loss: did you call undimix? (One under torch.compile is not seen.)",
                stacklevel=2,
            )
            return
        # What is logged here would count as the Trainer's own log of this step, which is still to come.
        should_log = control.should_log
        self.trainer.log({f"negatives/{name}": value for name, value in mean_statistics(self._seen).items()})
        control.should_log = should_log

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Says so where nothing could be logged."""
        if not self._watched_any:
            warnings.warn(
                "NegativeStatistics logged nothing: no step of this training was a multiple of `every`", stacklevel=2
            )
