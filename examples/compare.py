"""The command line that the examples share: a training untrained, plain and weighted, from one seed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any


def compare(
    description: str,
    train: Callable[..., tuple[Any, Any, float]],
    *,
    score: str,
    plain: str,
    weighted: str,
    data: Sequence[str],
    epochs: float,
) -> None:
    """Reads the command line, trains and prints the scores.

    Args:
        description: Whose first line `--help` shows.
        train: An example's `train(weighted, *, seed, data, epochs, max_steps)`, returning model, score and seconds.
        score: What the score is.
        plain: The plain loss, as written.
        weighted: The weighted loss, as written.
        data: What `--data` takes, the default first; all others are downloaded.
        epochs: The default of `--epochs`.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--data", default=data[0], help=f"{data[0]}, or downloaded: {', '.join(data[1:])}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=type(epochs), default=epochs)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps")
    options = vars(parser.parse_args())
    if options["data"] not in data:
        parser.error(f"--data: expected one of {', '.join(data)}, got {options['data']}")

    _, untrained, _ = train(False, **options | {"epochs": 0})
    results = {loss: train(way, **options) for loss, way in ((plain, False), (weighted, True))}
    print(f"{score}, before training: {untrained:.3f}")
    for loss, (_, value, seconds) in results.items():
        print(f"{score}, {loss}: {value:.3f} ({seconds:.1f} s)")
