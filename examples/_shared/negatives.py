"""The demo's picture: some anchors of a modality, and the negatives of most and of least weight."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from rdkit import Chem
from rdkit.Chem.Draw import rdMolDraw2D
from torch_geometric.data import Data

from undimix_plugins import Contrast, UnDiMix, importance_weights

ATOMS = ("C", "N", "O", "F", "I", "Cl", "Br")  # MUTAG's node labels, in their order
BONDS = (Chem.BondType.AROMATIC, Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE)


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


def draw_molecule(axes: Axes, graph: Data) -> None:
    molecule = Chem.RWMol()
    for atom in graph.x.argmax(dim=1).tolist():
        molecule.AddAtom(Chem.Atom(ATOMS[atom]))
    for (i, j), bond in zip(graph.edge_index.T.tolist(), graph.edge_attr.argmax(dim=1).tolist(), strict=True):
        if i < j:
            molecule.AddBond(i, j, BONDS[bond])
    molecule.UpdatePropertyCache(strict=False)
    # MUTAG's nitro groups come without charges, and RDKit would draw a hydrogen for the missing one.
    for match in molecule.GetSubstructMatches(Chem.MolFromSmarts("[#8D1]=[#7]-[#8D1]")):
        molecule.GetAtomWithIdx(match[1]).SetFormalCharge(1)
        molecule.GetAtomWithIdx(match[2]).SetFormalCharge(-1)
    molecule.UpdatePropertyCache(strict=False)
    canvas = rdMolDraw2D.MolDraw2DCairo(330, 220)
    canvas.DrawMolecule(molecule)
    canvas.FinishDrawing()
    axes.imshow(plt.imread(io.BytesIO(canvas.GetDrawingText())))
