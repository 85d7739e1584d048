"""The protocol: which trials answer which question, in six stages.

host         each contender at the host's own temperature, untuned, on validation data, over twelve seeds
host_test    the same on test data, over twelve other seeds
tuning       twelve settings of each method on validation data, with one seed
test         the best setting of each method on test data, over twelve seeds
exploratory  other weightings and settings on validation data, and what false negatives cost
flatness     each method over temperatures and batch sizes on validation data
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from statistics import mean
from typing import Any

from benchmarks.embeddings.trials import UNTRAINED, Trial

PLAIN, HCL, UNDIMIX = "plain, tuned", "HCL, tuned", "UnDiMix()"
HCLS = ("HCL(beta=1.0, tau_plus=0.1)", "HCL(beta=0.5, tau_plus=0.0)")  # the paper's setting comes first
METHODS = {PLAIN: "Uniform()", HCL: HCLS[0], UNDIMIX: "UnDiMix()"}
TEMPERATURES = (0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
FLATNESS_TEMPERATURES = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
# Twelve settings for each method.
GRIDS = {
    PLAIN: [("Uniform()", temperature) for temperature in TEMPERATURES],
    HCL: [(hcl, temperature) for hcl in HCLS for temperature in FLATNESS_TEMPERATURES],
    UNDIMIX: [("UnDiMix()", temperature) for temperature in TEMPERATURES],
}
# The default at the first evaluation on test data. Its results are kept and reported; its trials are not run again.
TESTED_FIRST = "UnDiMix(0.5, 0.5, 0.5, detached=True)"
CURVES = ("Uniform()", *HCLS, "UnDiMix()")
OVER_TEMPERATURES = ("Uniform()", *HCLS, "ADNCE()", "UnDiMix()")
# What is compared at the host's own temperature: each method at its paper's setting.
SCHEDULE = "temperature schedule"
CONTENDERS: dict[str, dict[str, Any]] = {
    "plain": {"weighting": "Uniform()"},
    HCLS[0]: {"weighting": HCLS[0]},
    "ADNCE()": {"weighting": "ADNCE()"},
    SCHEDULE: {"weighting": "Uniform()", "temperature": 0.1, "highest": 1.0},
    UNDIMIX: {"weighting": "UnDiMix()"},
}
# A temperature at which weights act on ranking losses, whose own is lower.
RAISED = 0.2
AT_RAISED = {f"{name} at {RAISED:g}": {**CONTENDERS[name], "temperature": RAISED} for name in ("plain", UNDIMIX)}
HOST_SEEDS = range(100, 112)
SEEDS = range(12)
TUNING_SEED = 100
FLATNESS_SEEDS = (100, 101)
EXPLORATORY_SEEDS = (100, 101, 102)
STAGES = ("host", "host_test", "tuning", "test", "exploratory", "flatness")

EXPLORED = (
    "UnDiMix()",
    "UnDiMix(detached=True)",
    # Without a component, and similarity alone.
    "UnDiMix(influence=0, diversity=0)",
    "UnDiMix(diversity=0)",
    "UnDiMix(influence=0)",
    "UnDiMix(similarity=0)",
    # Another hardness.
    "UnDiMix(hardness=0.5)",
    "UnDiMix(hardness=2.0)",
    # The paper's mixing.
    "UnDiMix(mixing='linear')",
    "UnDiMix(mixing='linear', hardness=2.0)",
    # The other methods.
    "Debiased(tau_plus=0.1)",
    *HCLS,
    "Ring()",
    "BCL()",
    "SimilarityPenalty()",
    "FalseNegativeElimination()",
    "MoCHi()",
    "compose(UnDiMix(), Debiased(tau_plus=0.1))",
    "compose(UnDiMix(), FalseNegativeElimination())",
)


Metrics = dict[Trial, dict[str, float]]


@dataclass(frozen=True)
class Benchmark:
    """A recipe on a data set, with the metric that chooses settings.

    Attributes:
        base: The trial that all others are variants of.
        metric: The metric that chooses settings.
        host_temperature: The temperature that a user gets without a choice: the toolkit's or the authors'.
        further: Other metrics that are reported.
        batch_sizes: The batch sizes of the stage "flatness"; empty for a recipe without batches.
        explored_weightings: The weightings of the stage "exploratory".
        explores: Whether that stage runs, and whether flatness has a second seed.
        tuned_on: The data sets that choose settings; empty for this one's own validation data.
        has_classes: Whether the training data have classes, so that false negatives are known.
        temperature_divisor: Divides the temperatures of `GRIDS`.
        raised: Whether `AT_RAISED` is compared, too.
        stages: The stages that it has; "host_test" alone where the data choose nothing.
    """

    base: Trial
    metric: str
    host_temperature: float
    further: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    explored_weightings: tuple[str, ...] = EXPLORED
    explores: bool = True
    tuned_on: tuple[str, ...] = ()
    has_classes: bool = True
    temperature_divisor: float = 1.0
    raised: bool = False
    stages: tuple[str, ...] = STAGES

    def at(self, weighting: str, temperature: float, seed: int, split: str = "validation", **changes: Any) -> Trial:
        return replace(self.base, weighting=weighting, temperature=temperature, seed=seed, split=split, **changes)

    @property
    def untrained(self) -> Trial:
        """The encoder before training, on validation data."""
        return self.at(UNTRAINED, 0.0, TUNING_SEED)

    def grid(self, method: str) -> list[list[Trial]]:
        """For each setting of a method, or of `TESTED_FIRST`, its trials: one for each data set that tunes."""
        data_sets = self.tuned_on or (self.base.data,)
        first = [(TESTED_FIRST, temperature) for temperature in TEMPERATURES]
        settings = first if method == TESTED_FIRST else GRIDS[method]
        return [
            [
                replace(self.at(weighting, round(t / self.temperature_divisor, 6), TUNING_SEED), data=data)
                for data in data_sets
            ]
            for weighting, t in settings
        ]

    def at_host(self, split: str) -> dict[str, list[list[Trial]]]:
        """For the untrained encoder and each contender its trials at the host's own temperature.

        There is a list for each seed. It has one trial; on validation data, one for each data set that tunes.
        """
        validates = split == "validation"
        data_sets = self.tuned_on if self.tuned_on and validates else (self.base.data,)
        found: dict[str, list[list[Trial]]] = {}
        further = AT_RAISED if self.raised else {}
        settings = {UNTRAINED: {"weighting": UNTRAINED, "temperature": 0.0}, **CONTENDERS, **further}
        for name, setting in settings.items():
            one = self.at(**{"temperature": self.host_temperature, "seed": 0, "split": split, "brief": True, **setting})
            seeds = HOST_SEEDS if validates else SEEDS
            found[name] = [[replace(one, seed=seed, data=data) for data in data_sets] for seed in seeds]
        return found

    def missing(self, method: str, results: Metrics) -> list[Trial]:
        """The trials of the method's grid without a result."""
        return [trial for setting in self.grid(method) for trial in setting if trial not in results]

    def is_tuned(self, results: Metrics) -> bool:
        """Whether the grids of all methods have their results."""
        return not any(self.missing(method, results) for method in GRIDS)

    def best(self, method: str, results: Metrics) -> list[Trial]:
        """The trials of the best setting on validation data; a ValueError if the grid is incomplete."""
        if missing := self.missing(method, results):
            raise ValueError(
                f"{method} on {self.base.data}: {len(missing)} trials have no result; run the stage 'tuning'"
            )
        return max(self.grid(method), key=lambda setting: mean(results[trial][self.metric] for trial in setting))

    def chosen(self, method: str, results: Metrics) -> tuple[str, float]:
        """The weighting and temperature of the best setting."""
        best, *_ = self.best(method, results)
        return best.weighting, best.temperature

    def settings(self, results: Metrics) -> dict[str, tuple[str, float]]:
        """What is compared: the untrained encoder, and each method at its best setting."""
        return {UNTRAINED: (UNTRAINED, 0.0)} | {method: self.chosen(method, results) for method in GRIDS}

    def trials(self, stage: str, results: Metrics) -> list[Trial]:
        """The trials of a stage; none if the benchmark does not have it."""
        of_stage: Callable[[Metrics], list[Trial]] = getattr(self, stage)
        return of_stage(results) if stage in self.stages else []

    def host(self, results: Metrics) -> list[Trial]:
        """The contenders at the host's own temperature on validation data."""
        return [trial for of_one in self.at_host("validation").values() for of_seed in of_one for trial in of_seed]

    def host_test(self, results: Metrics) -> list[Trial]:
        """The contenders at the host's own temperature on test data."""
        return [trial for of_one in self.at_host("test").values() for of_seed in of_one for trial in of_seed]

    def tuning(self, results: Metrics) -> list[Trial]:
        """The grid of each method on validation data, with one seed."""
        trials = [trial for method in GRIDS for setting in self.grid(method) for trial in setting]
        return trials if self.tuned_on else [self.untrained, *trials]

    def test(self, results: Metrics) -> list[Trial]:
        """The best settings on test data."""
        # Ordered by setting, not by seed: trials with one seed at once would all make the same views of the images.
        return [self.at(*setting, seed, "test") for setting in self.settings(results).values() for seed in SEEDS]

    def explored(self, results: Metrics) -> dict[str, list[Trial]]:
        """For each explored setting its trials, one for each seed.

        The plain loss has its best temperature; all others have the best temperature of `UnDiMix()`.
        """
        (plain, at_plain), (_, temperature) = self.chosen(PLAIN, results), self.chosen(UNDIMIX, results)
        settings: dict[str, dict[str, Any]] = {
            PLAIN: {"weighting": plain, "temperature": at_plain},
            "plain": {"weighting": plain},
            **{name: {"weighting": name} for name in self.explored_weightings},
            "UnDiMix(), warmed up over half the training": {"weighting": "UnDiMix()", "warmup": 0.5},
        }
        return {
            name: [self.at(**{"temperature": temperature, "seed": seed, **setting}) for seed in EXPLORATORY_SEEDS]
            for name, setting in settings.items()
        }

    def without_false_negatives(self, results: Metrics) -> dict[str, list[list[Trial]]]:
        """For each method its trials at the best setting: with all negatives, and without the anchor's class."""
        if not (self.explores and self.has_classes):
            return {}
        return {
            method: [
                [self.at(*self.chosen(method, results), seed, class_known=known) for seed in EXPLORATORY_SEEDS]
                for known in (False, True)
            ]
            for method in GRIDS
        }

    def exploratory(self, results: Metrics) -> list[Trial]:
        """Other weightings and settings on validation data, and training without false negatives."""
        if not self.explores:
            return []
        both = [*self.explored(results).values(), *chain(*self.without_false_negatives(results).values())]
        trials = [trial for of_one in both for trial in of_one]
        return sorted(trials, key=lambda trial: trial.seed)

    def over_seeds(self, weighting: str, temperature: float, **changes: Any) -> list[Trial]:
        """The trials of a weighting at a temperature, one for each seed of the stage "flatness"."""
        seeds = FLATNESS_SEEDS if self.explores else (TUNING_SEED,)
        return [self.at(weighting, temperature, seed, **changes) for seed in seeds]

    def over_temperatures(self, weighting: str) -> dict[float, list[Trial]]:
        """The trials of a weighting at each temperature."""
        return {temperature: self.over_seeds(weighting, temperature) for temperature in FLATNESS_TEMPERATURES}

    def over_batch_sizes(self, weighting: str, results: Metrics) -> dict[int, list[Trial]]:
        """The trials of a weighting at each batch size, at the plain loss's best temperature."""
        if not self.batch_sizes:  # then no tuning is needed, either
            return {}
        _, temperature = self.chosen(PLAIN, results)
        return {size: self.over_seeds(weighting, temperature, batch_size=size) for size in self.batch_sizes}

    def flatness(self, results: Metrics) -> list[Trial]:
        """Each method over temperatures and over batch sizes."""
        if self.tuned_on:
            return []
        wanted = [self.over_temperatures(weighting) for weighting in OVER_TEMPERATURES]
        wanted += [self.over_batch_sizes(weighting, results) for weighting in CURVES]
        trials = chain(*chain(*(by_place.values() for by_place in wanted)))
        return sorted(trials, key=lambda trial: trial.seed)
