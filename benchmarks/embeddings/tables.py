"""Writes the tables and plots of all results: `python -m benchmarks.embeddings.tables` (or `make tables`).

A table replaces what is between `<!-- results: name -->` and `<!-- /results -->` in docs/results.md and README.md, for
each name of `TABLES`. With `<!-- results: name before -->` it is the table of the default before, whose results were
set aside. Plots go to docs/pictures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from scipy.stats import bootstrap, ttest_rel
from statsmodels.formula.api import ols
from statsmodels.stats.multitest import multipletests

from benchmarks.embeddings import graphs, text, toolkits, vision
from benchmarks.embeddings.files import atomic_path, write_atomically
from benchmarks.embeddings.protocol import (
    AT_RAISED,
    CONTENDERS,
    CURVES,
    FLATNESS_TEMPERATURES,
    GRIDS,
    HCL,
    METHODS,
    OVER_TEMPERATURES,
    PLAIN,
    SCHEDULE,
    SEEDS,
    TESTED_FIRST,
    UNDIMIX,
    Benchmark,
)
from benchmarks.embeddings.results import RESULTS, Result, aside_of, load, metrics_of
from benchmarks.embeddings.trials import UNTRAINED, Trial

ROOT = Path(__file__).parent.parent.parent
PAGE, README = ROOT / "docs" / "results.md", ROOT / "README.md"
PICTURES = ROOT / "docs" / "pictures"
BENCHMARKS = [*vision.BENCHMARKS, *text.BENCHMARKS, *graphs.BENCHMARKS]
BASELINES = (PLAIN, HCL)
MODALITIES = ("vision", "text", "graph")
AT_HOST, *OPPONENTS = (*CONTENDERS, *AT_RAISED)  # the plain loss, and what is compared with it
SCORED = ["data, recipe", "score, %", UNTRAINED, *GRIDS, *(f"{UNDIMIX} - {name}" for name in BASELINES)]
# A metric counts if training with the plain loss raises it by more than three standard deviations.
DEVIATIONS = 3
METRICS = {
    "knn": "k-NN accuracy",
    "linear": "linear probe",
    "accuracy": "linear probe",
    "mrr": "MRR",
    "spearman": "STS-B Spearman",
    "STS12-16": "STS12-16 Spearman",
    "svm": "SVM accuracy",
    "nearest": "5-NN accuracy",
}
GEOMETRY = ("alignment", "uniformity")  # no percentages
STATISTICS = {
    "effective_number": "effective negatives, share",
    "false_negatives": "false negatives, share",
    "weight_on_false_negatives": "weight on them",
    "similarity_influence": "r(similarity, influence)",
    "similarity_diversity": "r(similarity, diversity)",
    "influence_diversity": "r(influence, diversity)",
}
COLOURS = dict(zip(CURVES, ("#777777", "#e69f00", "#d55e00", "#0072b2"), strict=True))


@dataclass(frozen=True)
class Results:
    """All results, by trial; and those of the default before, which were set aside."""

    found: dict[Trial, Result]
    earlier: dict[Trial, Result] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path = RESULTS) -> Results:
        return cls(load(folder), load(aside_of(folder)))

    @cached_property
    def before(self) -> Results:
        """All results as they were with the default before."""
        return Results({**self.found, **self.earlier})

    @cached_property
    def metrics(self) -> dict[Trial, dict[str, float]]:
        return metrics_of(self.found)

    def scores(self, trials: Iterable[Trial], metric: str) -> np.ndarray | None:
        """The metric of each trial in percent; None if a trial has none."""
        trials = list(trials)
        if any(metric not in self.metrics.get(trial, {}) for trial in trials):
            return None
        return 100 * np.array([self.metrics[trial][metric] for trial in trials])


@dataclass(frozen=True)
class Measured:
    """A metric of a benchmark on test data, for each seed: of the untrained encoder and of each method.

    Where `TESTED_FIRST` has results, it is among the methods.
    """

    benchmark: Benchmark
    metric: str
    settings: dict[str, tuple[str, float]]
    scores: dict[str, np.ndarray]

    @property
    def counts(self) -> bool:
        return moves(self.scores[PLAIN], self.scores[UNTRAINED])

    def over(self, baseline: str, method: str = UNDIMIX) -> np.ndarray:
        return self.scores[method] - self.scores[baseline]

    def p(self, baseline: str, method: str = UNDIMIX) -> str:
        """The p value of a paired t-test."""
        return of_p(ttest_rel(self.scores[method], self.scores[baseline]).pvalue)


def measured(results: Results, benchmarks: Sequence[Benchmark] = BENCHMARKS) -> list[Measured]:
    """The scores on test data of the benchmarks that have all results."""
    found = []
    for benchmark in benchmarks:
        if not benchmark.is_tuned(results.metrics):
            continue
        settings = benchmark.settings(results.metrics)
        if not benchmark.missing(TESTED_FIRST, results.metrics):
            settings[TESTED_FIRST] = benchmark.chosen(TESTED_FIRST, results.metrics)
        for metric in (benchmark.metric, *benchmark.further):
            scores = {
                name: values
                for name, setting in settings.items()
                if (values := results.scores([benchmark.at(*setting, seed, "test") for seed in SEEDS], metric))
                is not None
            }
            if {UNTRAINED, *GRIDS} <= scores.keys():
                found.append(Measured(benchmark, metric, settings, scores))
    return found


@dataclass(frozen=True)
class AtHost:
    """A metric of a benchmark at the host's own temperature, for each seed: of the untrained encoder and contenders.

    Contenders that lack a result are left out.
    """

    benchmark: Benchmark
    data: str
    metric: str
    scores: dict[str, np.ndarray]

    @property
    def counts(self) -> bool:
        return moves(self.scores[AT_HOST], self.scores[UNTRAINED])

    @property
    def name(self) -> str:
        return f"{self.data}, {self.benchmark.base.recipe}"


def at_host(results: Results, split: str, benchmarks: Sequence[Benchmark] = BENCHMARKS) -> list[AtHost]:
    """The scores at the host's own temperature of the benchmarks with results of the plain and the untrained encoder.

    On validation data, benchmarks that are tuned on the same data sets share their scores. These are means over the
    data sets.
    """
    found: dict[tuple[str, str], AtHost] = {}
    for benchmark in benchmarks:
        contenders = benchmark.at_host(split)
        (first, *_), *_ = contenders.values()
        data = " and ".join(trial.data for trial in first)
        for metric in (benchmark.metric, *benchmark.further, *GEOMETRY):
            by_name = {
                name: [results.scores(of_seed, metric) for of_seed in of_one] for name, of_one in contenders.items()
            }
            scores = {
                name: np.array([values.mean() for values in by_seed])
                for name, by_seed in by_name.items()
                if not any(values is None for values in by_seed)
            }
            one = AtHost(benchmark, data, metric, scores)
            if {UNTRAINED, AT_HOST} <= scores.keys():
                found.setdefault((one.name, metric), one)
    return list(found.values())


def moves(trained: np.ndarray, untrained: np.ndarray) -> bool:
    """Whether training raises a score by more than three standard deviations."""
    return bool((trained - untrained).mean() > DEVIATIONS * max(trained.std(ddof=1), untrained.std(ddof=1)))


def spread(values: np.ndarray) -> str:
    return f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"


def name_of(trial: Trial) -> str:
    return f"{trial.data}, {trial.recipe}"


def of_p(p: float) -> str:
    return "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def difference(scores: np.ndarray, baseline: np.ndarray) -> str:
    """The mean difference from a baseline, with the p value of a paired t-test."""
    return f"{(scores - baseline).mean():+.2f} (p {of_p(ttest_rel(scores, baseline).pvalue)})"


def interval(values: np.ndarray, statistic: Callable[..., Any]) -> tuple[float, float]:
    """The 95 % interval over seeds, bootstrapped (BCa)."""
    limits = bootstrap((values,), statistic, n_resamples=9999, rng=np.random.default_rng(0)).confidence_interval
    return float(limits.low), float(limits.high)


def effect(values: np.ndarray, axis: int = -1) -> Any:
    """The paired effect size: mean difference over its standard deviation."""
    return values.mean(axis=axis) / values.std(axis=axis, ddof=1)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    if not rows:
        return "*Not measured yet.*"
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def compared(one: Measured, method: str = UNDIMIX) -> list[str]:
    """The cells with a method's mean difference from each baseline."""
    return [difference(one.scores[method], one.scores[name]) for name in BASELINES]


