"""Explains the weights of an anchor's negatives, as a table and as a plot."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from undimix_plugins.checks import check_number
from undimix_plugins.contrast import Contrast, alone
from undimix_plugins.rows import full_precision
from undimix_plugins.weightings.weighting import Weighting, check_compared, checked

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"similarity": "#d55e00", "influence": "#0072b2", "diversity": "#009e73", "weight": "#999999"}


@dataclass(frozen=True)
class Explained:
    """The weight of one negative of an anchor.

    Attributes:
        column: The column of the negative in the pool.
        weight: Its weight, at least 0.
        parts: The contribution of each component by name. Empty for a weighting without components.

    Examples:
        >>> Explained(column=3, weight=1.5, parts={}).weight
        1.5
    """

    column: int
    weight: float
    parts: dict[str, float]


@dataclass(frozen=True)
class Explanation:
    """The negatives of an anchor with the largest and the smallest weights. Print it to see a table.

    Attributes:
        anchor: The index of the anchor.
        weighting: The weighting that was explained.
        negatives: The number of negatives of the anchor.
        most: The negatives with the largest weights, the largest first.
        least: The negatives with the smallest weights that are not in `most`, the smallest last.
        rest: The constant that makes the parts add up to the logarithm of the weight. It is the same for all negatives
            of the anchor. None if the parts add up to the weight itself, or if there are no parts.

    Examples:
        >>> views = torch.eye(4)
        >>> print(explain(two_views(views, views, 0.5), Uniform(), anchor=1, k=2))
        anchor 1, 6 negatives, Uniform()
        column  weight
             0   1.000
             2   1.000
           ...
             6   1.000
             7   1.000
    """

    anchor: int
    weighting: Weighting
    negatives: int
    most: list[Explained]
    least: list[Explained]
    rest: float | None

    def __str__(self) -> str:
        names = self._names()
        left_out = [] if self.negatives == len(self.most) + len(self.least) else [f"{'...':>6}"]
        lines = [
            f"anchor {self.anchor}, {self.negatives} negatives, {self.weighting}",
            "  ".join(["column", "weight", *names]),
            *map(self._line, self.most),
            *left_out,
            *map(self._line, self.least),
        ]
        return "\n".join([*lines, self._formula()] if names else lines)

    def _formula(self) -> str:
        parts = " + ".join(self._names())
        if not parts:
            return "weight"
        if self.rest is None:
            return f"weight = {parts}"
        return f"log(weight) = {parts} {'-' if self.rest < 0 else '+'} {abs(self.rest):.3f}"

    def _names(self) -> list[str]:
        return list(self.most[0].parts) if self.most else []

    def _line(self, negative: Explained) -> str:
        parts = [f"{part:+{len(name)}.3f}" for name, part in negative.parts.items()]
        return "  ".join([f"{negative.column:6}", f"{negative.weight:6.3f}", *parts])

    def plot(self, axes: Axes | None = None, *, labels: Sequence[str] | None = None) -> Axes:
        """Plots the contribution of each component to the weights with matplotlib, as horizontal bars.

        Args:
            axes: The axes to draw into. By default those of a new figure.
            labels: A name for each column of the pool [m]. By default the numbers of the columns.

        Returns:
            The axes.

        Raises:
            ImportError: If matplotlib is not installed.
            TypeError: If `labels` is a single string.
            ValueError: If a negative in the plot has no label.

        Examples:
            >>> explanation = explain(two_views(torch.randn(8, 4), torch.randn(8, 4), 0.5), UnDiMix(), anchor=0)
            >>> axes = explanation.plot()
        """
        try:
            from matplotlib import pyplot as plt
        except ImportError as error:
            raise ImportError("plot needs matplotlib, which is not installed: pip install matplotlib") from error
        if isinstance(labels, (str, bytes)):
            raise TypeError(f"labels: expected one for each column of the pool, got one text: {labels!r:.40}")
        shown = [*self.most, *self.least]
        columns = 1 + max((negative.column for negative in shown), default=-1)
        if labels is not None and len(labels) < columns:
            raise ValueError(f"labels: expected one for each column of the pool, {columns} or more, got {len(labels)}")
        if axes is None:
            _, axes = plt.subplots(figsize=(8, 1.6 + 0.3 * len(shown)), layout="constrained")
        names = [f"column {n.column}" if labels is None else _short(labels[n.column]) for n in shown]
        left_out = self.negatives - len(shown)
        places = list(range(len(shown)))
        if left_out:
            names.insert(len(self.most), f"{left_out} between")
            places.remove(len(self.most))
            places.append(len(shown))
        colours = {name: COLOURS.get(name, f"C{place}") for place, name in enumerate(self._names() or ["weight"])}
        for place, negative in zip(places, shown, strict=True):
            ends = {True: 0.0, False: 0.0}  # of the bars to the right, and to the left
            for name, part in (negative.parts or {"weight": negative.weight}).items():
                label = name if negative is shown[0] else None
                axes.barh(
                    place,
                    part,
                    left=ends[part >= 0],
                    height=0.75,
                    color=colours[name],
                    label=label,
                )
                ends[part >= 0] += part
            if self.rest is not None:
                label = "sum" if negative is shown[0] else None
                axes.plot(sum(ends.values()), place, "D", color="black", markersize=4, label=label)
            weight, at = f"{negative.weight:.2f}", (1.02, place)
            axes.annotate(weight, at, xycoords=("axes fraction", "data"), va="center_baseline", fontsize=9)
        axes.annotate(
            "weight", (1.02, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", fontsize=9, weight="bold"
        )
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set_ylim(max(len(names), 1) - 0.4, -0.6)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel(self._formula())
        title = textwrap.fill(f"anchor {self.anchor} under {self.weighting._title()}", 64)
        axes.set_title(title, loc="left", pad=24 if self._names() else 6)
        if self._names():
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, borderpad=0.2, borderaxespad=0.2
            )
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
        return axes


def _short(label: str) -> str:
    return textwrap.shorten(str(label), 40, placeholder=" …")


def explain(contrast: Contrast, weighting: Weighting, anchor: int, k: int = 5) -> Explanation:
    """Finds the negatives of an anchor with the largest and the smallest weights, and says why they have them.

    For `UnDiMix` with geometric mixing, the part of a component is hardness times strength times standardised score:

        log w_ij = h * l_A * A~_ij + h * l_I * I~_ij + h * l_V * V~_ij + rest_i

    With linear mixing, the parts are `n_i * l_A * softmax(h * A~)_ij` and so on, and `w_ij` is their sum. For other
    weightings only the weights are given.

    A single process can call it alone. If the pool is gathered from several processes, the influence needs the anchors
    of all of them. The contrast contains these, unless the pool is a memory bank, or two encoders or a guide model are
    compared.

    Args:
        contrast: A contrast with n anchors.
        weighting: The weighting to explain.
        anchor: The index of the anchor, from 0 to n - 1.
        k: The number of negatives in `most` and in `least`, at least 1. If the anchor has fewer than 2k negatives,
            `most` is filled first.

    Returns:
        The columns, weights and parts of these negatives. Negatives of equal weight are in the order of their columns.

    Raises:
        ValueError: If `anchor` is out of range, if `k` is below 1, if the influence needs anchors that only other
            processes have, or as the weighting does.
        TypeError: If `contrast` is not a `Contrast` or `weighting` is not a `Weighting`.

    References:
        UnDiMix, arXiv 2206.01197, section 3. Geometric mixing is ours.

    Examples:
        >>> contrast = two_views(torch.randn(8, 4), torch.randn(8, 4), temperature=0.5)
        >>> explanation = explain(contrast, UnDiMix(), anchor=0, k=2)
        >>> explanation.most[0].weight >= explanation.least[-1].weight
        True
        >>> sorted(explanation.most[0].parts)
        ['diversity', 'influence', 'similarity']
    """
    check_compared(contrast, weighting)
    if check_number("anchor", anchor, at_least=0) not in range(len(contrast.anchors)):
        raise ValueError(f"anchor: expected one from 0 to {len(contrast.anchors) - 1}, got {anchor!r}")
    anchor, k = int(anchor), int(check_number("k", k, at_least=1))
    rows = slice(anchor, anchor + 1)
    rest, told = None, weighting
    contrast, weighting = alone(weighting.choose(contrast)), weighting._weigher()
    with torch.no_grad(), full_precision(contrast.pool):
        logits = contrast.logits(rows)
        prepared = weighting.prepare(contrast)
        log_weights = checked(weighting, weighting.log_weights(prepared, rows), logits)[0]
        terms, of_logarithm = weighting.terms(prepared, rows)
        parts = {name: term[0] for name, term in terms.items()}
        columns = contrast.is_negative(rows)[0].nonzero()[:, 0]
        columns = columns[log_weights[columns].argsort(descending=True, stable=True)]
    if parts and len(columns) and of_logarithm:
        rest = float(log_weights[columns[0]] - sum(part[columns[0]] for part in parts.values()))
    ordered = [
        Explained(
            int(column), float(log_weights[column].exp()), {name: float(part[column]) for name, part in parts.items()}
        )
        for column in torch.cat([columns[:k], columns[k:][-k:]])
    ]
    return Explanation(anchor, told, len(columns), ordered[:k], ordered[k:], rest)
