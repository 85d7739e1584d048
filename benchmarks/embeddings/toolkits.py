"""The examples of four more toolkits over twelve seeds, plain and with UnDiMix, at the toolkits' own temperatures.

    python -m benchmarks.embeddings.toolkits --jobs 2

Each trains as its script in `examples/` does, on small data that come with pip, and scores held-out data. No setting
was tuned, neither for the plain loss nor for UnDiMix.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.embeddings.protocol import METHODS, PLAIN, SEEDS, UNDIMIX
from benchmarks.embeddings.sweep import sweep
from benchmarks.embeddings.trials import UNTRAINED, Trial

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
CONTENDERS = (UNTRAINED, METHODS[PLAIN], UNDIMIX)


@dataclass(frozen=True)
class Example:
    """A toolkit's example.

    Attributes:
        script: Its name in `examples/`.
        metric: The name of its score.
        base: The trial, whose temperature is the one that the toolkit comes with.
    """

    script: str
    metric: str
    base: Trial

    def trials(self, weighting: str) -> list[Trial]:
        """The trials with a weighting, one for each seed. They score held-out data."""
        return [replace(self.base, weighting=weighting, seed=seed, split="test") for seed in SEEDS]


def example(script: str, metric: str, recipe: str, data: str, temperature: float, batch_size: int) -> Example:
    return Example(script, metric, Trial("toolkits", recipe, data, METHODS[PLAIN], temperature, batch_size, 0))


BY_TOOLKIT = {
    "pytorch-metric-learning": example(
        "pytorch_metric_learning_supcon", "MAP@R of unseen classes", "SupCon", "digits", 0.1, 80
    ),
    "open_clip": example("open_clip_digits", "accuracy among a hundred texts", "CLIP", "pairs-of-digits", 0.07, 50),
    "sentence-transformers": example("sentence_transformers_multi_vector", "MRR", "late-interaction", "news", 1.0, 16),
    "stable-pretraining": example("stable_pretraining_simclr", "k-NN accuracy", "SimCLR", "digits", 0.5, 256),
}


def train(trial: Trial, data_dir: Path | None) -> dict[str, Any]:
    """Runs the example of a trial. The data come with pip."""
    script = next(one.script for one in BY_TOOLKIT.values() if one.base.recipe == trial.recipe)
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    run = importlib.import_module(script).train
    further = {} if trial.trains else {"epochs": 0}
    _, score, _ = run(trial.weighting == UNDIMIX, seed=trial.seed, progress=False, **further)
    return {"metrics": {"score": score}, "statistics": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="number of trials to run at once; default: 1")
    options = parser.parse_args()
    trials = [trial for one in BY_TOOLKIT.values() for weighting in CONTENDERS for trial in one.trials(weighting)]
    if failed := sweep(train, trials, jobs=options.jobs):
        sys.exit(f"{len(failed)} trials failed")


if __name__ == "__main__":
    main()
