"""GraphCL's loss, its negatives weighted."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import normalize

from undimix_plugins import WeightedLoss, Weighting, as_full_precision, decoupled, in_batch_negatives, reweight
from undimix_plugins.checks import check_embeddings, check_number, check_same_length


class GraphCLLoss(WeightedLoss):
    """The loss of GraphCL, the other graphs of the batch as weighted negatives.

        loss_i = -log( exp(cos(z_i, z_i') / t) / sum over j != i of w_ij exp(cos(z_i, z_j') / t) ),

    z_i and z_i' two views of graph i, averaged over the batch. As in the paper and the authors' code, the positive is
    not in the denominator (so the loss may be negative), and second views are the candidates of the first.

    Args:
        temperature: t, what cosines are divided by, a finite number above 0; 0.2 is the authors' for TUDatasets.
        weighting: How much each negative counts; defaults to `UnDiMix()`. `Uniform()` is plain GraphCL.

    Raises:
        ValueError: For a temperature that is no finite number above 0.
        TypeError: For a weighting that is no `Weighting`.

    References:
        You et al.: Graph Contrastive Learning with Augmentations, NeurIPS 2020, arXiv 2010.13902, section 3.3,
        equation 3; arXiv 2206.01197 (UnDiMix, section 3).

    Examples:
        >>> loss = GraphCLLoss(temperature=0.2)(torch.randn(8, 32), torch.randn(8, 32))
    """

    def __init__(self, temperature: float = 0.2, weighting: Weighting | None = None) -> None:
        super().__init__()
        self.temperature = check_number("temperature", temperature, above=0)
        self.weigh(weighting)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The weighted loss of two views of a batch of graphs.

        Args:
            z1: Projections of the first views [graphs, width], floating point.
            z2: Projections of the second views [graphs, width].

        Returns:
            A scalar in the projections' dtype (float32 for half precision). 0 for a batch of one graph.

        Raises:
            ValueError: For projections that are no matrices, are empty or do not match each other, or (on the CPU) are
                not finite. On other devices, non-finite projections give a loss of NaN.
        """
        check_embeddings(z1=z1, z2=z2)
        check_same_length(z1=z1, z2=z2)
        z1, z2 = (normalize(as_full_precision(z), dim=1) for z in (z1, z2))
        return decoupled(in_batch_negatives(z1, z2, self.temperature), self.weighting)

    def extra_repr(self) -> str:
        """The settings."""
        return f"temperature={self.temperature}, {super().extra_repr()}"


def weighted(loss: nn.Module, weighting: Weighting | None, **settings: Any) -> nn.Module:
    """The adapter of `undimix()` for this package's own losses."""
    return reweight(loss, weighting, {GraphCLLoss: GraphCLLoss}, **settings)
