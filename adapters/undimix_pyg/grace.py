"""GRACE's model: two corrupted views of a graph, the nodes of each encoded and projected."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch_geometric.data.batch import Batch
from torch_geometric.data.data import Data
from torch_geometric.utils import dropout_edge, mask_feature

from undimix_plugins.toolkit import check_number
from undimix_pyg.augmentations import checked_data, edges_of, features_of
from undimix_pyg.checks import check_width, encode


class GRACE(nn.Module):
    """GRACE around any PyG encoder of nodes.

        z = head(encoder(view)),   head(h) = W2 elu(W1 h + b1) + b2

    for two views of the graph. `GRACELoss` then pulls each node together with itself in the other view. In a view, each
    edge is dropped with some probability (each direction of an undirected edge by itself), and each feature is set to 0
    for all nodes with some probability.

    Args:
        encoder: Called as `encoder(x, edge_index)`, with those of the data's `edge_weight`, `edge_attr` and `edge_type`
            that its `forward` takes. Returns embeddings of the nodes [num_nodes, hidden_channels].
        hidden_channels: The width of the encoder's output and of the head, at least 1.
        drop_edge_rate_1: The probability that an edge is dropped in the first view, in [0, 1). The defaults are those
            of the authors' code for Cora.
        drop_edge_rate_2: The same for the second view.
        drop_feature_rate_1: The probability that a feature is masked in the first view, in [0, 1).
        drop_feature_rate_2: The same for the second view.

    Raises:
        ValueError: If a width is below 1, or a probability is not a finite number in [0, 1).

    References:
        Zhu et al.: Deep Graph Contrastive Representation Learning, ICML workshop on Graph Representation Learning and
        Beyond 2020, arXiv 2006.04131, section 3 and algorithm 1; the head and the defaults: the authors' code.

    Examples:
        >>> from torch_geometric.nn import GCN
        >>> data = Data(x=torch.randn(4, 7), edge_index=torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))
        >>> model = GRACE(GCN(7, 32, num_layers=2), 32)
        >>> z1, z2 = model(data)
        >>> z1.shape, z2.shape
        (torch.Size([4, 32]), torch.Size([4, 32]))
        >>> model.embed(data).shape
        torch.Size([4, 32])
    """

    def __init__(
        self,
        encoder: Callable[..., Tensor],
        hidden_channels: int,
        drop_edge_rate_1: float = 0.2,
        drop_edge_rate_2: float = 0.4,
        drop_feature_rate_1: float = 0.3,
        drop_feature_rate_2: float = 0.4,
    ) -> None:
        super().__init__()
        check_width("hidden_channels", hidden_channels)
        self.encoder = encoder
        self.hidden_channels = hidden_channels
        self.drop_edge_rate_1 = check_number("drop_edge_rate_1", drop_edge_rate_1, at_least=0, below=1)
        self.drop_edge_rate_2 = check_number("drop_edge_rate_2", drop_edge_rate_2, at_least=0, below=1)
        self.drop_feature_rate_1 = check_number("drop_feature_rate_1", drop_feature_rate_1, at_least=0, below=1)
        self.drop_feature_rate_2 = check_number("drop_feature_rate_2", drop_feature_rate_2, at_least=0, below=1)
        self.head = nn.Sequential(
            nn.Linear(hidden_channels, hidden_channels),
            nn.ELU(),
            nn.Linear(hidden_channels, hidden_channels),
        )

    def forward(self, data: Data | Batch) -> tuple[Tensor, Tensor]:
        """Projections of the nodes in two views.

        Args:
            data: A graph, a `Batch` of graphs, or a batch of a loader of nodes; with features `x`.

        Returns:
            Two tensors [num_nodes, hidden_channels]. Row i of both belongs to node i. In a batch of a `NeighborLoader`
            the seed nodes come first: pass their rows to the loss, `z[: data.batch_size]`.

        Raises:
            ValueError: As `embed`.
        """
        first = self._encode(data, self.drop_edge_rate_1, self.drop_feature_rate_1)
        second = self._encode(data, self.drop_edge_rate_2, self.drop_feature_rate_2)
        return self.head(first), self.head(second)

    def embed(self, data: Data | Batch) -> Tensor:
        """The embeddings of the nodes, without corruption or head: use these for evaluation and downstream tasks.

        Args:
            data: As `forward`.

        Returns:
            A tensor [num_nodes, hidden_channels], part of the autograd graph: for evaluation, put the model into
            `eval()` and call it under `torch.no_grad()`.

        Raises:
            ValueError: If the graph has no `x`, or lacks edge weights, features or types that the encoder needs; if the
                encoder's output has another shape. For a `HeteroData`, or for sparse adjacency matrices in place of
                `edge_index`.
        """
        return self._encode(data, drop_edge_rate=0, drop_feature_rate=0)

    def _encode(self, data: Data | Batch, drop_edge_rate: float, drop_feature_rate: float) -> Tensor:
        data = checked_data(data)
        x, _ = mask_feature(features_of(data), drop_feature_rate)
        edge_index, kept = dropout_edge(edges_of(data), drop_edge_rate)
        # With several graphs, what normalises by graph in PyG's own models, such as GraphNorm, has to know them apart.
        batch, by_graph = data.batch, getattr(self.encoder, "supports_norm_batch", False)
        further = {"batch": batch} if by_graph and batch is not None else {}
        h = encode(self.encoder, data, x, edge_index, kept, by_keyword=("edge_weight",), **further)
        if h.shape != (len(x), self.hidden_channels):
            raise ValueError(
                f"encoder: expected output of shape [{len(x)} nodes, {self.hidden_channels} hidden_channels], "
                f"got {list(h.shape)}"
            )
        return h
