"""Why an anchor's negatives weigh what they weigh: a table, and a plot of it."""

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
    """A negative of an anchor.

    Attributes:
        column: Where it stands in the pool.
        weight: What it counts, at least 0.
        parts: What each component gave, by its name; empty for a weighting that has none.

    Examples:
        >>> Explained(column=3, weight=1.5, parts={}).weight
        1.5
    """

    column: int
    weight: float
    parts: dict[str, float]


@dataclass(frozen=True)
class Explanation:
    """The negatives of an anchor that weigh most and least, as `explain` finds them. Printed, it is a table.

    Attributes:
        anchor: Which one.
        weighting: How much each negative counts.
        negatives: How many the anchor has.
        most: Those of most weight, the heaviest first.
        least: Those of least weight that are not among `most`, the lightest last.
        rest: What is added to a negative's parts to give the logarithm of its weight, the same for all negatives of the
            anchor; None where the parts add up to the weight itself, and where there are none.

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
        """Draws what each component gave to the negatives that weigh most and least, with matplotlib.

        Args:
            axes: Where to; a figure of its own by default.
            labels: What the pool's columns are called [m], to name the negatives by; their numbers by default.

        Returns:
            The axes drawn to.

        Raises:
            ImportError: Where matplotlib is missing.
            TypeError: For one text in the place of labels.
            ValueError: For fewer labels than the pool has columns.

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
    """Which of an anchor's negatives weigh most and least, and what each component gave to that.

    Of `UnDiMix` with geometric mixing a part is strength times hardness times the standardised score, and

        log w_ij = h * l_A * A~_ij + h * l_I * I~_ij + h * l_V * V~_ij + rest_i;

    with linear mixing a part is `n_i * l_A * softmax(h * A~)_ij`, and so on, and `w_ij` is the sum. Other weightings
    have weights alone.

    It asks nothing of other processes, so that one alone can call it. Where the pool is gathered, the influence needs
    the anchors of all: a contrast has them, unless its pool is a memory bank or two encoders or a guide are compared.

    Args:
        contrast: What is compared, n anchors and a pool of m.
        weighting: How much each negative counts.
        anchor: Which anchor, from 0 to n - 1.
        k: How many negatives of either kind, at least 1. Where there are fewer than 2k, `most` goes first.

    Returns:
        Their columns, weights and parts. Of equal weights the first columns go first.

    Raises:
        ValueError: For an anchor that is none of the contrast's, a `k` below 1, an influence that needs anchors which
            other processes have, and as the weighting does.
        TypeError: For something else than a Contrast and a Weighting.

    References:
        arXiv 2206.01197, section 3; geometric mixing is ours.

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
