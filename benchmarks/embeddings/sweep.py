"""Runs the trials that have no result yet, several at once; a sweep that was stopped goes on where it was."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from benchmarks.embeddings.results import RESULTS, Result, append, checked, file_of, is_outdated, read, rounded
from benchmarks.embeddings.trials import Train, Trial

# glibc gives memory of large tensors back to the system, and takes it again in the next step, page by page. Static
# embeddings, whose gradient is as large as the table, spend much of their time on that.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}
PACKAGES = ("torch", "lightly", "sentence-transformers", "transformers", "torch-geometric", "scikit-learn")


def result_of(train: Train, trial: Trial, data_dir: Path | None, folder: Path = RESULTS) -> Result:
    """The trial's result: read from the folder, or made and added to it."""
    there = read(file_of(trial, folder))
    if trial in there:
        return there[trial]
    start = time.perf_counter()
    made = checked(rounded(train(trial, data_dir)))
    result = {
        "modality": trial.modality,
        "configuration": asdict(trial),
        "weighting": trial.settings(),
        "seed": trial.seed,
        "local_copies": data_dir is not None,
        **made,
        "seconds": round(time.perf_counter() - start, 2),
        "versions": {name: version(name) for name in ("undimix-plugins", *PACKAGES)},
    }
    return append(trial, result, folder)


def missing(trials: Iterable[Trial], folder: Path = RESULTS) -> list[Trial]:
    """The trials without a result in the folder, each once.

    Raises:
        ValueError: If a file has a line that is no result, or if a result was made with other defaults than today's.
    """
    trials = list(dict.fromkeys(trials))
    there = {path: read(path) for path in dict.fromkeys(file_of(trial, folder) for trial in trials)}
    for trial in trials:
        path = file_of(trial, folder)
        if trial in there[path] and is_outdated(trial, there[path][trial]):
            raise ValueError(
                f"{path}: expected a result of today's {trial.settings()}, got one of "
                f"{there[path][trial]['weighting']}; set such results aside: "
                f"python -m benchmarks.embeddings.results {folder}"
            )
    return [trial for trial in trials if trial not in there[file_of(trial, folder)]]


def sweep(
    train: Train, trials: Iterable[Trial], data_dir: Path | None = None, *, folder: Path = RESULTS, jobs: int = 1
) -> list[Trial]:
    """Runs the trials that have no result yet, each in a process of its own, `jobs` of them at once.

    Returns:
        The trials that failed. Their errors are printed.

    Raises:
        ValueError: If a file of results has a line that is no result.
    """
    todo = missing(trials, folder)
    if not todo:
        return []
    # For the processes: each gets its share of the cores, and a waiting thread must not occupy another's core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    for name, value in MALLOC.items():
        os.environ.setdefault(name, value)
    failed = []
    with (
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
        tqdm(total=len(todo), unit="trial", smoothing=0) as bar,
    ):
        futures = {pool.submit(result_of, train, trial, data_dir, folder): trial for trial in todo}
        try:
            for future in as_completed(futures):
                if error := future.exception():
                    failed.append(futures[future])
                    bar.write("".join(traceback.format_exception(error)), file=sys.stderr)
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return failed
