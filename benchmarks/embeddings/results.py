"""What the benchmarks of embeddings share: a run is one training, its result one JSON file, and what is there stays."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

import undimix_plugins
from undimix_plugins import Weighting
from undimix_plugins.statistics import mean_statistics

RESULTS = Path(__file__).parent.parent / "results"
UNTRAINED = "untrained"
PACKAGES = ("torch", "lightly", "sentence-transformers", "transformers", "torch-geometric", "scikit-learn")
SCALES = ("tiny", "small", "full")


@dataclass(frozen=True)
class Run:
    """One training and the evaluation of its encoder.

    Attributes:
        modality: "vision", "text" or "graph".
        recipe: The method that trains, such as "SimCLR".
        data: What it trains on, by its public name.
        weighting: The loss's, a Python expression of names of `undimix_plugins`; or `UNTRAINED`.
        temperature: The loss's.
        batch_size: 0 where the recipe has no batches.
        seed: Of all that is random; of random splits, too.
        split: What the encoder is evaluated on, "validation" or "test".
        warmup: The share of the training in which the weighting grows from none to its full hardness.
        scale: "small"; "full", longer and on larger encoders, for GPUs; "tiny" to see whether all works.
        class_known: Whether labels take the anchor's class out of its negatives, to see what false negatives cost.
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

    @property
    def trains(self) -> bool:
        return self.weighting != UNTRAINED

    def loss_weighting(self) -> Weighting:
        """The weighting that the expression stands for."""
        # The expression is the caller's own, from this package's tables or from their command line.
        weighting = eval(self.weighting, {**vars(undimix_plugins)})
        if not isinstance(weighting, Weighting):
            raise ValueError(f"weighting: expected an expression for a Weighting, got {self.weighting!r}")
        return weighting

    def settings(self) -> str:
        """The weighting with all its settings, which defaults may change."""
        return repr(self.loss_weighting()) if self.trains else UNTRAINED

    def path(self, folder: Path = RESULTS) -> Path:
        """Where the result is: a name that tells the run, and a few digits that no other has."""
        told = asdict(self)
        if not self.class_known:  # results are there from before it
            del told["class_known"]
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
        weighting = re.sub(r"[^A-Za-z0-9.=-]+", "-", self.weighting).strip("-")[:60]
        name = f"{weighting}-t{self.temperature:g}-b{self.batch_size}-s{self.seed}-{self.split}-{digest}.json"
        return folder / self.modality / f"{self.data}-{self.recipe}" / name


Train = Callable[[Run, Path | None], dict[str, Any]]


def quarters(seen: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """The means of the first and of the last quarter of what was seen; empty for nothing."""
    if not seen:
        return {}
    quarter = max(1, len(seen) // 4)
    return {"first_quarter": mean_statistics(seen[:quarter]), "last_quarter": mean_statistics(seen[-quarter:])}


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when it is complete: no older file is lost on the way.

    Where that fails, nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def rounded(value: Any) -> Any:
    """With six digits, which is more than any result is worth."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def read(path: Path) -> dict[str, Any]:
    """The result in a file; a ValueError that names the file where it has none, or a part of one."""
    try:
        return checked(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # no JSON, too
        raise ValueError(
            f"{path}: expected a whole result, got none ({error}); delete the file to have it made anew"
        ) from error


def checked(result: Any) -> dict[str, Any]:
    """The result, a ValueError unless it has scores."""
    metrics = result.get("metrics") if isinstance(result, dict) else None
    if not isinstance(metrics, dict) or not metrics or {*map(type, metrics.values())} - {int, float}:
        came = repr(metrics if isinstance(result, dict) else result)
        raise ValueError(f"metrics: expected a number for each name, got {came:.80}")
    return dict(result)


def result_of(train: Train, run: Run, data_dir: Path | None, folder: Path = RESULTS) -> dict[str, Any]:
    """The result of a run: read, or made and written."""
    path = run.path(folder)
    if path.exists():
        return read(path)
    start = time.perf_counter()
    made = checked(rounded(train(run, data_dir)))
    result = {
        "modality": run.modality,
        "configuration": asdict(run),
        "weighting": run.settings(),
        "seed": run.seed,
        "local_copies": data_dir is not None,
        **made,
        "seconds": round(time.perf_counter() - start, 2),
        "versions": {name: version(name) for name in ("undimix-plugins", *PACKAGES)},
    }
    write_whole(path, json.dumps(result, indent=1) + "\n")
    return result


def sweep(
    train: Train, runs: Iterable[Run], data_dir: Path | None = None, *, folder: Path = RESULTS, jobs: int = 1
) -> list[Run]:
    """Makes the results that are missing, some at once, each in a process of its own.

    Returns:
        The runs that failed; what went wrong is printed.

    Raises:
        ValueError: For a result that is there, and is empty or not whole.
    """
    todo = []
    for run in dict.fromkeys(runs):
        path = run.path(folder)
        if path.exists():
            read(path)
        else:
            todo.append(run)
    if not todo:
        return []
    # For the processes: each has its share of the cores, and threads that wait must not take another's.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    failed = []
    with (
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
        tqdm(total=len(todo), unit="run", smoothing=0) as bar,
    ):
        futures = {pool.submit(result_of, train, run, data_dir, folder): run for run in todo}
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


def load(folder: Path = RESULTS) -> dict[Run, dict[str, Any]]:
    """All results that are there, by run; a ValueError for one that is none."""
    results = {}
    for path in sorted(folder.rglob("*.json")):
        result = read(path)
        try:
            results[Run(**result["configuration"])] = result
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a run's configuration, got {error!r}; delete the file") from error
    return results


def metrics_of(results: dict[Run, dict[str, Any]]) -> dict[Run, dict[str, float]]:
    """Their metrics alone."""
    return {run: result["metrics"] for run, result in results.items()}