def what(one: Measured) -> list[str]:
    """The cells that name a benchmark and its metric."""
    return [
        name_of(one.benchmark.base),
        METRICS.get(one.metric, one.metric) + ("" if one.counts else " (does not count)"),
    ]


def scored(one: Measured) -> list[str]:
    """The cells with each method's scores, and the differences of `UnDiMix()` from the others."""
    return [*what(one), *(spread(one.scores[name]) for name in (UNTRAINED, *GRIDS)), *compared(one)]


def chosen(one: Measured) -> str:
    """The methods' best settings: the temperature, and the weighting if it is not the method's first."""
    cells = []
    for name, first in METHODS.items():
        weighting, temperature = one.settings[name]
        tried = [trials[0].temperature for trials in one.benchmark.grid(name)]
        end = " (end)" if temperature in (min(tried), max(tried)) else ""
        cells.append(f"{temperature:g}{end}" if weighting == first else f"`{weighting}` at {temperature:g}{end}")
    return "; ".join(cells)


def contender(name: str) -> str:
    """A contender as the head of a column."""
    return re.sub(r"^(.*\))", r"`\1`", name)


def host_scores(results: Results, split: str) -> str:
    """Scores at the host's own temperature, and each contender's mean difference from the plain loss."""
    rows = []
    for one in at_host(results, split):
        if one.metric in GEOMETRY:
            continue
        plain = one.scores[AT_HOST]
        cells = [
            f"{spread(scores)}, {difference(scores, plain)}" if (scores := one.scores.get(name)) is not None else ""
            for name in OPPONENTS
        ]
        score = METRICS[one.metric] + ("" if one.counts else " (does not count)")
        told = [one.name, f"{one.benchmark.host_temperature:g}", score]
        rows.append([*told, spread(one.scores[UNTRAINED]), spread(plain), *cells])
    return markdown(["data, recipe", "t", "score, %", UNTRAINED, AT_HOST, *map(contender, OPPONENTS)], rows)


