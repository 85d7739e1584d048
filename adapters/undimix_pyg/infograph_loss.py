"""InfoGraph's loss in its InfoNCE form, its negatives weighted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_geometric.utils import to_dense_batch

from undimix_plugins.toolkit import (
    Contrast,
    WeightedLoss,
    Weighting,
    check_embeddings,
    check_labels,
    info_nce,
    same_label,
    to_length_one,
    values_are_free,
)


class InfoGraphLoss(WeightedLoss):
    """InfoGraph's loss in its InfoNCE form. A graph's weighted negatives are the nodes of the other graphs.

        loss_g = -mean over nodes u of g of log( e(g, u) / (sum over nodes v of g of e(g, v)
                                                            + sum over all other nodes v of w_gv e(g, v)) ),

    with e(g, u) = exp(cos(g, u) / t) of the projections of graph g and node u, averaged over the batch's graphs. A
    graph's positives are its own nodes. They share one denominator, so a graph of n nodes adds at least log n.

    This is not the paper's objective. The paper maximises the mutual information of graphs and nodes by a
    Jensen-Shannon estimator. It adds up a softplus for each pair, so no negative is compared with another, and weights
    would do nothing. This is the InfoNCE estimator of the same mutual information, over the same pairs, in its form for
    several positives. Deep InfoMax, which InfoGraph carries over to graphs, has both estimators. Here negatives share a
    denominator, so a hard one can count more than an easy one. The paper's discriminator is an inner product; this loss
    takes cosines over a temperature.

    Graphs and nodes come from two layers, so `undimix()` takes no last layer.

    Args:
        temperature: t. Cosines are divided by it. A finite number above 0. InfoGraph has none; 0.2 is GraphCL's for the
            same data sets.
        weighting: How negatives are weighted. Default: `UnDiMix(**options)`. `Uniform()` is plain InfoNCE.
        options: Options of `UnDiMix`, such as `hardness=2.0`, in place of a weighting.

    Raises:
        ValueError: If the temperature is not a finite number above 0. From `undimix()`: if a last layer is given.
        TypeError: If `weighting` is not a `Weighting`; if options are given with a weighting, or `UnDiMix` does not
            have them.

    References:
        Sun et al.: InfoGraph, ICLR 2020, arXiv 1908.01000, section 3.2; Hjelm et al.: Deep InfoMax, ICLR 2019, arXiv
        1808.06670, section 3.1 (the estimators); Khosla et al., arXiv 2004.11362, equation 2 (several positives);
        arXiv 2206.01197 (UnDiMix, section 3).

    Examples:
        >>> batch = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
        >>> loss = InfoGraphLoss(temperature=0.2)(torch.randn(3, 32), torch.randn(8, 32), batch)
    """

    no_last_layer = "with InfoGraphLoss, whose graphs and nodes are outputs of two layers"

    def __init__(self, temperature: float = 0.2, weighting: Weighting | None = None, **options: Any) -> None:
        super().__init__()
        self.temperature = temperature
        self.weigh(weighting, **options)

    def forward(self, graphs: Tensor, nodes: Tensor, batch: Tensor, labels: Tensor | None = None) -> Tensor:
        """The weighted loss of a batch of graphs and their nodes.

        Args:
            graphs: Projections of the graphs [graphs, width], floating point.
            nodes: Projections of the nodes of all graphs [nodes, width].
            batch: The number of each node's graph [nodes], int64, in any order.
            labels: The class of each graph [graphs]. Nodes of graphs of the anchor's class are then no negatives of it.

        Returns:
            A scalar in the projections' dtype (float32 for half precision). A graph without nodes adds 0. A graph
            without negatives, as in a batch of one, has only its own nodes in the denominator.

        Raises:
            ValueError: If the projections are not matrices, are empty, differ in width, or (on the CPU) are not finite;
                if `batch` does not match, or (on the CPU) has numbers of no graph; if the labels do not match. On other
                devices, the loss is NaN for non-finite projections.
        """
        check_embeddings(graphs=graphs, nodes=nodes)
        _check_batch(batch, graphs, nodes)
        check_labels(labels, graphs, of="graph")
        # By graph, as to_dense_batch takes nodes in the order of their graphs.
        order = batch.argsort(stable=True)
        columns, _ = to_dense_batch(order, batch[order], fill_value=-1, batch_size=len(graphs))
        contrast = Contrast.of(
            to_length_one(graphs),
            columns,
            to_length_one(nodes),
            excluded=None,
            temperature=self.temperature,
            excluded_mask=None if labels is None else same_label(labels, labels[batch]),
        )
        return info_nce(contrast, self.weighting)

    def extra_repr(self) -> str:
        """The settings."""
        return f"temperature={self.temperature}, {super().extra_repr()}"


def _check_batch(batch: Tensor, graphs: Tensor, nodes: Tensor) -> None:
    if not isinstance(batch, Tensor) or batch.shape != nodes.shape[:1] or batch.dtype != torch.long:
        came = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
        raise ValueError(f"batch: expected each node's graph, torch.int64 [{len(nodes)}], got {came}")
    if batch.device != nodes.device:
        raise ValueError(f"batch: expected device {nodes.device}, as nodes has, got {batch.device}")
    if values_are_free(batch):
        least, most = int(batch.min()), int(batch.max())
        if least < 0 or most >= len(graphs):
            raise ValueError(f"batch: expected numbers from 0 to {len(graphs) - 1}, got {least} to {most}")
