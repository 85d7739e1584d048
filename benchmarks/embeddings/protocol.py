"""Which runs answer which question: tuning and test of the main contenders, the other weightings, flat curves."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.embeddings.results import RESULTS, SCALES, UNTRAINED, Run, Train, load, metrics_of, result_of, sweep

PLAIN, HCL, UNDIMIX = "plain, tuned", "HCL, tuned", "UnDiMix()"
HCLS = ("HCL(beta=1.0, tau_plus=0.1)", "HCL(beta=0.5, tau_plus=0.0)")  # the first is the paper's
CONTENDERS = {PLAIN: "Uniform()", HCL: HCLS[0], UNDIMIX: "UnDiMix()"}
TEMPERATURES = (0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
FLAT = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
# Twelve trials each.
TRIALS = {
    PLAIN: [("Uniform()", temperature) for temperature in TEMPERATURES],
    HCL: [(hcl, temperature) for hcl in HCLS for temperature in FLAT],
    UNDIMIX: [("UnDiMix()", temperature) for temperature in TEMPERATURES],
}
# What was the default when test data were first looked at: its trials and its test are results, and not made anew.
TESTED_FIRST = "UnDiMix(0.5, 0.5, 0.5, detached=True)"
CURVES = ("Uniform()", *HCLS, "UnDiMix()")
OVER_TEMPERATURES = (*CURVES, TESTED_FIRST)
SEEDS = range(12)
TUNING_SEED = 100
FLATNESS_SEEDS = (100, 101)
EXPLORING_SEEDS = (100, 101, 102)
TIERS = ("tuning", "test", "exploratory", "flatness")
OTHERS = Path("results")  # that no table is made from

EXPLORED = (
    "UnDiMix()",
    TESTED_FIRST,
    "UnDiMix(detached=True)",
    # The components alone, in pairs, and turned round.
    "UnDiMix(influence=0, diversity=0)",
    "UnDiMix(similarity=0, diversity=0)",
    "UnDiMix(similarity=0, influence=0)",
    "UnDiMix(diversity=0)",
    "UnDiMix(influence=0)",
    "UnDiMix(similarity=0)",
    "UnDiMix(similarity=-0.5, influence=0, diversity=0)",
    "UnDiMix(similarity=0, influence=-0.25, diversity=0)",
    "UnDiMix(similarity=0, influence=0, diversity=-0.25)",
    "UnDiMix(diversity=-0.25)",
    # Other strengths and hardness.
    "UnDiMix(0.25, 0.25, 0.25)",
    "UnDiMix(0.4, 0.2, 0.2)",
    "UnDiMix(0.5, 0.25, 0.1)",
    "UnDiMix(0.5, 0.5, 0.5)",
    "UnDiMix(hardness=0.5)",
    "UnDiMix(hardness=2.0)",
    "UnDiMix(diversity=0, hardness=2.0)",
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


Metrics = dict[Run, dict[str, float]]


@dataclass(frozen=True)
class Benchmark:
    """A recipe on a data set, and the metric that settings are chosen by.

    Attributes:
        base: The run that the others are variants of.
        metric: The name of the metric that decides.
        further: The names of those that are reported beside it.
        batch_sizes: Those of the flatness; none where there are no batches.
        others: The weightings that are explored.
        explores: Whether they are, and more seeds for flat curves and other batch sizes are tried as well.
        chosen_on: The data sets that choose settings, where it is not this one's own validation data.
        has_classes: Whether the training data have classes, so that false negatives can be told.
        lowered: What the temperatures of the trials are divided by.
    """

    base: Run
    metric: str
    further: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    others: tuple[str, ...] = EXPLORED
    explores: bool = True
    chosen_on: tuple[str, ...] = ()
    has_classes: bool = True
    lowered: float = 1.0

    def at(self, weighting: str, temperature: float, seed: int, split: str = "validation", **changes: Any) -> Run:
        return replace(self.base, weighting=weighting, temperature=temperature, seed=seed, split=split, **changes)

    @property
    def untrained(self) -> Run:
        """The encoder as it begins, on validation data."""
        return self.at(UNTRAINED, 0.0, TUNING_SEED)

    def trials(self, contender: str) -> list[list[Run]]:
        """The runs of each of its settings; of `TESTED_FIRST`, too."""
        data_sets = self.chosen_on or (self.base.data,)
        first = [(TESTED_FIRST, temperature) for temperature in TEMPERATURES]
        settings = first if contender == TESTED_FIRST else TRIALS[contender]
        return [
            [replace(self.at(weighting, round(t / self.lowered, 6), TUNING_SEED), data=data) for data in data_sets]
            for weighting, t in settings
        ]

    def missing(self, contender: str, results: Metrics) -> list[Run]:
        """Its trials that are not there yet."""
        return [run for trial in self.trials(contender) for run in trial if run not in results]

    def is_tuned(self, results: Metrics) -> bool:
        """Whether all trials are there."""
        return not any(self.missing(contender, results) for contender in TRIALS)

    def best(self, contender: str, results: Metrics) -> list[Run]:
        """The trial that is best on validation data; a ValueError where some are missing."""
        if missing := self.missing(contender, results):
            raise ValueError(
                f"{contender} on {self.base.data}: {len(missing)} trials are missing; run the tier 'tuning'"
            )
        return max(self.trials(contender), key=lambda trial: mean(results[run][self.metric] for run in trial))

    def chosen(self, contender: str, results: Metrics) -> tuple[str, float]:
        """The best trial's setting."""
        best, *_ = self.best(contender, results)
        return best.weighting, best.temperature

    def settings(self, results: Metrics) -> dict[str, tuple[str, float]]:
        """What is compared: the untrained encoder, and each contender as it was chosen."""
        return {UNTRAINED: (UNTRAINED, 0.0)} | {contender: self.chosen(contender, results) for contender in TRIALS}

    def tuning(self, results: Metrics) -> list[Run]:
        """Twelve settings of each contender on validation data, with one seed."""
        runs = [run for contender in TRIALS for trial in self.trials(contender) for run in trial]
        return runs if self.chosen_on else [self.untrained, *runs]

    def test(self, results: Metrics) -> list[Run]:
        """What was chosen, on test data."""
        # Not seed by seed: trainings at once would make the same views of the same images.
        return [self.at(*setting, seed, "test") for setting in self.settings(results).values() for seed in SEEDS]

    def explored(self, results: Metrics) -> dict[str, list[Run]]:
        """By what is tried its runs, a seed each: the plain loss at its best temperature, all else at UnDiMix's."""
        (plain, at_plain), (_, temperature) = self.chosen(PLAIN, results), self.chosen(UNDIMIX, results)
        settings: dict[str, dict[str, Any]] = {
            PLAIN: {"weighting": plain, "temperature": at_plain},
            "plain": {"weighting": plain},
            **{name: {"weighting": name} for name in self.others},
            "UnDiMix(), warmed up over half the training": {"weighting": "UnDiMix()", "warmup": 0.5},
        }
        return {
            name: [self.at(**{"temperature": temperature, "seed": seed, **setting}) for seed in EXPLORING_SEEDS]
            for name, setting in settings.items()
        }

    def without_false_negatives(self, results: Metrics) -> dict[str, list[list[Run]]]:
        """By contender the runs of its chosen setting, as they are and with no negative of the anchor's class."""
        if not (self.explores and self.has_classes):
            return {}
        return {
            contender: [
                [self.at(*self.chosen(contender, results), seed, class_known=known) for seed in EXPLORING_SEEDS]
                for known in (False, True)
            ]
            for contender in TRIALS
        }

    def exploratory(self, results: Metrics) -> list[Run]:
        """All that could be better, on validation data, and what false negatives cost."""
        if not self.explores:
            return []
        both = [*self.explored(results).values(), *chain(*self.without_false_negatives(results).values())]
        runs = [run for of_one in both for run in of_one]
        return sorted(runs, key=lambda run: run.seed)

    def flat(self, weighting: str, temperature: float, **changes: Any) -> list[Run]:
        """A weighting's runs at a temperature, a seed each."""
        seeds = FLATNESS_SEEDS if self.explores else (TUNING_SEED,)
        return [self.at(weighting, temperature, seed, **changes) for seed in seeds]

    def over_temperatures(self, weighting: str) -> dict[float, list[Run]]:
        """By temperature a weighting's runs."""
        return {temperature: self.flat(weighting, temperature) for temperature in FLAT}

    def over_batch_sizes(self, weighting: str, results: Metrics) -> dict[int, list[Run]]:
        """By batch size a weighting's runs at the plain loss's best temperature."""
        if not self.batch_sizes:  # nor is a temperature needed, which trials would have to choose
            return {}
        _, temperature = self.chosen(PLAIN, results)
        return {size: self.flat(weighting, temperature, batch_size=size) for size in self.batch_sizes}

    def flatness(self, results: Metrics) -> list[Run]:
        """The contenders over temperatures and over batch sizes."""
        if self.chosen_on:
            return []
        weightings = OVER_TEMPERATURES if self.explores else CURVES
        asked = [self.over_temperatures(weighting) for weighting in weightings]
        asked += [self.over_batch_sizes(weighting, results) for weighting in CURVES]
        runs = chain(*chain(*(by_place.values() for by_place in asked)))
        return sorted(runs, key=lambda run: run.seed)