def host_validation(results: Results) -> str:
    return host_scores(results, "validation")


def host_test(results: Results) -> str:
    return host_scores(results, "test")


def in_short(results: Results) -> str:
    """For each benchmark that counts: the plain loss and `UnDiMix()` at the host's own temperature, on test data."""
    rows = []
    for one in at_host(results, "test"):
        if one.metric == one.benchmark.metric and one.counts and UNDIMIX in one.scores:
            plain, weighted = one.scores[AT_HOST], one.scores[UNDIMIX]
            scores = [f"{plain.mean():.2f}", f"{weighted.mean():.2f}", difference(weighted, plain)]
            rows.append([one.name, f"{one.benchmark.host_temperature:g}", METRICS[one.metric], *scores])
    return markdown(["data, recipe", "t", "score, %", AT_HOST, contender(UNDIMIX), "difference"], rows)


def host_geometry(results: Results) -> str:
    """Alignment and uniformity on test data at the host's own temperature, as means over seeds."""
    names = (UNTRAINED, AT_HOST, *OPPONENTS)
    rows: dict[str, list[list[str]]] = {}
    for one in at_host(results, "test"):
        if one.metric in GEOMETRY:
            means = [f"{one.scores[name].mean() / 100:.3f}" if name in one.scores else "" for name in names]
            rows.setdefault(one.name, []).append(means)
    cells = (
        [name, *(" / ".join(both) if all(both) else "" for both in zip(*parts, strict=True))]
        for name, parts in rows.items()
    )
    return markdown(["data, recipe", *map(contender, names)], cells)


