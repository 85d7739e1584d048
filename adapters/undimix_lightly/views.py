"""The contrast of two views of a batch that lightly's in-batch losses share."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightly.utils import dist
from torch import Tensor

from undimix_plugins.toolkit import (
    Contrast,
    LastLayerInputs,
    WeightedLoss,
    check_equal_batches,
    check_labels,
    gather_constants,
    same_label,
    two_views,
    unit_rows,
)


def contrast_of_views(
    criterion: WeightedLoss,
    out0: Tensor,
    out1: Tensor,
    temperature: float | Tensor,
    *,
    gather: bool = False,
    labels: Tensor | None = None,
) -> Contrast:
    """Every view against all views of the other samples, of all processes' with `gather`.

    Args:
        criterion: Whose last layer is asked for its inputs.
        out0: Projections of the first views as they came [batch, width].
        out1: Projections of the second views [batch, width].
        temperature: What cosines are divided by.
        gather: Whether to use the views of all processes.
        labels: The class of each sample [batch]. Views of a sample's own class are not its negatives.

    Returns:
        A Contrast of 2 * batch anchors, first views then second.

    Raises:
        ValueError: For projections or labels that do not fit; on every process, for batches of different sizes to
            gather, or labels on some processes alone.
    """

    def checked() -> tuple[Tensor, Tensor, list[Tensor] | None]:
        first, second = unit_rows(out0=out0, out1=out1)
        check_labels(labels, first, of="sample")
        return first, second, criterion.inputs_of(out0, out1)

    gather = gather and dist.world_size() > 1
    equal = partial(check_equal_batches, "out0", checked, lambda rows: rows[0], labels=labels)
    first, second, inputs = equal() if gather else checked()
    gathered, offset = None, 0
    further: dict[str, Any] = {}
    of_pool = [part for part in (labels, *(inputs or [])) if part is not None]
    if gather:
        gathered = torch.cat(dist.gather(first)), torch.cat(dist.gather(second))
        offset, of_pool = dist.rank() * len(first), [gather_constants(part) for part in of_pool]
    if labels is not None:
        further["excluded_mask"] = same_label(labels.repeat(2), of_pool[0].repeat(2))
    if inputs is not None:
        further["last_layer"] = LastLayerInputs(torch.cat(inputs), torch.cat(of_pool[-2:]), normalized=True)
    return two_views(first, second, temperature, gathered=gathered, offset=offset, **further)