def main(description: str, train: Train, benchmarks: list[Benchmark]) -> None:
    """The command line of a benchmark.

    Args:
        description: Whose first line `--help` shows.
        train: Makes a run's metrics, and what else its result is to hold.
        benchmarks: Each recipe and data set of the modality.
    """
    base = [benchmark.base for benchmark in benchmarks]
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.embeddings.{Path(sys.argv[0]).stem}", description=description.splitlines()[0]
    )
    parser.add_argument("tiers", nargs="*", help=f"{', '.join(TIERS)}; all of them if none is named")
    parser.add_argument("--recipe", help="only this one: " + ", ".join(sorted({run.recipe for run in base})))
    parser.add_argument("--data", help="only this one: " + ", ".join(sorted({run.data for run in base})))
    parser.add_argument("--data-dir", type=Path, help="where data sets are; they are downloaded where it lacks them")
    parser.add_argument(
        "--results",
        type=Path,
        help=f"where results are and go; else benchmarks/results, for --weighting and other scales ./{OTHERS}",
    )
    parser.add_argument("--jobs", type=int, default=1, help="how many trainings at once; else 1")
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="small",
        help="full: longer, larger encoders; tiny: to see it work; by default small",
    )
    parser.add_argument("--weighting", help="train this alone, such as 'UnDiMix(hardness=2.0)', and print its metrics")
    parser.add_argument("--temperature", type=float, help="with --weighting; else the recipe's")
    parser.add_argument("--seed", type=int, help="with --weighting; else 0")
    options = parser.parse_args()
    if unknown := set(options.tiers) - set(TIERS):
        parser.error(f"expected some of {', '.join(TIERS)}, got {', '.join(sorted(unknown))}")
    if options.weighting and options.tiers:
        parser.error(f"expected tiers or --weighting, got both: {', '.join(options.tiers)} and {options.weighting}")
    if not options.weighting and (options.temperature, options.seed) != (None, None):
        parser.error("--temperature, --seed: expected --weighting beside them, got none")
    if options.temperature is not None and not 0 < options.temperature < math.inf:
        parser.error(f"--temperature: expected a number above 0, got {options.temperature:g}")
    if options.data_dir is not None and not options.data_dir.is_dir():
        parser.error(f"--data-dir: expected a folder, got {options.data_dir}")

    wanted = [
        replace(benchmark, base=replace(benchmark.base, scale=options.scale))
        for benchmark in benchmarks
        if options.recipe in (None, benchmark.base.recipe) and options.data in (None, benchmark.base.data)
    ]
    if not wanted:
        parser.error(f"expected a recipe and data set that go together, got {options.recipe} and {options.data}")
    reported = not options.weighting and options.scale == "small"
    folder, failed = options.results or (RESULTS if reported else OTHERS), list[Run]()
    if options.weighting:
        runs = [
            benchmark.at(options.weighting, options.temperature or benchmark.base.temperature, options.seed or 0)
            for benchmark in wanted
        ]
        try:
            runs[0].loss_weighting()
        except Exception as error:  # an expression can raise anything
            parser.error(f"--weighting: {str(error).removeprefix('weighting: ')}")
        failed += sweep(train, runs, options.data_dir, folder=folder, jobs=options.jobs)
        for run in runs:
            if run not in failed:
                metrics = result_of(train, run, options.data_dir, folder)["metrics"]
                scores = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
                print(f"{run.data}, {run.recipe}, {run.weighting} at {run.temperature:g}, seed {run.seed}: {scores}")
                print(f"  {run.path(folder)}")
    else:
        for tier in options.tiers or TIERS:
            results = metrics_of(load(folder))
            runs = [run for benchmark in wanted for run in getattr(benchmark, tier)(results)]
            there = sum(run.path(folder).exists() for run in runs)
            print(f"{tier}: {len(runs)} runs, {there} of them there already", flush=True)
            failed += sweep(train, runs, options.data_dir, folder=folder, jobs=options.jobs)
    if failed:
        sys.exit(f"{len(failed)} runs failed")