def verdict(results: Results) -> str:
    """Scores on test data, of the metrics that count."""
    return markdown(SCORED, (scored(one) for one in measured(results) if one.counts))


def confirmatory(results: Results) -> str:
    """Scores on test data of all metrics, with the settings."""
    return markdown([*SCORED, "temperatures"], ([*scored(one), chosen(one)] for one in measured(results)))


def tested_first(results: Results) -> str:
    """Scores on test data of `TESTED_FIRST`, the default at the first evaluation on test data."""
    rows = [
        [
            *what(one),
            spread(one.scores[UNTRAINED]),
            spread(one.scores[TESTED_FIRST]),
            *compared(one, TESTED_FIRST),
            f"{one.settings[TESTED_FIRST][1]:g}",
        ]
        for one in measured(results)
        if TESTED_FIRST in one.scores
    ]
    differences = (f"it - {name}" for name in BASELINES)
    head = ["data, recipe", "score, %", UNTRAINED, "tested first", *differences, "temperature"]
    return markdown(head, rows)


def published(results: Results) -> str:
    """Graph classification with the evaluation of the literature, beside the numbers that GraphCL's authors report."""
    rows = [
        [one.benchmark.base.data, *(spread(one.scores[name]) for name in (UNTRAINED, *GRIDS)), figure]
        for one in measured(results)
        if one.metric == "svm" and (figure := graphs.PUBLISHED.get(one.benchmark.base.data))
    ]
    return markdown(["data", UNTRAINED, *GRIDS, "GraphCL, published"], rows)


def models(results: Results) -> pd.DataFrame:
    """A row for each modality and baseline: the mean difference over benchmarks, its p value, and Holm's correction.

    The model is difference ~ 1 + benchmark, with benchmark effects that sum to 0. The intercept is tested. The
    difference is of the metric that chooses settings, in the benchmarks where it counts.
    """
    counting = [one for one in measured(results) if one.metric == one.benchmark.metric and one.counts]
    return modelled(
        {
            (modality, baseline): {
                name_of(one.benchmark.base): one.over(baseline)
                for one in counting
                if one.benchmark.base.modality == modality
            }
            for modality in MODALITIES
            for baseline in BASELINES
        }
    )


def host_models(results: Results, split: str) -> pd.DataFrame:
    """The same at the host's own temperature: `UnDiMix()` against each other contender."""
    counting = [one for one in at_host(results, split) if one.metric == one.benchmark.metric and one.counts]
    return modelled(
        {
            (modality, baseline): {
                f"{one.name}, {one.metric}": one.scores[UNDIMIX] - one.scores[baseline]
                for one in counting
                if one.benchmark.base.modality == modality and {baseline, UNDIMIX} <= one.scores.keys()
            }
            for modality in MODALITIES
            for baseline in CONTENDERS
            if baseline != UNDIMIX
        }
    )


def modelled(differences: dict[tuple[str, str], dict[str, np.ndarray]]) -> pd.DataFrame:
    """The model of each modality and baseline, from its benchmarks' differences by seed; see `models`."""
    rows = []
    for (modality, baseline), by_benchmark in differences.items():
        if not by_benchmark:
            continue
        parts = [pd.DataFrame({"difference": over, "benchmark": name}) for name, over in by_benchmark.items()]
        table = pd.concat(parts)
        fit = ols("difference ~ 1" + (" + C(benchmark, Sum)" if len(parts) > 1 else ""), data=table).fit()
        low, high = fit.conf_int().loc["Intercept"]
        size = fit.params["Intercept"] / np.sqrt(fit.scale)
        rows.append(
            [modality, baseline, len(parts), fit.params["Intercept"], low, high, size, fit.pvalues["Intercept"]]
        )
    columns = ["modality", "baseline", "benchmarks", "difference", "low", "high", "effect", "p"]
    table = pd.DataFrame(rows, columns=columns)
    # Holm's correction is over all comparisons. One without results has p = 1.
    p = [*table["p"], *[1.0] * (len(differences) - len(table))]
    table["holm"] = multipletests(p, method="holm")[1][: len(table)]
    return table


