"""Callbacks for pytorch_lightning's Trainer: two schedules, statistics of negatives, memory banks in checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from lightly.models.modules.memory_bank import MemoryBankModule
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from undimix_lightly.adapter import CLASSES
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

# What transformers' Trainer asks its callbacks for before anything else, be it made, trained, evaluated or asked.
OF_TRANSFORMERS = ("on_init_end", "on_train_begin", "on_evaluate", "on_predict", "on_prediction_step")


class _OfLightning(Callback):
    """Tells transformers' Trainer, which asks a callback for hooks that these do not have, what it has instead."""

    def __getattr__(self, name: str) -> Any:
        if name not in OF_TRANSFORMERS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        ours = type(self).__name__
        theirs = "a TrainerCallback" if isinstance(self, MemoryBankCheckpoint) else f"undimix_transformers.{ours}"
        raise TypeError(
            f"callbacks: expected {theirs} for transformers' and sentence-transformers' Trainers, got "
            f"undimix_lightly.{ours}, which is for Lightning's"
        )


class _OfWholeTraining(_OfLightning):
    """A callback that knows the number of steps of the training as it was when it began, also in a resumed run."""

    _total: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """The number of steps of the training."""
        return {"total": self._total}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with that training."""
        self._total = state_dict["total"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the number of steps, unless the training is a resumed one."""
        if trainer.global_step == 0 or self._total is None:
            self._total = trainer.estimated_stepping_batches


