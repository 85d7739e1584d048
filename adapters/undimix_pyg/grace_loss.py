"""GRACE's loss, its negatives weighted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from undimix_plugins.toolkit import (
    LastLayerInputs,
    WeightedLoss,
    Weighting,
    check_labels,
    info_nce,
    same_label,
    two_views,
    unit_rows,
)


class GRACELoss(WeightedLoss):
    """The loss of GRACE. An anchor's weighted negatives are all other nodes in both views.

        loss(u_i) = -log( e(u_i, v_i) / (e(u_i, v_i) + sum over k != i of (w_ik e(u_i, v_k) + w'_ik e(u_i, u_k))) ),

    with e(u, v) = exp(cos(u, v) / t). u_i and v_i are the projections of node i in the two views. The loss is averaged
    over all nodes, and over both views as anchors. n nodes make 2n anchors with 2n - 2 negatives each. If a graph is
    too large for that, train on the parts that a loader gives.

    With a `GRACE` model, `undimix(loss, last_layer=model.head[-1])` takes gradients at that layer's weight. Then the
    loss needs all rows of the model's projections.

    Args:
        temperature: t. Cosines are divided by it. A finite number above 0; 0.5 is the default of the authors' code,
            which sets 0.4 for Cora, 0.9 for CiteSeer, 0.7 for PubMed and DBLP.
        weighting: How negatives are weighted. Default: `UnDiMix(**options)`. `Uniform()` is plain GRACE.
        options: Options of `UnDiMix`, such as `hardness=2.0`, in place of a weighting.

    Raises:
        ValueError: If the temperature is not a finite number above 0.
        TypeError: If `weighting` is not a `Weighting`; if options are given with a weighting, or `UnDiMix` does not
            have them.

    References:
        Zhu et al.: Deep Graph Contrastive Representation Learning, ICML workshop on Graph Representation Learning and
        Beyond 2020, arXiv 2006.04131, equations 1 and 2; arXiv 2206.01197 (UnDiMix, section 3).

    Examples:
        >>> loss = GRACELoss(temperature=0.4)(torch.randn(8, 32), torch.randn(8, 32))
    """

    def __init__(self, temperature: float = 0.5, weighting: Weighting | None = None, **options: Any) -> None:
        super().__init__()
        self.temperature = temperature
        self.weigh(weighting, **options)

    def forward(self, z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> Tensor:
        """The weighted loss of two views of nodes.

        Args:
            z1: Projections in the first view [nodes, width], floating point.
            z2: Projections in the second view [nodes, width].
            labels: The class of each node [nodes]. Nodes of one class are then no negatives of each other. Give a node
                of unknown class a label that no other node has.

        Returns:
            A scalar in the projections' dtype (float32 for half precision). A node without negatives, as in a graph of
            one node, adds 0.

        Raises:
            ValueError: If the projections are not matrices, are empty, do not match each other, or (on the CPU) are not
                finite; if the labels do not match. On other devices, the loss is NaN for non-finite projections.
        """
        first, second = unit_rows(z1=z1, z2=z2)
        check_labels(labels, z1, of="node")
        further: dict[str, Any] = {}
        if labels is not None:
            further["excluded_mask"] = same_label(labels.repeat(2), labels.repeat(2))
        inputs = self.inputs_of(z1, z2)
        if inputs is not None:
            of_all = torch.cat(inputs)
            further["last_layer"] = LastLayerInputs(of_all, of_all, normalized=True)
        return info_nce(two_views(first, second, self.temperature, **further), self.weighting)

    def extra_repr(self) -> str:
        """The settings."""
        return f"temperature={self.temperature}, {super().extra_repr()}"