def claims(results: Results) -> str:
    return claimed(models(results), "six")


def host_claims(results: Results) -> str:
    return claimed(host_models(results, "test"), "twelve")


def host_claims_validation(results: Results) -> str:
    return claimed(host_models(results, "validation"), "twelve")


def claimed(table: pd.DataFrame, comparisons: str) -> str:
    rows = [
        [
            f"{row.modality} ({row.benchmarks})",
            row.baseline,
            f"{row.difference:+.2f} [{row.low:+.2f}, {row.high:+.2f}]",
            f"{row.effect:+.2f}",
            of_p(row.p),
            of_p(row.holm),
        ]
        for _, row in table.iterrows()
    ]
    head = [
        "modality (benchmarks)",
        "UnDiMix() against",
        "difference, points [95 %]",
        "effect size",
        "p",
        f"p, Holm of {comparisons}",
    ]
    return markdown(head, rows)


def effects(results: Results) -> str:
    rows = []
    for one in measured(results):
        for baseline in BASELINES:
            difference = one.over(baseline)
            low, high = interval(difference, np.mean)
            small, large = interval(difference, effect)
            rows.append(
                [
                    *what(one),
                    baseline,
                    f"{difference.mean():+.2f} [{low:+.2f}, {high:+.2f}]",
                    f"{effect(difference):+.2f} [{small:+.2f}, {large:+.2f}]",
                    one.p(baseline),
                ]
            )
    head = ["data, recipe", "score", "UnDiMix() against", "difference, points [95 %]", "effect size [95 %]", "p"]
    return markdown(head, rows)


def explored(results: Results, benchmark: Benchmark) -> dict[str, dict[int, float]]:
    """For each explored setting its scores on validation data, by seed."""
    try:
        trials = benchmark.explored(results.metrics) if benchmark.explores else {}
    except ValueError:
        return {}
    found = {
        name: {
            trial.seed: 100 * results.metrics[trial][benchmark.metric] for trial in of_one if trial in results.metrics
        }
        for name, of_one in {UNTRAINED: [benchmark.untrained], **trials}.items()
    }
    return {name: scores for name, scores in found.items() if scores}


def exploratory(results: Results) -> str:
    """All explored settings: the difference from the plain loss with its temperature tuned, for each benchmark."""
    by_benchmark = {name_of(benchmark.base): explored(results, benchmark) for benchmark in BENCHMARKS}
    by_benchmark = {name: scores for name, scores in by_benchmark.items() if len(scores) > 1 and PLAIN in scores}
    rows = []
    for tried in dict.fromkeys(name for scores in by_benchmark.values() for name in scores if name != PLAIN):
        cells, differences = [], []
        for scores in by_benchmark.values():
            seeds = scores[PLAIN].keys() & scores.get(tried, {}).keys()
            if not seeds:
                cells.append("")
                continue
            differences.append(np.mean([scores[tried][seed] - scores[PLAIN][seed] for seed in seeds]))
            cells.append(f"{differences[-1]:+.2f} ({len(seeds)})")
        everywhere = len(differences) == len(by_benchmark)
        worst, mean = (f"{of(differences):+.2f}" if everywhere else "" for of in (min, np.mean))
        name = tried if tried in ("plain", UNTRAINED) else f"`{tried}`"
        if differences:
            rows.append((tried != UNTRAINED, -np.mean(differences), [name, *cells, worst, mean]))
    if not rows:
        return markdown([], [])
    plain = [f"{np.mean([*scores[PLAIN].values()]):.2f}" for scores in by_benchmark.values()]
    head = ["tried", *by_benchmark, "worst", "mean"]
    return markdown(head, [[f"{PLAIN}: its score", *plain, "", ""], *(cells for *_, cells in sorted(rows))])


