"""GraphCL's loss, its negatives weighted."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from undimix_plugins.toolkit import (
    LastLayerInputs,
    WeightedLoss,
    Weighting,
    check_labels,
    decoupled,
    in_batch_negatives,
    same_label,
    unit_rows,
)


class GraphCLLoss(WeightedLoss):
    """The loss of GraphCL. An anchor's weighted negatives are the other graphs of the batch.

        loss_i = -log( exp(cos(z_i, z_i') / t) / sum over j != i of w_ij exp(cos(z_i, z_j') / t) ),

    averaged over the batch. z_i and z_i' are two views of graph i. As in the paper and the authors' code, the positive
    is not in the denominator, so the loss may be negative. The candidates of first views are second views.

    With a `GraphCL` model, `undimix(loss, last_layer=model.head[-1])` takes gradients at that layer's weight.

    Args:
        temperature: t. Cosines are divided by it. A finite number above 0; 0.2 is the authors' for TUDatasets.
        weighting: How negatives are weighted. Default: `UnDiMix(**options)`. `Uniform()` is plain GraphCL.
        options: Options of `UnDiMix`, such as `hardness=2.0`, in place of a weighting.

    Raises:
        ValueError: If the temperature is not a finite number above 0.
        TypeError: If `weighting` is not a `Weighting`; if options are given with a weighting, or `UnDiMix` does not
            have them.

    References:
        You et al.: Graph Contrastive Learning with Augmentations, NeurIPS 2020, arXiv 2010.13902, section 3.3,
        equation 3; arXiv 2206.01197 (UnDiMix, section 3).

    Examples:
        >>> loss = GraphCLLoss(temperature=0.2)(torch.randn(8, 32), torch.randn(8, 32))
    """

    def __init__(self, temperature: float = 0.2, weighting: Weighting | None = None, **options: Any) -> None:
        super().__init__()
        self.temperature = temperature
        self.weigh(weighting, **options)

    def forward(self, z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> Tensor:
        """The weighted loss of two views of a batch of graphs.

        Args:
            z1: Projections of the first views [graphs, width], floating point.
            z2: Projections of the second views [graphs, width].
            labels: The class of each graph [graphs]. Graphs of one class are then no negatives of each other.

        Returns:
            A scalar in the projections' dtype (float32 for half precision). A graph without negatives, as in a batch
            of one, adds 0.

        Raises:
            ValueError: If the projections are not matrices, are empty, do not match each other, or (on the CPU) are not
                finite; if the labels do not match. On other devices, the loss is NaN for non-finite projections.
        """
        first, second = unit_rows(z1=z1, z2=z2)
        check_labels(labels, z1, of="graph")
        further: dict[str, Any] = {}
        if labels is not None:
            further["excluded_mask"] = same_label(labels, labels)
        inputs = self.inputs_of(z1, z2)
        if inputs is not None:
            further["last_layer"] = LastLayerInputs(inputs[0], inputs[1], normalized=True)
        return decoupled(in_batch_negatives(first, second, self.temperature, **further), self.weighting)

    def extra_repr(self) -> str:
        """The settings."""
        return f"temperature={self.temperature}, {super().extra_repr()}"
