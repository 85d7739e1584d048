"""GraphCL's model: two augmented views of each graph, encoded, pooled and projected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch_geometric.data.batch import Batch
from torch_geometric.data.data import Data
from torch_geometric.nn import global_add_pool

from undimix_pyg.augmentations import (
    AttributeMasking,
    EdgePerturbation,
    NodeDropping,
    RandomWalkSubgraph,
    edges_of,
    features_of,
    graphs_of,
)
from undimix_pyg.checks import check_width, encode

AUGMENTATIONS = (NodeDropping(), EdgePerturbation(), AttributeMasking(), RandomWalkSubgraph())


class GraphCL(nn.Module):
    """Graph contrastive learning around any PyG encoder.

        z = head(pool(encoder(view))),   head(h) = W2 relu(W1 h + b1) + b2

    for two views of each graph. `GraphCLLoss` then pulls the two together.

    Args:
        encoder: Called as `encoder(x, edge_index, batch=batch)`, with those of the data's `edge_weight`, `edge_attr`
            and `edge_type` that its `forward` takes. Returns embeddings of the nodes [num_nodes, hidden_channels],
            which are pooled here, or of the graphs [num_graphs, hidden_channels].
        hidden_channels: The encoder's output width, at least 1.
        projection_channels: The head's output width, at least 1; by default `hidden_channels`, as in the authors' code.
        augmentations: At least one transform. Each view of each batch is made by one of them, drawn uniformly.
        pooling: A function from embeddings of nodes to those of graphs, called as `pooling(h, batch, size=num_graphs)`.
            Default: the sum, as in the authors' code.

    Raises:
        ValueError: If a width is below 1, or there are no augmentations.

    References:
        You et al.: Graph Contrastive Learning with Augmentations, NeurIPS 2020, arXiv 2010.13902, section 3.3 and
        figure 1.

    Examples:
        >>> from torch_geometric.data import Batch
        >>> from torch_geometric.nn import GIN
        >>> graph = Data(x=torch.randn(4, 7), edge_index=torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))
        >>> model = GraphCL(GIN(7, 32, num_layers=3), 32, projection_channels=16)
        >>> z1, z2 = model(Batch.from_data_list([graph, graph, graph]))
        >>> z1.shape, z2.shape
        (torch.Size([3, 16]), torch.Size([3, 16]))
        >>> model.embed(graph).shape
        torch.Size([1, 32])
    """

    def __init__(
        self,
        encoder: Callable[..., Tensor],
        hidden_channels: int,
        projection_channels: int | None = None,
        augmentations: Sequence[Callable[[Any], Any]] = AUGMENTATIONS,
        pooling: Callable[..., Tensor] = global_add_pool,
    ) -> None:
        super().__init__()
        if projection_channels is None:
            projection_channels = hidden_channels
        check_width("hidden_channels", hidden_channels)
        check_width("projection_channels", projection_channels)
        if len(augmentations) == 0:
            raise ValueError("augmentations: expected at least one, got none")
        self.encoder = encoder
        self.hidden_channels = hidden_channels
        self.augmentations = tuple(augmentations)
        self.pooling = pooling
        self.head = nn.Sequential(
            nn.Linear(hidden_channels, hidden_channels),
            nn.ReLU(),
            nn.Linear(hidden_channels, projection_channels),
        )

    def forward(self, data: Data | Batch) -> tuple[Tensor, Tensor]:
        """Projections of two views of each graph.

        Args:
            data: A `Batch`, or a `Data`, which is one graph unless it has a `batch` vector; with features `x`.

        Returns:
            Two tensors [num_graphs, projection_channels]. Row i of both belongs to graph i.

        Raises:
            ValueError: As `embed`.
        """
        return self.head(self.embed(self._view(data))), self.head(self.embed(self._view(data)))

    def embed(self, data: Data | Batch) -> Tensor:
        """The embeddings of the graphs, without augmentation or head: use these for evaluation and downstream tasks.

        Args:
            data: As `forward`.

        Returns:
            A tensor [num_graphs, hidden_channels], part of the autograd graph: for evaluation, put the model into
            `eval()` and call it under `torch.no_grad()`.

        Raises:
            ValueError: If the graphs have no `x`, or lack edge weights, features or types that the encoder needs; if
                the encoder's output has neither one row per node nor one per graph, or another width. For a
                `HeteroData`, for sparse adjacency matrices in place of `edge_index`, or if the `batch` vector is not in
                ascending order.
        """
        batch, num_graphs = graphs_of(data)
        data = cast(Data, data)  # a Batch of Data is a Data, but its class is made at run time only
        h = encode(self.encoder, data, features_of(data), edges_of(data), batch=batch)
        if h.dim() != 2 or h.size(0) not in (len(batch), num_graphs) or h.size(1) != self.hidden_channels:
            raise ValueError(
                f"encoder: expected output of shape [{len(batch)} nodes or {num_graphs} graphs, "
                f"{self.hidden_channels} hidden_channels], got {list(h.shape)}"
            )
        # `size`, as the last graphs could have no nodes; with as many nodes as graphs, pooling changes nothing
        return self.pooling(h, batch, size=num_graphs) if h.size(0) == len(batch) else h

    def _view(self, data: Data | Batch) -> Data | Batch:
        view: Data | Batch = self.augmentations[int(torch.randint(len(self.augmentations), (), device="cpu"))](data)
        return view
