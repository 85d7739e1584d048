"""What the models of this package check alike, and how they call their encoders."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from types import TracebackType

from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.data.data import Data
from torch_geometric.nn import GINEConv, NNConv, RGCNConv
from torch_geometric.nn.conv.gps_conv import GPSConv
from torch_geometric.nn.conv.pna_conv import PNAConv
from torch_geometric.nn.models.basic_gnn import BasicGNN

# What edges may have that an encoder works with, by PyG's names.
EDGE_DATA = ("edge_weight", "edge_attr", "edge_type")
# Whose `forward` takes any keywords, each with the attribute that these go to.
AROUND: dict[type[nn.Module], str] = {OptimizedModule: "_orig_mod", DistributedDataParallel: "module", GPSConv: "conv"}
# PyG's layers that take something as optional and fail without it.
NEEDS: dict[type[nn.Module], str] = {
    GINEConv: "edge_attr",
    NNConv: "edge_attr",
    PNAConv: "edge_attr",
    RGCNConv: "edge_type",
}


def check_width(name: str, width: int) -> None:
    """Raises a ValueError for a width below 1."""
    if width < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {width}")


def encode(
    encoder: Callable[..., Tensor],
    data: Data,
    x: Tensor,
    edge_index: Tensor,
    kept: Tensor | None = None,
    by_keyword: tuple[str, ...] = (),
    **further: Tensor,
) -> Tensor:
    """What an encoder makes of a view, given what it takes of the data's `edge_weight`, `edge_attr` and `edge_type`.

    It takes what its `forward` has as parameters of these names. `**kwargs` alone do not say where they go, and a layer
    that is given what it does not know raises.

    Args:
        encoder: Called as `encoder(x, edge_index, **further)`.
        data: Whose edges' data are given, too.
        x: The view's features [num_nodes, channels].
        edge_index: The view's edges.
        kept: Which of the data's edges these are, a mask [num_edges]; None for all.
        by_keyword: Which of them an encoder with `**kwargs` is given, too.
        **further: What else the encoder is given.

    Raises:
        ValueError: For an encoder that needs what the data lack: a parameter without a default, or what a layer of
            PyG's inside cannot do without; for edge data that have no row per edge. What else the encoder raises is its
            own, with a note where it may be for what the data lack.

    Warns:
        UserWarning: For edge weights that the encoder does not take.
    """
    taken, given = _taken(encoder, by_keyword), {}
    of_edges = {name: getattr(data, name) for name in EDGE_DATA if getattr(data, name, None) is not None}
    for name, rows in of_edges.items():
        if name in taken:
            number = edge_index.size(1) if kept is None else len(kept)
            if not isinstance(rows, Tensor) or rows.shape[:1] != (number,):
                came = f"shape {list(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
                raise ValueError(f"data.{name}: expected a row for each of {number} edges, got {came}")
            given[name] = rows if kept is None else rows[kept]
    if "edge_weight" in of_edges and "edge_weight" not in taken:
        warnings.warn(
            "data.edge_weight: the encoder takes no weights of edges (its forward has no edge_weight), so that all "
            "count alike; use one that does, such as GCN, or delete the weights",
            stacklevel=2,
        )
    lacking = [name for name in taken if name not in of_edges]
    if needed := [name for name in lacking if taken[name]]:
        raise _lack(needed, encoder)
    try:
        return encoder(x, edge_index, **given, **further)
    except Exception as error:
        if (name := _missed(error.__traceback__)) in lacking:
            raise _lack([name], encoder) from error
        if lacking and "None" in str(error) and hasattr(error, "add_note"):  # which Python 3.10 does not have
            error.add_note(f"The data have no {' or '.join(lacking)}, which the encoder takes: it may need them.")
        raise


def _lack(needed: list[str], encoder: Callable[..., Tensor]) -> ValueError:
    return ValueError(
        f"{' and '.join(f'data.{name}' for name in needed)}: expected a row for each edge, which the encoder "
        f"({type(encoder).__name__}) needs, got None; add it to the data, or use an encoder that does without"
    )


def _missed(traceback: TracebackType | None) -> str:
    """What the layer of `NEEDS` that was at work when an error came did not get; empty for none."""
    missed = ""
    while traceback is not None:
        frame = traceback.tb_frame
        layer = frame.f_locals.get("self")
        name = next((name for cls, name in NEEDS.items() if isinstance(layer, cls)), None)
        if name in frame.f_locals and frame.f_locals[name] is None and getattr(layer, "edge_dim", 0) is not None:
            missed = name
        traceback = traceback.tb_next
    return missed


def _taken(encoder: Callable[..., Tensor], by_keyword: tuple[str, ...]) -> dict[str, bool]:
    """Which of `EDGE_DATA` an encoder takes, each with whether it has to have it."""
    while (around := next((cls for cls in AROUND if isinstance(encoder, cls)), None)) is not None:
        encoder = getattr(encoder, AROUND[around])
    if encoder is None:  # the layer that a GPSConv can do without
        return {}
    parameters = inspect.signature(encoder.forward if isinstance(encoder, nn.Module) else encoder).parameters
    taken = {name: parameters[name].default is inspect.Parameter.empty for name in EDGE_DATA if name in parameters}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        taken = dict.fromkeys(by_keyword, False) | taken
    # PyG's own take weights and features, whatever their layers can do with them.
    layers = encoder.convs if isinstance(encoder, BasicGNN) else [encoder]
    if isinstance(encoder, BasicGNN) and not encoder.supports_edge_weight:
        taken.pop("edge_weight", None)
    if not getattr(encoder, "supports_edge_attr", True) or any(getattr(of, "edge_dim", 0) is None for of in layers):
        taken.pop("edge_attr", None)
    return taken
