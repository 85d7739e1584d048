"""Three modalities, each plain and with UnDiMix, in their own toolkits' training loops: one table and one picture.

    python examples/demo.py

Each modality is trained by an example script of this folder, plain and weighted, with the same seeds. Both losses have
the temperature that the plain loss has by default. The table has the scores, whichever loss is ahead. The picture shows
the negatives of most and of least weight.

Training with the plain loss moves each score by more than three standard deviations over the seeds.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes with pip

import lightly_simclr
import matplotlib as mpl
import pyg_graphcl
import sentence_transformers_mnrl
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from scipy.stats import ttest_rel
from torch.nn.functional import normalize
from torch_geometric.data import Batch
from tqdm import tqdm

from _shared.graphs import DigitGraphs
from _shared.images import digit_views, images
from _shared.negatives import draw_graph, draw_image, draw_negatives, draw_text
from _shared.saving import save_whole
from _shared.texts import halves, lee_split
from undimix_plugins import Contrast, UnDiMix, effective_number, importance_weights, in_batch_negatives, two_views

HEAD = ("modality", "score, %", "untrained", "plain", "UnDiMix", "p", "negatives", "seconds")


@torch.no_grad()
def contrast_of_digits(model: lightly_simclr.SimCLR) -> tuple[Contrast, list[Any]]:
    dataset = images("MNIST", train=True)
    digits = [dataset[index][0] for index in range(128)]
    torch.manual_seed(0)
    views = zip(*(digit_views()(digit) for digit in digits), strict=True)
    first, second = (normalize(model.eval()(torch.stack(view)), dim=1) for view in views)
    return two_views(first, second, temperature=0.5), digits * 2


def contrast_of_articles(model: Any) -> tuple[Contrast, list[Any]]:
    anchors, positives = (list(texts) for texts in zip(*map(halves, lee_split()[1][:32]), strict=True))
    queries, docs = (
        model.encode(texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False).cpu()
        for texts in (anchors, positives)
    )
    return in_batch_negatives(queries, docs, temperature=1 / 20), anchors


@torch.no_grad()
def contrast_of_graphs(model: Any) -> tuple[Contrast, list[Any]]:
    graphs = list(DigitGraphs()[:128])
    torch.manual_seed(0)
    first, second = (normalize(z, dim=1) for z in model.eval()(Batch.from_data_list(graphs)))
    return in_batch_negatives(first, second, temperature=0.2), graphs


@dataclass
class Modality:
    """A toolkit's example, and its scores and seconds."""

    name: str
    score: str
    train: Callable[..., tuple[Any, Any, float]]
    # Returns a trained model's contrast of one batch, and the samples behind its anchors and the pool's columns.
    contrast: Callable[[Any], tuple[Contrast, list[Any]]]
    draw: Callable[[Axes, Any], None]
    columns: int  # how many negatives of most weight, and of least, are drawn
    scores: dict[str, list[float]] = field(default_factory=lambda: {"untrained": [], "plain": [], "UnDiMix": []})
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"untrained": [], "plain": [], "UnDiMix": []})
    model: Any = None

    def run(self, way: str, seed: int, max_steps: int) -> None:
        limit = {"epochs": 0} if way == "untrained" else {"max_steps": max_steps}
        model, score, seconds = self.train(way == "UnDiMix", seed=seed, progress=False, **limit)
        self.scores[way].append(100 * score)
        self.seconds[way].append(seconds)
        if way == "UnDiMix":
            self.model = model

    def effective(self) -> str:
        weights = importance_weights(self.contrast(self.model)[0], UnDiMix())
        return f"{effective_number(weights).mean():.0f} of {int((weights[0] > 0).sum())}"

    def row(self) -> list[str]:
        plain, weighted = self.scores["plain"], self.scores["UnDiMix"]
        comparable = len(plain) > 1 and stdev(a - b for a, b in zip(plain, weighted, strict=True)) > 0
        p = f"{ttest_rel(weighted, plain).pvalue:.2f}" if comparable else "-"
        took = " / ".join(f"{mean(self.seconds[way]):.0f}" for way in ("plain", "UnDiMix"))
        return [self.name, self.score, *map(spread, self.scores.values()), p, self.effective(), took]


def spread(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def table(rows: list[list[str]]) -> str:
    """Returns a Markdown table that also reads well in a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def picture(modalities: list[Modality], path: Path) -> None:
    mpl.use("agg")
    figure = plt.figure(figsize=(13, 12), layout="constrained")
    for modality, part in zip(modalities, figure.subfigures(len(modalities)), strict=True):
        contrast, items = modality.contrast(modality.model)
        title = f"{modality.name}: negatives weighted most (red) and least (blue)"
        draw_negatives(part, title, contrast, items, modality.draw, anchors=(3, 8), k=modality.columns)
    save_whole(figure, path, format="png", dpi=110)


def three_modalities() -> list[Modality]:
    return [
        Modality(
            "vision: lightly SimCLR, MNIST",
            "k-NN accuracy",
            lightly_simclr.train,
            contrast_of_digits,
            draw_image,
            5,
        ),
        Modality(
            "text: sentence-transformers, Lee news",
            "retrieval MRR",
            sentence_transformers_mnrl.train,
            contrast_of_articles,
            draw_text,
            2,
        ),
        Modality(
            "graphs: PyG GraphCL, digits of 8x8",
            "linear probe accuracy",
            pyg_graphcl.train,
            contrast_of_graphs,
            draw_graph,
            5,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many trainings of each")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop each training after so many steps")
    parser.add_argument("--picture", type=Path, default=Path("demo.png"), help="where to save the picture, a PNG")
    options = parser.parse_args()
    if options.picture.is_dir() or not options.picture.parent.is_dir():  # refused now, not after all trainings
        parser.error(f"--picture: expected a file in a folder that is there, got {options.picture}")
    modalities = three_modalities()
    runs = [(m, seed, way) for m in modalities for seed in range(options.seeds) for way in m.scores]
    with tqdm(runs) as bar:
        for modality, seed, way in bar:
            bar.set_description(f"{modality.name.partition(':')[0]}, seed {seed}, {way}")
            modality.run(way, seed, options.max_steps)
    print(table([list(HEAD), *(modality.row() for modality in modalities)]))
    print(
        f"\nMean ± standard deviation over {options.seeds} seeds; p of a paired t-test of UnDiMix against plain.\n"
        "Plain is the toolkit's loss with its own default temperature (.5, .05, .2); UnDiMix is undimix(plain).\n"
        "Negatives: their effective number under UnDiMix, of those in a batch, which plain counts all alike.\n"
        "Seconds: of a training, plain / UnDiMix."
    )
    picture(modalities, options.picture)
    print(f"\nWhich negatives were weighted most and least: {options.picture}")


if __name__ == "__main__":
    main()