def by_seed(results: Results, benchmark: Benchmark, by_place: dict[Any, list[Trial]]) -> list[np.ndarray]:
    """Scores on validation data at each place (temperature or batch size), of each seed that has all of them."""
    seeds = zip(*by_place.values(), strict=True)
    return [found for trials in seeds if (found := results.scores(trials, benchmark.metric)) is not None]


def curve(results: Results, benchmark: Benchmark, by_place: dict[Any, list[Trial]]) -> list[tuple[Any, float]]:
    """Each place with its mean score over these seeds; empty if there are none."""
    scores = by_seed(results, benchmark, by_place)
    return list(zip(by_place, map(float, np.mean(scores, axis=0)), strict=True)) if scores else []


def untrained(results: Results, benchmark: Benchmark) -> str:
    """The score of the untrained encoder on validation data, if it was evaluated."""
    scores = results.scores([benchmark.untrained], benchmark.metric)
    return "" if scores is None else f"{scores.mean():.2f}"


def flatness(results: Results) -> str:
    """The mean score over temperatures, with the lowest and the highest in brackets.

    A temperature schedule has one score: it goes over the temperatures itself.
    """
    rows, columns = [], (*OVER_TEMPERATURES, TESTED_FIRST, SCHEDULE)
    for benchmark in BENCHMARKS:
        scores = [by_seed(results, benchmark, benchmark.over_temperatures(each)) for each in columns[:-1]]
        curves = [np.mean(of_one, axis=0) if of_one else np.array([]) for of_one in scores]
        cells = [f"{of.mean():.2f} ({of.min():.2f} to {of.max():.2f})" if of.size else "" for of in curves]
        if any(cells):
            seeds = "/".join(map(str, sorted({len(of_one) for of_one in scores if of_one})))
            cells.append(scheduled(results, benchmark))
            rows.append([name_of(benchmark.base), seeds, untrained(results, benchmark), *cells])
    shown = [place for place, name in enumerate(columns, 3) if name in CURVES or any(row[place] for row in rows)]
    head = ["data, recipe", "seeds", UNTRAINED, *map(contender, columns)]
    kept = [0, 1, 2, *shown]
    return markdown([head[place] for place in kept], ([row[place] for place in kept] for row in rows))


def scheduled(results: Results, benchmark: Benchmark) -> str:
    """The score of the temperature schedule, with the seeds of the curves over temperatures."""
    seeds = {trial.seed for trial in benchmark.over_seeds("Uniform()", 0.5)}
    trials = [of_seed[0] for of_seed in benchmark.at_host("validation")[SCHEDULE] if of_seed[0].seed in seeds]
    scores = results.scores(trials, benchmark.metric)
    return "" if scores is None else f"{scores.mean():.2f}"


def batch_sizes(results: Results) -> str:
    """The methods at each batch size, at the plain loss's best temperature."""
    shown = [b for b in BENCHMARKS if b.batch_sizes and b.is_tuned(results.metrics)]
    sizes = sorted({size for benchmark in shown for size in benchmark.batch_sizes})
    rows = []
    for benchmark in shown:
        (_, temperature), began = benchmark.chosen(PLAIN, results.metrics), untrained(results, benchmark)
        for weighting in CURVES:
            scores = dict(curve(results, benchmark, benchmark.over_batch_sizes(weighting, results.metrics)))
            if not scores:
                continue
            cells = [f"{scores[size]:.2f}" if size in scores else "" for size in sizes]
            average = f"{np.mean([*scores.values()]):.2f}"
            rows.append([name_of(benchmark.base), f"`{weighting}`", f"{temperature:g}", began, *cells, average])
    return markdown(["data, recipe", "weighting", "t", UNTRAINED, *map(str, sizes), "mean"], rows)