class HardnessWarmup(_OfWholeTraining):
    """Warms up all weighted losses of the LightningModule, from the plain loss to the full weighting.

    The share of the hardness at a step (see `Weighting.softened`) is

        linear: x,    cosine: (1 - cos(pi * x)) / 2,    x = min(global_step / steps, 1).

    It follows the Trainer's `global_step`, which counts the optimiser's steps. So a resumed run continues where it was,
    and `share` refers to the training as it was when it began. When training ends or fails, the losses have their full
    weighting again. Validation uses the loss as it is at that step. A loss under `torch.compile` is compiled a second
    time when its hardness first changes.

    Args:
        steps: How many steps the warm-up takes, at least 1.
        share: The share of the training that it takes, in place of `steps`; above 0 and at most 1, of the Trainer's
            `estimated_stepping_batches`.
        shape: "linear" or "cosine".

    Raises:
        ValueError: If both or neither of `steps` and `share` are given, or one is out of its range; for another
            `shape`. When training begins: if the module has no weighted loss, or a `share` is given and the training
            has no end.

    Examples:
        >>> from lightly.loss import NTXentLoss
        >>> criterion = undimix(NTXentLoss(temperature=0.5))  # as an attribute of the LightningModule
        >>> trainer = Trainer(max_epochs=10, callbacks=[HardnessWarmup(share=0.1)], logger=False, accelerator="cpu")
    """

    def __init__(self, *, steps: float | None = None, share: float | None = None, shape: str = "linear") -> None:
        check_warmup(steps, share, shape)
        self.steps, self.share, self.shape = steps, share, shape
        self._losses: list[WeightedLoss] = []

    @property
    def state_key(self) -> str:
        """The key of the state in checkpoints: one for each combination of settings."""
        return self._generate_state_key(steps=self.steps, share=self.share, shape=self.shape)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the losses."""
        super().on_train_start(trainer, pl_module)
        self._losses = weighted_losses(pl_module)
        if not self._losses:
            raise ValueError(
                "HardnessWarmup: expected a LightningModule with a weighted loss as an attribute, such as "
                f"undimix(NTXentLoss()), got {type(pl_module).__name__} without one; did you call undimix?"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Sets the hardness of the step."""
        assert self._total is not None  # since training began
        self._set(
            hardness_share(trainer.global_step, self._total, steps=self.steps, share=self.share, shape=self.shape)
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets the full weighting."""
        self._set(1)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Sets the full weighting."""
        self._set(1)

    def _set(self, share: float) -> None:
        for loss in self._losses:
            set_hardness(loss, share)


class TemperatureSchedule(_OfWholeTraining):
    """Moves the temperature of the contrastive losses between two values, along a cosine.

        t = (high - low) * (1 + cos(2 pi * time / period)) / 2 + low

    The time is the Trainer's `global_step`, which counts the optimiser's steps; with `epochs`, it is the number of
    finished epochs, so that the temperature is constant within an epoch. So a resumed run continues where it was, and
    `share` refers to the training as it was when it began. The first temperature is `high`.

    It works with lightly's losses (`NTXentLoss`, `DCLLoss`, `DCLWLoss`, `DirectCLRLoss`, `DetConSLoss`, `DetConBLoss`,
    and the base temperature of `MACLLoss`), plain and weighted, with the weighted losses of the other toolkits, and
    with `AdCo` (the encoder's temperature). It looks for them everywhere in the LightningModule. All losses that it
    finds have the same temperature. Pass any other loss, or the LightningModule itself, as `of`: it then needs a number
    as its attribute `temperature`, or `scale` for an inverse temperature.

    The temperature is logged as "temperature", at the steps at which the Trainer logs. Validation uses the loss as it
    is at that step. When training ends, the losses keep their last temperature. A loss under `torch.compile` is
    compiled a second time when its temperature first changes.

    Args:
        low: The lowest temperature, at least 1e-10.
        high: The highest temperature, at least `low`.
        epochs: The length of a period in epochs, above 0. The paper has 400.
        steps: The length of a period in steps, above 0, in place of `epochs`.
        share: The length of a period as a share of the training, above 0, in place of `epochs`. With none of the three,
            it is 0.2, as for the paper's 400 of 2,000 epochs.
        of: The loss, or a module that contains it. None finds the losses of the LightningModule.

    Raises:
        ValueError: If a temperature or a length is out of its range, or if more than one length is given. When training
            begins: if there is no contrastive loss, or a loss has no number as temperature (as if it is learned), or
            for a `share` if the training has no end.
        TypeError: If `of` is not a module.

    Warns:
        UserWarning: If a temperature is above 2.

    References:
        Kukleva, Böhle, Schiele, Kuehne, Rupprecht: Temperature Schedules for Self-Supervised Contrastive Methods on
        Long-Tail Data, ICLR 2023, arXiv 2303.13664, with `low=0.1, high=1.0` and a period of 400 epochs.

    Examples:
        >>> from lightly.loss import NTXentLoss
        >>> criterion = NTXentLoss(temperature=0.5)  # as an attribute of the LightningModule; plain or undimix(...)
        >>> schedule = TemperatureSchedule(low=0.1, high=1.0, share=0.2)
        >>> trainer = Trainer(max_epochs=10, callbacks=[schedule], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        low: float = 0.1,
        high: float = 1.0,
        *,
        epochs: float | None = None,
        steps: float | None = None,
        share: float | None = None,
        of: nn.Module | None = None,
    ) -> None:
        if of is not None and not isinstance(of, nn.Module):
            raise TypeError(f"of: expected a loss, or a module that contains it, got {of!r}")
        self.cycle, self.of = TemperatureCycle(low, high, epochs, steps, share), of
        self._losses: list[nn.Module] = []

    @property
    def state_key(self) -> str:
        """The key of the state in checkpoints: one for each combination of settings."""
        return self._generate_state_key(**asdict(self.cycle))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the losses."""
        super().on_train_start(trainer, pl_module)
        where = pl_module if self.of is None else self.of
        self._losses = losses_with_temperature(where, tuple(CLASSES), given=self.of is not None)
        if not self._losses:
            raise ValueError(
                "TemperatureSchedule: expected a module with a contrastive loss as an attribute, such as NTXentLoss(), "
                f"got {type(where).__name__} without one; for a loss of your own, TemperatureSchedule(of=loss)"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Sets and logs the temperature of the step."""
        assert self._total is not None  # since training began
        temperature = self.cycle.at(step=trainer.global_step, epoch=trainer.current_epoch, total=self._total)
        for loss in self._losses:
            set_temperature(loss, temperature)
        pl_module.log("temperature", temperature)


class NegativeStatistics(_OfLightning):
    """Logs how the weights treat the negatives, as "negatives/effective_number" and so on.

    The numbers are those of `undimix_plugins.negative_statistics`, averaged over all contrasts of the step (several
    with `accumulate_grad_batches`). They go to the Trainer's loggers at the steps at which they are computed, whatever
    `log_every_n_steps` says. A row has the numbers of its own step, and leaves out a name without a value.
    `trainer.callback_metrics` has the last numbers, for other callbacks.

    Args:
        every: The numbers are computed every so many steps of the Trainer, at least 1. Steps are counted as for
            loggers: with several optimisers, once for a batch.
        labels: A function from the training batch to the class of each sample [samples], which finds false negatives,
            such as `lambda batch: batch[1]`; None for no such numbers.

    Raises:
        TypeError: If `labels` is not a function.
        ValueError: If `every` is below 1. In training: if the labels do not fit the contrast, or with a memory bank,
            whose entries have no labels.

    Warns:
        UserWarning: If no weighted loss is seen in a step (one under `torch.compile` is not seen). When training ends:
            if no step was a multiple of `every`.

    Examples:
        >>> callback = NegativeStatistics(every=50, labels=lambda batch: batch[1])
        >>> trainer = Trainer(max_epochs=10, callbacks=[callback], logger=False, accelerator="cpu")
    """

    def __init__(self, every: int = 50, labels: Callable[[Any], Tensor] | None = None) -> None:
        if labels is not None and not callable(labels):
            raise TypeError(f"labels: expected a function such as lambda batch: batch[1], got {labels!r}")
        self.every, self.labels = int(check_number("every", every, at_least=1)), labels
        self._seen: list[dict[str, float]] = []
        self._step: int | None = None  # the last one that was watched in this training
        self._watching: ExitStack | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets an earlier training."""
        self._step = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begins to watch the losses, every so many steps."""
        self._stop()
        # What loggers are given. `global_step` counts each optimiser's steps, several for a batch.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if (step + 1) % self.every:
            return
        if step != self._step:  # else a further batch of the same step
            self._step, self._seen = step, []
        labels = None if self.labels is None else self.labels(batch)
        self._watching = ExitStack()
        self._watching.enter_context(
            watch(lambda *compared: self._seen.append(negative_statistics(*compared, labels=labels)))
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs what was seen, with the last batch of the step."""
        if self._watching is None:
            return
        self._stop()
        if trainer.fit_loop._should_accumulate():  # nor does `global_step` tell the step's last batch
            return
        if not self._seen:
            warnings.warn(
                "NegativeStatistics saw no weighted loss: did you call undimix? (One under torch.compile is not seen.)",
                stacklevel=2,
            )
            return
        numbers = {f"negatives/{name}": value for name, value in mean_statistics(self._seen).items()}
        # Not through `log_dict`: Lightning logs its values until the epoch's end, also at later steps.
        for known in (trainer.callback_metrics, trainer.logged_metrics):
            for name in [name for name in known if name.startswith("negatives/")]:
                del known[name]
            known.update({name: torch.tensor(value) for name, value in numbers.items()})
        for logger in trainer.loggers:
            logger.log_metrics({**numbers, "epoch": trainer.current_epoch}, step=self._step)
            logger.save()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops watching; warns if nothing was logged."""
        self._stop()
        if self._step is None:
            warnings.warn(
                "NegativeStatistics logged nothing: no step of this training was a multiple of `every`", stacklevel=2
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stops watching."""
        self._stop()

    def _stop(self) -> None:
        if self._watching is not None:
            self._watching.close()
            self._watching = None


class MemoryBankCheckpoint(_OfLightning):
    """Keeps lightly's memory banks in the Trainer's checkpoints, so that a resumed run continues with them.

    lightly does not save its memory banks: without this callback, a resumed MoCo begins with a bank of random rows.
    With several processes, a checkpoint holds the banks of the first process, and all processes continue with these.

    Raises:
        ValueError: When training begins: if the module has no memory bank. When it is resumed: if the checkpoint was
            saved without this callback, or its banks have other names or shapes.

    Examples:
        >>> from lightly.loss import NTXentLoss
        >>> criterion = undimix(NTXentLoss(memory_bank_size=(4096, 128)))  # as an attribute of the LightningModule
        >>> trainer = Trainer(max_epochs=10, callbacks=[MemoryBankCheckpoint()], logger=False, accelerator="cpu")
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that there is a bank."""
        if not _banks(pl_module):
            raise ValueError(
                "MemoryBankCheckpoint: expected a LightningModule with a memory bank, such as "
                f"NTXentLoss(memory_bank_size=(4096, 128)), got {type(pl_module).__name__} without one"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the banks, and the place where each is filled next."""
        checkpoint["callbacks"][self.state_key] = {
            name: {"bank": module.bank.clone(), "bank_ptr": module.bank_ptr.clone()}
            for name, module in _banks(pl_module).items()
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Fills the banks."""
        if trainer.state.fn != "fit":
            return
        saved, banks = checkpoint["callbacks"].get(self.state_key, {}), _banks(pl_module)
        came = {name: list(state["bank"].shape) for name, state in saved.items()}
        expected = {name: list(module.bank.shape) for name, module in banks.items()}
        if came != expected:
            raise ValueError(f"MemoryBankCheckpoint: expected banks {expected} in the checkpoint, got {came or 'none'}")
        for name, module in banks.items():
            module.bank.copy_(saved[name]["bank"])
            module.bank_ptr.copy_(saved[name]["bank_ptr"])


def _banks(module: torch.nn.Module) -> dict[str, MemoryBankModule]:
    named = module.named_modules()
    return {name: inner for name, inner in named if isinstance(inner, MemoryBankModule) and inner.size[0]}
