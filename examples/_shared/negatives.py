"""The demo's picture: some anchors of a modality, and the negatives of most and of least weight."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from torch_geometric.data import Data

from undimix_plugins import Contrast, UnDiMix, importance_weights


def draw_negatives(
    figure: SubFigure,
    title: str,
    contrast: Contrast,
    items: Sequence[Any],
    draw: Callable[[Axes, Any], None],
    anchors: Sequence[int],
    k: int,
) -> None:
    """Draws a row for each anchor: the anchor, its k negatives of most weight, its k negatives of least.

    Args:
        figure: The figure to draw in.
        title: The figure's title.
        contrast: One batch's contrast.
        items: The samples behind the anchors and the pool's columns.
        draw: A function that draws a sample.
        anchors: The anchors' indices.
        k: The number of negatives of most weight, and of least.
    """
    weights = importance_weights(contrast, UnDiMix())
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", weight="bold")
    grid = figure.subplots(len(anchors), 2 * k + 1, squeeze=False)
    for axes, anchor in zip(grid, anchors, strict=True):
        order = [j for j in weights[anchor].argsort(descending=True).tolist() if weights[anchor, j] > 0]
        most = distinct(order, items, k)
        shown_already = {id(items[j]) for j in most}
        rest = [j for j in order if id(items[j]) not in shown_already]
        least = distinct(rest[::-1], items, k)[::-1]
        shown = [(anchor, "anchor", "black")]
        for columns, colour in ((most, "tab:red"), (least, "tab:blue")):
            shown += [(j, f"weight {weights[anchor, j]:.2f}", colour) for j in columns]
        for axis, (item, label, colour) in zip(axes, shown, strict=True):
            draw(axis, items[item])
            axis.set_title(label, fontsize=8, color=colour)
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_color(colour)


def distinct(order: Sequence[int], items: Sequence[Any], k: int) -> list[int]:
    """Returns the first k columns of `order` with different samples. (An image has two views, and so two columns.)"""
    chosen: dict[int, int] = {}
    for column in order:
        chosen.setdefault(id(items[column]), column)
        if len(chosen) == k:
            break
    return list(chosen.values())


def draw_image(axes: Axes, image: Any) -> None:
    axes.imshow(image, cmap="gray_r")


def draw_text(axes: Axes, text: str) -> None:
    lines = textwrap.wrap(text, 34)
    shown = "\n".join(lines[:5]) + (" …" if len(lines) > 5 else "")
    axes.text(0.5, 0.5, shown, ha="center", va="center", fontsize=7.5, transform=axes.transAxes)


def draw_graph(axes: Axes, graph: Data) -> None:
    """Draws the graph of a digit: nodes at their pixels, darker with more ink."""
    ink, rows, columns = graph.x.T
    i, j = graph.edge_index[:, graph.edge_index[0] < graph.edge_index[1]]
    axes.plot([columns[i], columns[j]], [rows[i], rows[j]], color="tab:gray", linewidth=0.6, zorder=1)
    axes.scatter(
        columns, rows, c=ink, cmap="gray_r", vmin=0, vmax=1, s=26, edgecolors="black", linewidths=0.6, zorder=2
    )
    axes.set(xlim=(-0.6, 0.6), ylim=(0.6, -0.6), aspect="equal")
