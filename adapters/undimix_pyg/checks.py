"""What the models of this package check alike, and how they call their encoders."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable

from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.data.data import Data
from torch_geometric.nn.conv.pna_conv import PNAConv
from torch_geometric.nn.models.basic_gnn import BasicGNN

# What edges may have that an encoder works with, by PyG's names.
EDGE_DATA = ("edge_weight", "edge_attr", "edge_type")


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
    **further: Tensor,
) -> Tensor:
    """What an encoder makes of a view, given what it takes of the data's `edge_weight`, `edge_attr` and `edge_type`.

    Args:
        encoder: Called as `encoder(x, edge_index, **further)`.
        data: Whose edges' data are given, too.
        x: The view's features [num_nodes, channels].
        edge_index: The view's edges.
        kept: Which of the data's edges these are, a mask [num_edges]; None for all.
        **further: What else the encoder is given.

    Raises:
        ValueError: For an encoder that needs what the data lack; for edge data that have no row per edge.

    Warns:
        UserWarning: For edge weights that the encoder does not take.
    """
    taken, given = _taken(encoder), {}
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
            "data.edge_weight: the encoder takes no weights of edges, so that all count alike; use one that does, such "
            "as GCN, or delete the weights",
            stacklevel=2,
        )
    try:
        return encoder(x, edge_index, **given, **further)
    except Exception as error:
        lacking = [name for name in taken if name not in of_edges]
        needed = [name for name in lacking if taken[name]] or (lacking if "NoneType" in str(error) else [])
        if not needed:
            raise
        raise ValueError(
            f"{' or '.join(f'data.{name}' for name in needed)}: expected a row for each edge, which the encoder "
            f"({type(encoder).__name__}) needs, got None; add it to the data, or use an encoder that does without"
        ) from error


def _taken(encoder: Callable[..., Tensor]) -> dict[str, bool]:
    """Which of `EDGE_DATA` an encoder takes, each with whether it has to have it."""
    while isinstance(encoder, (OptimizedModule, DistributedDataParallel)):  # their own forward takes anything
        encoder = encoder._orig_mod if isinstance(encoder, OptimizedModule) else encoder.module
    parameters = inspect.signature(encoder.forward if isinstance(encoder, nn.Module) else encoder).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    taken = {name: parameters[name].default is inspect.Parameter.empty for name in EDGE_DATA if name in parameters}
    if takes_any:
        taken = dict.fromkeys(EDGE_DATA, False) | taken
    if isinstance(encoder, BasicGNN):
        # PyG's own models take weights and features, whatever their layers can do with them.
        if not encoder.supports_edge_weight:
            taken.pop("edge_weight", None)
        if not encoder.supports_edge_attr or any(getattr(conv, "edge_dim", 0) is None for conv in encoder.convs):
            taken.pop("edge_attr", None)
        elif any(isinstance(conv, PNAConv) for conv in encoder.convs):
            taken["edge_attr"] = True
    return taken
