"""InfoGraph's model: graphs and their nodes, encoded together and projected apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn
from torch_geometric.data.batch import Batch
from torch_geometric.data.data import Data
from torch_geometric.nn import global_add_pool

from undimix_pyg.augmentations import edges_of, features_of, graphs_of
from undimix_pyg.checks import check_width, encode


class InfoGraph(nn.Module):
    """InfoGraph around any PyG encoder of nodes.

        h = encoder(graph),   node_u = local_head(h_u),   graph_g = global_head(pool of the h_u of g)

    A head is a feed-forward net of three layers with a linear shortcut, f(h) = relu(W3 relu(W2 relu(W1 h))) + W4 h;
    each layer has a bias. `InfoGraphLoss` then pulls graphs together with their own nodes.

    Args:
        encoder: Called as `encoder(x, edge_index, batch=batch)`, with those of the data's `edge_weight`, `edge_attr`
            and `edge_type` that its `forward` takes. Returns embeddings of the nodes [num_nodes, hidden_channels]. The
            authors' encoder concatenates those of all layers, as PyG's models do with `jk="cat"`.
        hidden_channels: The width of the encoder's output and of the heads, at least 1.
        pooling: A function from embeddings of nodes to those of graphs, called as `pooling(h, batch, size=num_graphs)`.
            Default: the sum, as in the authors' code.

    Raises:
        ValueError: If the width is below 1.

    References:
        Sun et al.: InfoGraph: Unsupervised and Semi-supervised Graph-Level Representation Learning via Mutual
        Information Maximization, ICLR 2020, arXiv 1908.01000, section 3.2; the heads: the authors' code.

    Examples:
        >>> from torch_geometric.data import Batch
        >>> from torch_geometric.nn import GIN
        >>> graph = Data(x=torch.randn(4, 7), edge_index=torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))
        >>> model = InfoGraph(GIN(7, 32, num_layers=3), 32)
        >>> graphs, nodes, batch = model(Batch.from_data_list([graph, graph, graph]))
        >>> graphs.shape, nodes.shape, batch.shape
        (torch.Size([3, 32]), torch.Size([12, 32]), torch.Size([12]))
        >>> model.embed(graph).shape
        torch.Size([1, 32])
    """

    def __init__(
        self,
        encoder: Callable[..., Tensor],
        hidden_channels: int,
        pooling: Callable[..., Tensor] = global_add_pool,
    ) -> None:
        super().__init__()
        check_width("hidden_channels", hidden_channels)
        self.encoder = encoder
        self.hidden_channels = hidden_channels
        self.pooling = pooling
        self.local_head = _FeedForward(hidden_channels)
        self.global_head = _FeedForward(hidden_channels)

    def forward(self, data: Data | Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Projections of graphs and nodes.

        Args:
            data: A `Batch`, or a `Data`, which is one graph unless it has a `batch` vector; with features `x`.

        Returns:
            The graphs' projections [num_graphs, hidden_channels], the nodes' [num_nodes, hidden_channels], and the
            number of each node's graph [num_nodes].

        Raises:
            ValueError: As `embed`.
        """
        graphs, nodes, batch = self._encode(data)
        return self.global_head(graphs), self.local_head(nodes), batch

    def embed(self, data: Data | Batch) -> Tensor:
        """The embeddings of the graphs, without the head: use these for evaluation and downstream tasks.

        Args:
            data: As `forward`.

        Returns:
            A tensor [num_graphs, hidden_channels], part of the autograd graph: for evaluation, put the model into
            `eval()` and call it under `torch.no_grad()`.

        Raises:
            ValueError: If the graphs have no `x`, or lack edge weights, features or types that the encoder needs; if
                the encoder's output has another shape. For a `HeteroData`, for sparse adjacency matrices in place of
                `edge_index`, or if the `batch` vector is not in ascending order.
        """
        return self._encode(data)[0]

    def _encode(self, data: Data | Batch) -> tuple[Tensor, Tensor, Tensor]:
        batch, num_graphs = graphs_of(data)
        data = cast(Data, data)  # a Batch of Data is a Data, but its class is made at run time only
        nodes = encode(self.encoder, data, features_of(data), edges_of(data), batch=batch)
        if nodes.shape != (len(batch), self.hidden_channels):
            raise ValueError(
                f"encoder: expected output of shape [{len(batch)} nodes, {self.hidden_channels} hidden_channels], "
                f"got {list(nodes.shape)}"
            )
        return self.pooling(nodes, batch, size=num_graphs), nodes, batch


class _FeedForward(nn.Module):
    """The authors' feed-forward net with a linear shortcut, [rows, width] to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())]
        self.block = nn.Sequential(*layers)
        self.shortcut = nn.Linear(width, width)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.block(rows) + self.shortcut(rows)
        return out
