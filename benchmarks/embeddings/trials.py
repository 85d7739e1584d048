"""A trial: one training with one weighting, temperature and seed, and the evaluation of its encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import undimix_plugins
from undimix_plugins import Weighting
from undimix_plugins.toolkit import mean_statistics

UNTRAINED = "untrained"
SCALES = ("tiny", "small", "full")
# Rules that settings do not tell: a part of a weighting's settings, and the name of its rule. When you change a rule,
# name it here and run `python -m benchmarks.embeddings.results`, which sets the results of the old rule aside.
RULES = {"mixing='geometric'": "fades where less than half of the negatives are effective"}


@dataclass(frozen=True)
class Trial:
    """One training and the evaluation of its encoder.

    Attributes:
        modality: "vision", "text" or "graph".
        recipe: The training method, such as "SimCLR".
        data: The public name of the training data set.
        weighting: The loss's weighting, as a Python expression of names of `undimix_plugins`; or `UNTRAINED`.
        temperature: The loss's temperature. With `highest`, the lowest one.
        batch_size: 0 for a recipe without batches.
        seed: The seed of everything random, including random splits.
        split: The data that evaluate the encoder, "validation" or "test".
        warmup: The share of the training over which the weighting's hardness grows from 0 to its full value.
        scale: The preset: "tiny" for a check that everything runs, "small" for the reported results, "full" for longer
            training of larger encoders on GPUs.
        class_known: Whether labels exclude the anchor's class from its negatives. It shows what false negatives cost.
        highest: The highest temperature of a cosine schedule, with five periods; 0 for a constant temperature.
        brief: Whether the costly parts are left out: the statistics of the negatives, and STS12 to STS16.
    """

    modality: str
    recipe: str
    data: str
    weighting: str
    temperature: float
    batch_size: int
    seed: int
    split: str = "validation"
    warmup: float = 0.0
    scale: str = "small"
    class_known: bool = False
    highest: float = 0.0
    brief: bool = False

    @property
    def trains(self) -> bool:
        return self.weighting != UNTRAINED

    def loss_weighting(self) -> Weighting:
        """The weighting as an object. The expression is evaluated: it must be yours or from `protocol`."""
        weighting = eval(self.weighting, {**vars(undimix_plugins)})
        if not isinstance(weighting, Weighting):
            raise ValueError(f"weighting: expected an expression for a Weighting, got {self.weighting!r}")
        return weighting

    def settings(self) -> str:
        """The weighting with all its settings, defaults included, and with its rule."""
        if not self.trains:
            return UNTRAINED
        told = repr(self.loss_weighting())
        return told + "".join(f"; {rule}" for part, rule in RULES.items() if part in told)


# Runs a trial, with the folder of local data sets or None; returns its "metrics" and "statistics".
Train = Callable[[Trial, Path | None], dict[str, Any]]


def quarters(seen: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean statistics of the negatives in the first and the last quarter of the training; empty if there are none."""
    if not seen:
        return {}
    quarter = max(1, len(seen) // 4)
    return {"first_quarter": mean_statistics(seen[:quarter]), "last_quarter": mean_statistics(seen[-quarter:])}