def diagnosis(results: Results) -> str:
    """Statistics of the negatives in the first and the last quarter of training, at each method's best setting."""
    tuned = [benchmark for benchmark in BENCHMARKS if benchmark.is_tuned(results.metrics)]
    trials = [benchmark.best(method, results.metrics)[0] for benchmark in tuned for method in GRIDS]
    rows = []
    for trial in dict.fromkeys(trials):  # benchmarks of graph embeddings share trials
        statistics = results.found[trial]["statistics"]
        both = [
            {**of_part, "effective_number": of_part["effective_number"] / of_part["count"]}
            for of_part in (statistics["first_quarter"], statistics["last_quarter"])
        ]
        cells = [" → ".join(f"{part[name]:.3f}" for part in both) if name in both[0] else "-" for name in STATISTICS]
        rows.append([name_of(trial), f"`{trial.weighting}`", f"{trial.temperature:g}", *cells])
    return markdown(["data, recipe", "weighting", "t", *STATISTICS.values()], rows)


def without_false_negatives(results: Results) -> str:
    """The methods' scores on validation data, with all negatives and without false negatives."""
    rows = []
    for benchmark in BENCHMARKS:
        if not benchmark.is_tuned(results.metrics):
            continue
        for pair in benchmark.without_false_negatives(results.metrics).values():
            there = [(one, other) for one, other in zip(*pair, strict=True) if {one, other} <= results.found.keys()]
            if not there:
                continue
            one, other = (results.scores(trials, benchmark.metric) for trials in zip(*there, strict=True))
            trial, scores = pair[0][0], [f"{one.mean():.2f}", f"{other.mean():.2f}", f"{(other - one).mean():+.2f}"]
            rows.append([name_of(trial), f"`{trial.weighting}`", f"{trial.temperature:g}", *scores, str(len(there))])
    return markdown(["data, recipe", "weighting", "t", "as it is", "none of the class", "difference", "seeds"], rows)


def further_toolkits(results: Results) -> str:
    """Held-out scores of the examples of four more toolkits, and the difference that UnDiMix makes."""
    rows = []
    for toolkit, one in toolkits.BY_TOOLKIT.items():
        scores = {name: results.scores(one.trials(name), "score") for name in toolkits.CONTENDERS}
        if any(values is None for values in scores.values()):
            continue
        began, plain, weighted = scores.values()
        score = one.metric + ("" if moves(plain, began) else " (does not count)")
        told = [f"{toolkit}, {one.base.recipe}", f"{one.base.temperature:g}", score]
        rows.append([*told, *map(spread, (began, plain, weighted)), difference(weighted, plain)])
    head = ["toolkit, recipe", "t", "score, %", UNTRAINED, "plain", contender(UNDIMIX), "difference"]
    return markdown(head, rows)


def took(results: Results) -> str:
    """The number of trainings, and their time with the evaluation."""
    table = pd.DataFrame(
        [
            [trial.modality, name_of(trial), trial.split, result["seconds"] / 3600]
            for trial, result in results.found.items()
            if trial.scale == "small"
        ],
        columns=["modality", "data", "split", "hours"],
    )
    groups = table.groupby(["modality", "data", "split"])["hours"].agg(["size", "sum"]).reset_index()
    rows = [[*row[:3], str(row[3]), f"{row[4]:.1f}"] for row in groups.itertuples(index=False, name=None)]
    return markdown(["modality", "data, recipe", "split", "trainings", "hours"], rows)


def differences(results: Results) -> str:
    """The plot of the differences, if it exists."""
    return (
        "![Differences on test data](pictures/differences.svg)" if any(one.counts for one in measured(results)) else ""
    )


