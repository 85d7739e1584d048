"""Results on disk: one JSON-lines file for each recipe and data set, one line for each trial.

    python -m benchmarks.embeddings.results    # sets aside the results of other defaults than today's

A line is appended under a lock, so several processes can share a file. A process that is killed while it appends leaves
an incomplete last line. Readers skip that line, and the next append removes it, so the trial is simply run again.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks.embeddings.files import atomic_path, write_atomically
from benchmarks.embeddings.trials import Trial

RESULTS = Path(__file__).parent.parent / "results"
Result = dict[str, Any]


def file_of(trial: Trial, folder: Path = RESULTS) -> Path:
    """The file with the results of the trial's recipe and data set."""
    return folder / trial.modality / f"{trial.data}-{trial.recipe}.jsonl"


def rounded(value: Any) -> Any:
    """Rounds floats to six digits, which is more than their precision."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def checked(result: Any) -> Result:
    """The result; a ValueError unless it has at least one metric and each is a number."""
    metrics = result.get("metrics") if isinstance(result, dict) else None
    if not isinstance(metrics, dict) or not metrics or {*map(type, metrics.values())} - {int, float}:
        came = repr(metrics if isinstance(result, dict) else result)
        raise ValueError(f"metrics: expected a number for each name, got {came:.80}")
    return dict(result)


def complete_lines(path: Path) -> list[bytes]:
    """The lines of a file, without an incomplete last one that a killed append left."""
    content = path.read_bytes() if path.exists() else b""
    *lines, last = content.split(b"\n")
    if last:
        try:
            json.loads(last)
        except ValueError:
            return lines
        lines.append(last)  # only its line break is missing
    return lines


def read(path: Path) -> dict[Trial, Result]:
    """The results in a file, by trial; none if there is no file.

    Raises:
        ValueError: If a line holds no result, a result that belongs in another file, or a second result of a trial. The
            message names the line.
    """
    results: dict[Trial, Result] = {}
    numbers: dict[Trial, int] = {}
    for number, line in enumerate(complete_lines(path), 1):
        where = f"{path}, line {number}"
        try:
            result = checked(json.loads(line))
        except ValueError as error:  # also for text that is not JSON
            raise ValueError(
                f"{where}: expected a whole result, got none ({error}); delete the line to run the trial again"
            ) from error
        try:
            trial = Trial(**result["configuration"])
            hash(trial)
            belongs = file_of(trial, Path())
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where}: expected a trial's configuration, got {error!r}; delete the line") from error
        if path.parts[-len(belongs.parts) :] != belongs.parts:
            raise ValueError(
                f"{where}: expected results of one recipe and data set, got one of {belongs}; move the line"
            )
        if trial in results:
            raise ValueError(
                f"{where}: expected one result for each trial, got a second one after line {numbers[trial]}; "
                "delete one of the two lines"
            )
        results[trial], numbers[trial] = result, number
    return results


def load(folder: Path = RESULTS) -> dict[Trial, Result]:
    """All results in a folder, by trial; a ValueError as of `read`."""
    return {trial: result for path in sorted(folder.rglob("*.jsonl")) for trial, result in read(path).items()}


def append(trial: Trial, result: Result, folder: Path = RESULTS) -> Result:
    """Appends a result to its file, unless another process has added one of the same trial by now.

    Returns:
        The result that the file now holds.
    """
    path = file_of(trial, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        there = read(path)
        if trial in there:
            return there[trial]
        repair(path)
        with path.open("ab") as file:
            file.write(json.dumps(result).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    return result


def repair(path: Path) -> None:
    """Removes an incomplete last line, or adds the line break that the last line lacks. Hold the file's lock.

    The file is replaced, not truncated: a reader without the lock sees the old content or the new.
    """
    content = b"".join(line + b"\n" for line in complete_lines(path))
    if path.exists() and path.stat().st_size != len(content):
        with atomic_path(path) as part:
            part.write_bytes(content)


def metrics_of(results: dict[Trial, Result]) -> dict[Trial, dict[str, float]]:
    """The metrics of each trial."""
    return {trial: result["metrics"] for trial, result in results.items()}


def aside_of(folder: Path = RESULTS) -> Path:
    """Where the folder's results of earlier defaults are."""
    return folder.with_name(f"earlier_{folder.name}")


def is_outdated(trial: Trial, result: Result) -> bool:
    """Whether the result was made with another default, or another rule, than the trial has today."""
    return result.get("weighting", trial.settings()) != trial.settings()


def set_aside(folder: Path = RESULTS) -> int:
    """Moves the outdated results of a folder to `aside_of(folder)`. Their trials can then be run again.

    Returns:
        The number of results that were moved.

    Raises:
        ValueError: If there already is an earlier result of one of these trials, or as of `read`.
    """
    moved = 0
    for path in sorted(folder.rglob("*.jsonl")):
        with FileLock(f"{path}.lock"):
            found = read(path)
            outdated = {trial: is_outdated(trial, result) for trial, result in found.items()}
            if not any(outdated.values()):
                continue
            aside = aside_of(folder) / path.relative_to(folder)
            if twice := outdated.keys() & {trial for trial in read(aside) if outdated.get(trial)}:
                raise ValueError(f"{aside}: expected no results of {len(twice)} trials that {path} has; move the file")
            lines = list(zip(complete_lines(path), outdated.values(), strict=True))
            old = [*complete_lines(aside), *(line for line, is_old in lines if is_old)]
            today = [line for line, is_old in lines if not is_old]
            write_atomically(aside, "".join(f"{line.decode()}\n" for line in old))
            write_atomically(path, "".join(f"{line.decode()}\n" for line in today))
            moved += sum(outdated.values())
    return moved


def main() -> None:
    parser = argparse.ArgumentParser(description="Sets aside the results of other defaults than today's.")
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS, help="default: benchmarks/results")
    folder = parser.parse_args().folder
    print(f"{set_aside(folder)} results moved to {aside_of(folder)}")


if __name__ == "__main__":
    main()
