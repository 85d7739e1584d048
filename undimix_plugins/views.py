"""The contrast of two views of a batch, of one process or of all, which the toolkits' NT-Xent losses share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from undimix_plugins.checks import check_labels
from undimix_plugins.contrast import Contrast, LastLayerInputs, same_label, two_views
from undimix_plugins.distributed import check_equal_batches, gather_constants, processes
from undimix_plugins.rows import unit_rows
from undimix_plugins.weighted_loss import WeightedLoss


def contrast_of_views(
    criterion: WeightedLoss,
    temperature: float | Tensor,
    *,
    gather: Callable[[Tensor], Sequence[Tensor]] | None = None,
    labels: Tensor | None = None,
    **views: Tensor,
) -> Contrast:
    """Returns the contrast of SimCLR for a weighted loss: `two_views` of its views, normalised to length 1.

    Args:
        criterion: The loss. If it has a last layer, the inputs of that layer come with the contrast.
        temperature: The temperature that cosines are divided by.
        gather: The toolkit's function from this process's rows [n, d] to those of each process, with gradient. The
            contrast then has the views of all processes. None to compare this process's views alone.
        labels: The class of each sample [n]. Views of a sample's own class are not its negatives.
        views: The two views as they came, each [n, d], named as in the host's `forward`.

    Returns:
        A Contrast of 2n anchors, the first views, then the second views.

    Raises:
        ValueError: If there are not two views, or if views or labels do not fit. On every process, if batches to gather
            differ in size, or if only some processes have labels.

    Examples:
        >>> class MyLoss(WeightedLoss):
        ...     def forward(self, a, b):
        ...         return info_nce(contrast_of_views(self, 0.5, a=a, b=b), self.weighting)
        >>> loss = MyLoss()
        >>> loss.weigh(UnDiMix())
        >>> loss(torch.randn(8, 32), torch.randn(8, 32)).shape
        torch.Size([])
    """

    if len(views) != 2:
        raise ValueError(f"views: expected two, by name, got {len(views)}")

    def checked() -> tuple[Tensor, Tensor, list[Tensor] | None]:
        first, second = unit_rows(**views)
        check_labels(labels, first, of="sample")
        return first, second, criterion.inputs_of(*views.values())

    gather = gather if processes() > 1 else None
    equal = partial(check_equal_batches, next(iter(views)), checked, lambda rows: rows[0], labels=labels)
    first, second, inputs = checked() if gather is None else equal()
    gathered, offset = None, 0
    further: dict[str, Any] = {}
    of_pool = [part for part in (labels, *(inputs or [])) if part is not None]
    if gather is not None:
        gathered = torch.cat(list(gather(first))), torch.cat(list(gather(second)))
        offset, of_pool = dist.get_rank() * len(first), [gather_constants(part) for part in of_pool]
    if labels is not None:
        further["excluded_mask"] = same_label(labels.repeat(2), of_pool[0].repeat(2))
    if inputs is not None:
        further["last_layer"] = LastLayerInputs(torch.cat(inputs), torch.cat(of_pool[-2:]), normalized=True)
    return two_views(first, second, temperature, gathered=gathered, offset=offset, **further)
