"""The command line that vision, text and graphs share."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.embeddings.protocol import STAGES, Benchmark
from benchmarks.embeddings.results import RESULTS, file_of, load, metrics_of
from benchmarks.embeddings.sweep import result_of, sweep
from benchmarks.embeddings.trials import SCALES, Train, Trial

OTHERS = Path("results")  # for results that no table shows


def main(description: str, train: Train, benchmarks: list[Benchmark]) -> None:
    """The command line of a modality's benchmarks.

    Args:
        description: The module's docstring. `--help` shows its first line.
        train: Runs a trial.
        benchmarks: The modality's recipes and data sets.
    """
    base = [benchmark.base for benchmark in benchmarks]
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.embeddings.{Path(sys.argv[0]).stem}", description=description.splitlines()[0]
    )
    parser.add_argument("stages", nargs="*", help=f"which stages to run: {', '.join(STAGES)}; default: all")
    parser.add_argument("--recipe", help="run this recipe only: " + ", ".join(sorted({trial.recipe for trial in base})))
    parser.add_argument("--data", help="run this data set only: " + ", ".join(sorted({trial.data for trial in base})))
    parser.add_argument("--data-dir", type=Path, help="folder of local data sets; those that it lacks are downloaded")
    parser.add_argument(
        "--results",
        type=Path,
        help="folder of the results, where a trial with a result is not run again; default: benchmarks/results, "
        f"or ./{OTHERS} with --weighting or a scale other than small",
    )
    parser.add_argument("--jobs", type=int, default=1, help="number of trials to run at once; default: 1")
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="small",
        help="preset: tiny checks that everything runs, small is what the tables report, full trains larger encoders "
        "for longer; default: small",
    )
    parser.add_argument("--weighting", help="run this weighting only, such as 'UnDiMix(hardness=2.0)', print metrics")
    parser.add_argument("--temperature", type=float, help="with --weighting: the temperature; default: the recipe's")
    parser.add_argument("--seed", type=int, help="with --weighting: the seed; default: 0")
    options = parser.parse_args()
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"expected some of {', '.join(STAGES)}, got {', '.join(sorted(unknown))}")
    if options.weighting and options.stages:
        parser.error(f"expected stages or --weighting, got both: {', '.join(options.stages)} and {options.weighting}")
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
    folder, failed = options.results or (RESULTS if reported else OTHERS), list[Trial]()
    if options.weighting:
        trials = [
            benchmark.at(options.weighting, options.temperature or benchmark.base.temperature, options.seed or 0)
            for benchmark in wanted
        ]
        try:
            trials[0].loss_weighting()
        except Exception as error:  # an expression can raise anything
            parser.error(f"--weighting: {str(error).removeprefix('weighting: ')}")
        failed += sweep(train, trials, options.data_dir, folder=folder, jobs=options.jobs)
        for trial in trials:
            if trial not in failed:
                metrics = result_of(train, trial, options.data_dir, folder)["metrics"]
                scores = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
                setting = f"{trial.weighting} at {trial.temperature:g}, seed {trial.seed}"
                print(f"{trial.data}, {trial.recipe}, {setting}: {scores}")
                print(f"  {file_of(trial, folder)}")
    else:
        for stage in options.stages or STAGES:
            results = metrics_of(load(folder))
            trials = [trial for benchmark in wanted for trial in benchmark.trials(stage, results)]
            there = sum(trial in results for trial in trials)
            print(f"{stage}: {len(trials)} trials, {there} of them with a result", flush=True)
            failed += sweep(train, trials, options.data_dir, folder=folder, jobs=options.jobs)
    if failed:
        sys.exit(f"{len(failed)} trials failed")
