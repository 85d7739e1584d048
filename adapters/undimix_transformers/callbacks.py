"""Callbacks for transformers' and sentence-transformers' Trainers: two schedules and statistics of the negatives."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from undimix_plugins.toolkit import (
    TemperatureCycle,
    WeightedLoss,
    check_number,
    check_warmup,
    hardness_share,
    losses_with_temperature,
    mean_statistics,
    negative_statistics,
    set_hardness,
    set_temperature,
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
    """Begins with the plain loss and ends with the full weighting.

    The share of the hardness at a step (see `Weighting.softened`) is

        linear: x,    cosine: (1 - cos(pi * x)) / 2,    x = min(global_step / steps, 1).

    It follows the Trainer's `global_step`, which counts the optimiser's steps, so a resumed run continues where it was.
    With `restore_callback_states_from_checkpoint`, the checkpoint's settings replace these, and `share` refers to the
    training as it was when it began. When training ends, the losses have their full weighting again. If it is
    interrupted, a loss still remembers its full weighting: `undimix(loss)` returns to it, and so does the next
    training. An evaluation uses the loss as it is at that step. A loss under `torch.compile` is compiled a second time
    when its hardness first changes.

    Args:
        of: The loss, or a module that contains it; needed if a function of yours calls the loss. None finds the losses
            of the Trainer when training begins: the loss of a sentence-transformers trainer, the `compute_loss_func`,
            and losses inside the model. You can also pass a Trainer.
        steps: How many steps the warm-up takes, at least 1.
        share: The share of the training that it takes, in place of `steps`; above 0 and at most 1.
        shape: "linear" or "cosine".

    Raises:
        TypeError: If `of` is neither a Trainer nor a module.
        ValueError: If both or neither of `steps` and `share` are given, or one is out of its range; for another
            `shape`. When training begins: if there is no weighted loss.

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
        """The state that the Trainer puts into its checkpoints."""
        settings = {"steps": self.steps, "share": self.share, "shape": self.shape}
        return {"args": settings, "attributes": {"total": self.total}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finds the losses."""
        if state.global_step == 0 or self.total is None:
            self.total = state.max_steps
        searched = _searched(next((trainer for trainer, _ in trainers_above()), None), self.of)
        self._losses = list(dict.fromkeys(loss for part in searched for loss in weighted_losses(part)))
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


def _searched(trainer: Trainer | None, of: Trainer | nn.Module | None) -> list[nn.Module]:
    """Returns the modules in which a callback looks for losses."""
    of = trainer if of is None else of
    if trainer is not None and trainer.model_init is not None and isinstance(of, type(trainer.model)):
        of = trainer.model  # made anew for this training
    if of is None or isinstance(of, nn.Module):
        return [] if of is None else [of]
    loss = getattr(of, "loss", None)
    parts = [*(loss.values() if isinstance(loss, dict) else [loss]), of.compute_loss_func, of.model]
    return [part for part in parts if isinstance(part, nn.Module)]


class TemperatureSchedule(_OfTransformers, ExportableState):
    """Moves the temperature of the contrastive losses between two values, along a cosine.

        t = (high - low) * (1 + cos(2 pi * time / period)) / 2 + low

    The time is the Trainer's `global_step`, which counts the optimiser's steps; with `epochs`, it is the number of
    finished epochs, so that the temperature is constant within an epoch. So a resumed run continues where it was. With
    `restore_callback_states_from_checkpoint`, the checkpoint's settings replace these, and `share` refers to the
    training as it was when it began. The first temperature is `high`.

    It works with `SimCSELoss`, and with the ranking losses and the losses with a guide of sentence-transformers, plain
    and weighted, also inside `MatryoshkaLoss` and the like. A loss with a `scale` gets `1 / t`. All losses that it
    finds have the same temperature. It raises an error for `ImageTextLoss`, whose model learns the temperature. Pass
    any other loss as `of`: it then needs a number as its attribute `temperature`, or `scale` for an inverse
    temperature.

    The temperature is logged as "temperature", whenever the Trainer logs. An evaluation uses the loss as it is at that
    step. When training ends, the losses keep their last temperature, which a sentence-transformers' model card then
    shows. A loss under `torch.compile` is compiled a second time when its temperature first changes.

    Args:
        low: The lowest temperature, at least 1e-10.
        high: The highest temperature, at least `low`.
        epochs: The length of a period in epochs, above 0. The paper has 400.
        steps: The length of a period in steps, above 0, in place of `epochs`.
        share: The length of a period as a share of the training, above 0, in place of `epochs`. With none of the three,
            it is 0.2, as for the paper's 400 of 2,000 epochs.
        of: The loss, or a module that contains it; needed if a function of yours calls the loss. None finds the losses
            of the Trainer when training begins: the loss of a sentence-transformers trainer, the `compute_loss_func`,
            and losses inside the model. You can also pass a Trainer.

    Raises:
        TypeError: If `of` is neither a Trainer nor a module.
        ValueError: If a temperature or a length is out of its range, or if more than one length is given. When training
            begins: if there is no contrastive loss, or a loss has no number as temperature (as if it is learned).

    Warns:
        UserWarning: If a temperature is above 2.

    References:
        Kukleva, Böhle, Schiele, Kuehne, Rupprecht: Temperature Schedules for Self-Supervised Contrastive Methods on
        Long-Tail Data, ICLR 2023, arXiv 2303.13664, with `low=0.1, high=1.0` and a period of 400 epochs.

    Examples:
        >>> import tempfile
        >>> from undimix_transformers import SimCSELoss
        >>> model, loss = torch.nn.Linear(2, 2), SimCSELoss(temperature=0.05)  # any encoder
        >>> args = TrainingArguments(tempfile.mkdtemp(), report_to="none", use_cpu=True)
        >>> schedule = TemperatureSchedule(low=0.05, high=0.5, share=0.2)
        >>> trainer = Trainer(model=model, args=args, compute_loss_func=loss, callbacks=[schedule])
    """

    def __init__(
        self,
        low: float = 0.1,
        high: float = 1.0,
        *,
        epochs: float | None = None,
        steps: float | None = None,
        share: float | None = None,
        of: Trainer | nn.Module | None = None,
    ) -> None:
        if of is not None and not isinstance(of, (Trainer, nn.Module)):
            raise TypeError(f"of: expected the Trainer or its loss, got {of!r}")
        self.cycle, self.of = TemperatureCycle(low, high, epochs, steps, share), of
        self.total: int | None = None  # steps of the training that has the schedule
        self.temperature = high  # of the current step
        self._losses: list[nn.Module] = []
        self._trainer: Trainer | None = None

    def state(self) -> dict[str, Any]:
        """The state that the Trainer puts into its checkpoints."""
        return {"args": asdict(self.cycle), "attributes": {"total": self.total}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finds the losses."""
        if state.global_step == 0 or self.total is None:
            self.total = state.max_steps
        self._trainer = next((trainer for trainer, _ in trainers_above()), None)
        given = isinstance(self.of, nn.Module)
        searched = _searched(self._trainer, self.of)
        found = [loss for part in searched for loss in losses_with_temperature(part, _plain_losses(), given=given)]
        self._losses = list(dict.fromkeys(found))
        if not self._losses:
            raise ValueError(
                "TemperatureSchedule: expected a contrastive loss in the Trainer's loss, compute_loss_func or model, "
                "got none; for a loss of your own, or one that a function calls, TemperatureSchedule(of=loss)"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the temperature of the step."""
        assert self.total is not None  # since training began
        epoch = int((state.epoch or 0) + 1e-6)
        self.temperature = self.cycle.at(step=state.global_step, epoch=epoch, total=self.total)
        for loss in self._losses:
            set_temperature(loss, self.temperature)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Logs the temperature, if the Trainer logs the step."""
        self._log(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Logs the temperature, if the Trainer logs the epoch."""
        self._log(control)

    def _log(self, control: TrainerControl) -> None:
        if control.should_log and self._trainer is not None:
            self._trainer.log({"temperature": self.temperature})
            control.should_log = True  # the Trainer's own log is still to come


def _plain_losses() -> tuple[type[nn.Module], ...]:
    """Returns sentence-transformers' own losses, if a user has imported sentence-transformers."""
    if "sentence_transformers" not in sys.modules:
        return ()
    from undimix_sentence_transformers.adapter import CLASSES

    return tuple(CLASSES)


def _of_inputs(labels: Callable[[Any], Tensor], inputs: Any) -> Tensor:
    try:
        return labels(inputs)
    except KeyError as error:
        key = error.args[0] if error.args else None
        if not isinstance(key, str) or key in inputs:  # not a key of the inputs that is missing
            raise
        raise ValueError(
            f"labels: expected inputs with the key {key!r}, got {sorted(inputs)}; keep the column with "
            f'TrainingArguments(label_names=["{key}"], remove_unused_columns=False); with sentence-transformers, the '
            "dataset needs a column 'label' or 'labels', and the key is 'label'"
        ) from error


class NegativeStatistics(_OfTransformers):
    """Logs how the weights treat the negatives, as "negatives/effective_number" and so on.

    The numbers are those of `undimix_plugins.negative_statistics`, averaged over all contrasts of the step's
    micro-batches. They go through `Trainer.log`, into its history and to the tools that it reports to.

    Args:
        trainer: The Trainer, of transformers or sentence-transformers. Its `compute_loss` is replaced by one that can
            be watched.
        every: The numbers are computed every so many steps of the Trainer, at least 1.
        labels: A function from the inputs of `Trainer.compute_loss` to the class of each sample [samples], which finds
            false negatives: `lambda inputs: inputs["label"]` with sentence-transformers, `inputs["labels"][::2]` with
            `TwoViews`. None for no such numbers.

    Raises:
        TypeError: If `trainer` is not a Trainer, or `labels` is not a function.
        ValueError: If `every` is below 1. In training: if the inputs lack the key that `labels` reads, or if the labels
            do not fit the contrast.

    Warns:
        UserWarning: If no weighted loss is seen in a step (one under `torch.compile` is not seen). When training ends:
            if no step was a multiple of `every`.

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
        if labels is not None and not callable(labels):
            raise TypeError(f"labels: expected a function such as lambda inputs: inputs['labels'], got {labels!r}")
        self.trainer, self.every, self.labels = trainer, int(check_number("every", every, at_least=1)), labels
        self._watching, self._seen = False, list[dict[str, float]]()
        self._watched_any = False  # of this training's steps
        # Callbacks are not shown the batch, nor when the loss is worked out.
        self._compute_loss = trainer.compute_loss
        vars(trainer)["compute_loss"] = self._watched

    def _watched(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not (self._watching and model.training):  # a callback may evaluate amid a step
            return self._compute_loss(model, inputs, *args, **kwargs)
        labels = None if self.labels is None else _of_inputs(self.labels, inputs)
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
        """Begins to watch the losses, every so many steps."""
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
        """Warns if nothing was logged."""
        if not self._watched_any:
            warnings.warn(
                "NegativeStatistics logged nothing: no step of this training was a multiple of `every`", stacklevel=2
            )
