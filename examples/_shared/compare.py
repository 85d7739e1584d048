"""The command line that the examples share: the score before training, with the plain loss and with the method."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Sequence
from typing import Any


def compare(
    description: str,
    train: Callable[..., tuple[Any, Any, float]],
    *,
    score: str,
    plain: str,
    method: str,
    data: Sequence[str],
) -> None:
    """Reads the command line, trains and prints the scores.

    Args:
        description: A text whose first line `--help` shows.
        train: An example's `train(with_method, *, seed, data, epochs, max_steps)`. It returns the model, the score and
            the seconds of training. Its default of `epochs` is that of `--epochs`.
        score: The name of the score.
        plain: The name of the plain loss.
        method: The name of the loss with the method.
        data: The values that `--data` takes, the default first. All others are downloaded.
    """
    epochs = inspect.signature(train).parameters["epochs"].default
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--data", default=data[0], help=f"{data[0]}, or downloaded: {', '.join(data[1:])}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=type(epochs), default=epochs)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps")
    options = vars(parser.parse_args())
    if options["data"] not in data:
        parser.error(f"--data: expected one of {', '.join(data)}, got {options['data']}")

    _, untrained, _ = train(False, **options | {"epochs": 0})
    results = {name: train(way, **options) for name, way in ((plain, False), (method, True))}
    print(f"{score}, before training: {untrained:.3f}")
    for name, (_, value, seconds) in results.items():
        print(f"{score}, {name}: {value:.3f} ({seconds:.1f} s)")