TABLES: dict[str, Callable[[Results], str]] = {
    "in_short": in_short,
    "host_test": host_test,
    "host_claims": host_claims,
    "host_geometry": host_geometry,
    "host_validation": host_validation,
    "host_claims_validation": host_claims_validation,
    "verdict": verdict,
    "confirmatory": confirmatory,
    "tested_first": tested_first,
    "published": published,
    "claims": claims,
    "effects": effects,
    "differences": differences,
    "exploratory": exploratory,
    "flatness": flatness,
    "batch_sizes": batch_sizes,
    "diagnosis": diagnosis,
    "without_false_negatives": without_false_negatives,
    "further_toolkits": further_toolkits,
    "took": took,
}


def filled(page: str, results: Results) -> str:
    """The page with its tables made from the results."""

    def table(mark: re.Match[str]) -> str:
        shown = results.before if mark[2] else results
        return f"<!-- results: {mark[1]}{mark[2]} -->\n{TABLES[mark[1]](shown)}\n<!-- /results -->"

    return re.sub(r"<!-- results: (\w+)( before|) -->\n.*?<!-- /results -->", table, page, flags=re.DOTALL)


def plot_flatness(results: Results) -> plt.Figure | None:
    shown = [b for b in BENCHMARKS if all(curve(results, b, b.over_temperatures(weighting)) for weighting in CURVES)]
    if not shown:
        return None
    rows = (len(shown) + 1) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(7, 2.4 * rows), layout="constrained", squeeze=False)
    for axis, benchmark in zip(axes.flat, shown, strict=False):
        for weighting in CURVES:
            temperatures, scores = zip(*curve(results, benchmark, benchmark.over_temperatures(weighting)), strict=True)
            label = f"{weighting}, plain" if weighting == METHODS[PLAIN] else weighting
            axis.plot(temperatures, scores, marker="o", ms=3, color=COLOURS[weighting], label=label)
        axis.set_xscale("log")
        axis.set_xticks(FLATNESS_TEMPERATURES, [f"{temperature:g}" for temperature in FLATNESS_TEMPERATURES])
        axis.minorticks_off()
        axis.set_title(f"{name_of(benchmark.base)}: {METRICS[benchmark.metric]}, %")
        axis.set_xlabel("temperature")
    for axis in list(axes.flat)[len(shown) :]:
        axis.axis("off")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def plot_differences(results: Results) -> plt.Figure | None:
    shown = [one for one in measured(results) if one.counts]
    if not shown:
        return None
    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.42 * len(shown)), layout="constrained")
    for place, one in enumerate(shown):
        for shift, baseline, colour in zip((-0.14, 0.14), BASELINES, ("#777777", "#9467bd"), strict=True):
            difference = one.over(baseline)
            low, high = interval(difference, np.mean)
            label = f"UnDiMix() - {baseline}" if place == 0 else None
            axis.plot([low, high], [place + shift] * 2, color=colour, lw=2)
            axis.plot(difference.mean(), place + shift, "o", ms=3.5, color=colour, label=label)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(range(len(shown)), [": ".join(what(one)) for one in shown])
    axis.invert_yaxis()
    axis.set_xlabel("difference on test data, points, with 95 % interval over seeds")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def save(figure: plt.Figure | None, name: str) -> None:
    if figure is not None:
        with atomic_path(PICTURES / f"{name}.svg") as part:
            figure.savefig(part, format="svg", metadata={"Date": None}, facecolor="white")
        plt.close(figure)


def main() -> None:
    results = Results.read()
    for page in (PAGE, README):
        write_atomically(page, filled(page.read_text(encoding="utf-8"), results))
    mpl.use("agg")
    with mpl.rc_context({"font.size": 9, "axes.titlesize": 9, "svg.hashsalt": "undimix", "svg.fonttype": "path"}):
        save(plot_flatness(results), "flatness")
        save(plot_differences(results), "differences")


if __name__ == "__main__":
    main()
