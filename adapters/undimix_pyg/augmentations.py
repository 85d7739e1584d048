"""GraphCL's four augmentations as PyG transforms, for a single graph or a whole batch at once.

They work on a `Data` and on a `Batch`, on the data's device, without a loop over graphs or nodes. A batch is augmented
as each of its graphs would be: no edge links two graphs, every graph keeps at least one node, and `Batch.get_example`
and `Batch.to_data_list` stay right. Undirected graphs stay undirected.

Tensors with one row per node or edge (`x`, `edge_attr`, `pos`, `train_mask`, ...) follow their nodes and edges. If a
graph has as many edges as nodes, or a single edge, the tensors with "edge" in their name follow the edges. Everything
else, such as graph labels `y`, stays. Of the attributes that hold node numbers, only `edge_index` is renumbered.

Randomness comes from torch's global generator, so `torch.manual_seed` reproduces an augmentation.

References:
    You et al.: Graph Contrastive Learning with Augmentations (GraphCL), NeurIPS 2020, arXiv 2010.13902, section 3.2
    and table 1. You et al.: Graph Contrastive Learning Automated (JOAO), ICML 2021, arXiv 2106.07594.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric.data.batch import Batch
from torch_geometric.data.data import Data
from torch_geometric.transforms.base_transform import BaseTransform
from torch_geometric.utils import cumsum, degree, group_argsort, is_sparse, lexsort, scatter, subgraph

from undimix_plugins.toolkit import check_number


class _Augmentation(BaseTransform):
    """A transform that changes a share of each graph."""

    def __init__(self, ratio: float = 0.2) -> None:
        self.ratio = check_number("ratio", ratio, at_least=0, below=1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(ratio={self.ratio})"


class NodeDropping(_Augmentation):
    """Drops nodes and their edges: a missing part should not change what a graph is.

    `floor(ratio * n)` of a graph's n nodes are dropped, chosen uniformly.

    Args:
        ratio: The share of nodes to drop, in [0, 1); 0.2 in the paper.

    Raises:
        ValueError: If the ratio is not a finite number in [0, 1). When called: for a `HeteroData`, for sparse adjacency
            matrices in place of `edge_index`, or if the `batch` vector is not in ascending order.

    References:
        arXiv 2010.13902, section 3.2, "node dropping".

    Examples:
        >>> triangle = Data(x=torch.eye(3), edge_index=torch.tensor([[0, 1, 1, 2, 2, 0], [1, 0, 2, 1, 0, 2]]))
        >>> NodeDropping(ratio=0.4)(triangle)
        Data(x=[2, 3], edge_index=[2, 2])
    """

    def forward(self, data: Data) -> Data:
        """A `Data` or `Batch` without the dropped nodes. The others keep their order."""
        batch, num_graphs = graphs_of(data)
        dropped = _floor(self.ratio, degree(batch, num_graphs, torch.long))
        return _induced_subgraph(data, batch, num_graphs, ~_choose(batch, dropped))


class EdgePerturbation(_Augmentation):
    """Drops edges and adds as many new ones: a graph should not depend on the exact pattern of its edges.

    `floor(ratio * m)` of a graph's m edges are dropped, chosen uniformly. As many node pairs become edges, chosen
    uniformly among the pairs that were neither edges nor self-loops; if there are fewer such pairs, all of them. A new
    edge takes its attributes from an edge of the same graph, chosen uniformly.

    A graph with every edge in both directions is undirected. The two directions are then one edge: they are dropped
    together, and a new edge has the same attributes in both.

    Args:
        ratio: The share of edges to exchange, in [0, 1); 0.2 in the paper.

    Raises:
        ValueError: As `NodeDropping`.

    References:
        arXiv 2010.13902, section 3.2, "edge perturbation".

    Examples:
        >>> path = Data(num_nodes=4, edge_index=torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]]))
        >>> perturbed = EdgePerturbation(ratio=0.5)(path)
        >>> perturbed.num_edges, perturbed.is_undirected()
        (6, True)
    """

    def forward(self, data: Data) -> Data:
        """A `Data` or `Batch` with the same nodes; edges are ordered by graph, the remaining ones before the new."""
        batch, num_graphs = graphs_of(data)
        edge_index = edges_of(data)
        edge_batch = batch[edge_index[0]]
        undirected = _are_undirected(edge_index, edge_batch, len(batch), num_graphs)

        # Both directions of an undirected edge are one unit, a directed edge is one by itself.
        low, high = edge_index[0].minimum(edge_index[1]), edge_index[0].maximum(edge_index[1])
        alone = len(batch) ** 2 + torch.arange(len(edge_batch), device=batch.device)
        key = torch.where(undirected[edge_batch], low * len(batch) + high, alone)
        units, unit = torch.unique(key, return_inverse=True)
        unit_batch = torch.empty_like(units).scatter_(0, unit, edge_batch)
        count = _floor(self.ratio, degree(unit_batch, num_graphs, torch.long))
        kept = (~_choose(unit_batch, count)[unit]).nonzero().view(-1)

        new = _draw_pairs(edge_index, batch, num_graphs, undirected, count)
        new_batch = batch[new[0]]
        by_graph = edge_batch.argsort(stable=True)
        edge_ptr = cumsum(degree(edge_batch, num_graphs, torch.long))
        offset = _uniform_below(edge_ptr.diff()[new_batch])
        source = by_graph[edge_ptr[new_batch] + offset]
        both = undirected[new_batch]

        edge_index = torch.cat([edge_index[:, kept], new, new.flip(0)[:, both]], dim=1)
        edges = torch.cat([kept, source, source[both]])
        order = batch[edge_index[0]].argsort(stable=True)
        return _take(data, batch, num_graphs, edge_index[:, order], edges[order])


class AttributeMasking(_Augmentation):
    """Masks the features of nodes: the rest of a graph should be enough to recognise it.

    `floor(ratio * n)` of a graph's n nodes, chosen uniformly, get the mean row of their graph in place of their row of
    `x`. The paper leaves open what replaces a row. The authors' code uses the mean for semi-supervised and transfer
    learning, and Gaussian noise for unsupervised learning. For integer `x` the mean is truncated, as in JOAO's code. A
    graph without `x` stays as it is.

    Args:
        ratio: The share of nodes to mask, in [0, 1); 0.2 in the paper.

    Raises:
        ValueError: As `NodeDropping`.

    References:
        arXiv 2010.13902, section 3.2, "attribute masking".

    Examples:
        >>> pair = Data(x=torch.tensor([[0.0], [1.0]]), edge_index=torch.tensor([[0, 1], [1, 0]]))
        >>> AttributeMasking(ratio=0.5)(pair).x.sum() in (0.5, 1.5)
        True
    """

    def forward(self, data: Data) -> Data:
        """A `Data` or `Batch` with a new `x` of the same shape and dtype."""
        batch, num_graphs = graphs_of(data)
        if data.x is None:
            return data
        masked = _choose(batch, _floor(self.ratio, degree(batch, num_graphs, torch.long)))
        # In double, as the features of a large graph may add up to more than half precision can hold.
        mean = scatter(data.x.double(), batch, dim=0, dim_size=num_graphs, reduce="mean").to(data.x.dtype)
        data.x = torch.where(masked.view(-1, *[1] * (data.x.dim() - 1)), mean[batch], data.x)
        return data


class RandomWalkSubgraph(_Augmentation):
    """Keeps the nodes that a random walk visits: local structure says much about a graph.

    `n - floor(ratio * n)` of a graph's n nodes stay, with the edges among them. The walk starts at a uniformly chosen
    node. Each step takes an edge from any visited node to a new node. All such edges are equally likely, and their
    direction is ignored. If there is none, the walk starts again at a uniformly chosen new node. So the subgraph of a
    connected graph is connected.

    `ratio` is the share that is dropped, as in the other augmentations and in the authors' later code for JOAO. That
    code also restarts the walk; there each neighbour is equally likely to be next, here each edge to one. Their code
    for GraphCL keeps at most a share `ratio` of the nodes, all of them neighbours of the first node.

    Args:
        ratio: The share of nodes not to keep, in [0, 1).

    Raises:
        ValueError: As `NodeDropping`.

    References:
        arXiv 2010.13902, section 3.2, "subgraph"; arXiv 2106.07594 (JOAO) and the authors' code for it.

    Examples:
        >>> path = Data(num_nodes=5, edge_index=torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]]))
        >>> RandomWalkSubgraph(ratio=0.4)(path)
        Data(edge_index=[2, 2], num_nodes=3)
    """

    def forward(self, data: Data) -> Data:
        """A `Data` or `Batch` with the visited nodes, in their old order."""
        batch, num_graphs = graphs_of(data)
        edge_index = edges_of(data)
        sizes = degree(batch, num_graphs, torch.long)
        position = torch.arange(len(batch), device=batch.device) - cumsum(sizes)[batch]

        # All walks at once. Let crossing an edge take an exponential time. Exponential times have no memory, so at any
        # moment all edges out of the visited nodes are equally likely to be crossed next: the nodes in the order of
        # the first arrival at them are those of the walk (first-passage percolation). Restarts are so late that an
        # arrival over edges always comes first.
        source = torch.cat([edge_index[0], edge_index[1]])
        target = torch.cat([edge_index[1], edge_index[0]])
        duration = torch.empty(edge_index.size(1), dtype=torch.double, device=batch.device).exponential_().repeat(2)
        arrival = _random_rank(batch, num_graphs) * (duration.sum() + 1)
        while True:  # Bellman-Ford: as many rounds as the longest walk has edges
            earlier = arrival.scatter_reduce(0, target, arrival[source] + duration, "amin")
            if torch.equal(earlier, arrival):
                break
            arrival = earlier

        visited = torch.zeros_like(batch, dtype=torch.bool)
        walk = lexsort([arrival, batch])
        visited[walk[position < (sizes - _floor(self.ratio, sizes))[batch]]] = True
        return _induced_subgraph(data, batch, num_graphs, visited)


def graphs_of(data: Data | Batch) -> tuple[Tensor, int]:
    """The number of each node's graph [num_nodes], ascending, and how many graphs there are.

    A `Data` without `batch` is one graph.

    Raises:
        ValueError: For what is no `Data` nor a `Batch` of them, sparse adjacency matrices, or a `batch` vector that is
            not in ascending order.

    Examples:
        >>> graphs_of(Data(x=torch.zeros(3, 1)))
        (tensor([0, 0, 0]), 1)
    """
    data = checked_data(data)
    if isinstance(data, Batch):
        return data.batch, data.num_graphs
    if data.batch is None:
        device = next((value.device for value in data.to_dict().values() if isinstance(value, Tensor)), None)
        return torch.zeros(data.num_nodes or 0, dtype=torch.long, device=device), 1
    if (data.batch.diff() < 0).any():
        first = int((data.batch.diff() < 0).nonzero()[0, 0])
        came = data.batch[first : first + 2].tolist()
        raise ValueError(f"data.batch: expected graph numbers in ascending order, got {came} at node {first}")
    return data.batch, int(data.batch[-1]) + 1 if len(data.batch) else 0


def checked_data(data: Data | Batch) -> Data:
    """`data`; a ValueError for what is no `Data` nor a `Batch` of them, or holds sparse adjacency matrices."""
    if not isinstance(data, Data):
        raise ValueError(f"data: expected a Data or a Batch of them, got {type(data).__name__}")
    sparse = [key for key, value in data.to_dict().items() if is_sparse(value)]
    if sparse:
        raise ValueError(f"data: expected edges as edge_index and dense tensors, got a sparse {sparse[0]}")
    return data


def features_of(data: Data) -> Tensor:
    """`data.x`, a row per node; a ValueError where `data` has none."""
    if data.x is None:
        raise ValueError(
            "data.x: expected node features, got None; add some to the dataset by its transform, such as "
            "torch_geometric.transforms.Constant() or OneHotDegree(max_degree)"
        )
    return data.x


def edges_of(data: Data) -> Tensor:
    """`data.edge_index` [2, num_edges], empty where `data` has none."""
    if data.edge_index is None:
        return torch.empty(2, 0, dtype=torch.long, device=graphs_of(data)[0].device)
    return data.edge_index


def _floor(ratio: float, sizes: Tensor) -> Tensor:
    """`floor(ratio * sizes)`, integers; below `sizes` wherever these are positive, as the ratio is below 1."""
    return (sizes.double() * ratio).long()


def _uniform_below(bounds: Tensor) -> Tensor:
    """A uniformly random integer from 0 to below each of the positive `bounds`."""
    return (torch.rand(bounds.shape, dtype=torch.double, device=bounds.device) * bounds).long()


def _random_rank(groups: Tensor, num_groups: int) -> Tensor:
    """The place of each element in a random order of its group, from 0."""
    keys = torch.rand(groups.shape, dtype=torch.double, device=groups.device)
    return group_argsort(keys, groups, num_groups=num_groups).long()


def _choose(groups: Tensor, count: Tensor) -> Tensor:
    """A mask of `count[g]` uniformly chosen elements of each group g."""
    return _random_rank(groups, len(count)) < count[groups]


def _are_undirected(edge_index: Tensor, edge_batch: Tensor, num_nodes: int, num_graphs: int) -> Tensor:
    """Whether a graph has edges and each of them in both directions, booleans [num_graphs]."""
    forward = edge_index[0] * num_nodes + edge_index[1]
    backward = edge_index[1] * num_nodes + edge_index[0]
    has_reverse = torch.isin(backward, forward).long()
    return scatter(has_reverse, edge_batch, dim_size=num_graphs, reduce="min").bool()


def _draw_pairs(edge_index: Tensor, batch: Tensor, num_graphs: int, undirected: Tensor, count: Tensor) -> Tensor:
    """Draws `count[g]` distinct pairs of distinct nodes of each graph g, uniformly among those that are no edges.

    Where there are fewer such pairs, all of them. In undirected graphs a pair has no order, and is drawn once.
    """
    # PyG's batched_negative_sampling loops over the graphs and draws from Python's own generator, not torch's.
    sizes = degree(batch, num_graphs, torch.long)
    node_ptr, row_ptr, graph_ptr = cumsum(sizes), cumsum(sizes[batch]), cumsum(sizes**2)

    # Pairs are numbered through: a graph's come one after another, row by row of its adjacency matrix.
    def encode(i: Tensor, j: Tensor) -> Tensor:
        return row_ptr[i] + j - node_ptr[batch[i]]

    def decode(code: Tensor) -> tuple[Tensor, Tensor]:
        i = torch.searchsorted(row_ptr, code, right=True) - 1
        return i, code - row_ptr[i] + node_ptr[batch[i]]

    nodes = torch.arange(len(batch), device=batch.device)
    taken = torch.unique(torch.cat([encode(edge_index[0], edge_index[1]), encode(nodes, nodes)]))
    drawn = taken[:0]
    while True:
        taken_ptr = torch.searchsorted(taken, graph_ptr)
        free = sizes**2 - taken_ptr.diff()
        missing = count - degree(batch[decode(drawn)[0]], num_graphs, torch.long)
        missing = missing.minimum(free)
        if not missing.any():
            return torch.stack(decode(drawn))
        graph = torch.arange(num_graphs, device=batch.device).repeat_interleave(missing)
        # The r-th free number is r plus how many taken ones lie before it. What is drawn twice is drawn anew.
        rank = (graph_ptr[:-1] - taken_ptr[:-1])[graph] + _uniform_below(free[graph])
        before = taken - torch.arange(len(taken), device=batch.device)
        i, j = decode(rank + torch.searchsorted(before, rank, right=True))
        swap = undirected[graph] & (i > j)
        i, j = decode(torch.unique(encode(torch.where(swap, j, i), torch.where(swap, i, j))))
        drawn = torch.cat([drawn, encode(i, j)])
        both = undirected[batch[i]]
        taken = torch.cat([taken, encode(i, j), encode(j[both], i[both])]).sort().values


def _induced_subgraph(data: Data, batch: Tensor, num_graphs: int, mask: Tensor) -> Data:
    """`data` with the nodes of the mask and the edges among them."""
    edge_index, _, edge_mask = subgraph(
        mask, edges_of(data), relabel_nodes=True, num_nodes=len(batch), return_edge_mask=True
    )
    nodes, edges = mask.nonzero().view(-1), edge_mask.nonzero().view(-1)
    return _take(data, batch, num_graphs, edge_index, edges, nodes)


def _take(
    data: Data,
    batch: Tensor,
    num_graphs: int,
    edge_index: Tensor,
    edges: Tensor,
    nodes: Tensor | None = None,
) -> Data:
    """Gives `data` new edges, and keeps some of its nodes only.

    Args:
        data: What is changed, in place: a shallow copy, as transforms get it.
        batch: The graph of each node of `data`.
        num_graphs: How many graphs there are.
        edge_index: The new edges, ordered by graph.
        edges: The old edge whose attributes each new edge has.
        nodes: The old nodes to keep, ascending; None keeps all.
    """
    # Data.subgraph would do for a Data, but leaves a Batch's slices as they were, and tells attributes apart by their
    # size alone: it takes the labels of a batch with as many edges as graphs to be edge-level.
    slices = dict(getattr(data, "_slice_dict", {}))
    node_ptr = cumsum(degree(batch, num_graphs, torch.long)).cpu()
    edge_ptr = cumsum(degree(batch[edges_of(data)[0]], num_graphs, torch.long)).cpu()
    graph_ptr = torch.arange(num_graphs + 1, device="cpu")
    new_batch = batch if nodes is None else batch[nodes]
    new_node_ptr = cumsum(degree(new_batch, num_graphs, torch.long))
    new_edge_ptr = cumsum(degree(new_batch[edge_index[0]], num_graphs, torch.long))

    for key, value in data.to_dict().items():
        dim = data.__cat_dim__(key, value)
        if not isinstance(value, Tensor) or value.dim() == 0 or dim is None or key == "ptr":
            continue
        rows = slices.get(key, value.size(dim))
        by_node, by_edge, by_graph = (_fits(rows, ptr) for ptr in (node_ptr, edge_ptr, graph_ptr))
        if by_edge and ("edge" in key or key == "e_id" or not (by_node or by_graph)):
            index, ptr = edges, new_edge_ptr
        elif by_node and nodes is not None:
            index, ptr = nodes, new_node_ptr
        else:
            continue
        data[key] = edge_index if key == "edge_index" else value.index_select(dim, index)
        if key in slices:
            slices[key] = ptr.cpu()
        if f"{key}_ptr" in data:  # made by a DataLoader's follow_batch
            data[f"{key}_ptr"] = ptr

    if "ptr" in data:
        data.ptr = new_node_ptr
    # Without features, PyG could only guess the number of nodes, from the edges.
    sized = "num_nodes" in data or data.x is None
    if sized:
        data.num_nodes = len(new_batch)
    # What Batch.get_example reads: where each graph's rows are, and what its node numbers are shifted by.
    if hasattr(data, "_slice_dict"):
        data._slice_dict = slices
        data._inc_dict = {**data._inc_dict, "edge_index": new_node_ptr[:-1].cpu()}
        if sized:
            data._num_nodes = new_node_ptr.diff().tolist()
    return data


def _fits(rows: Tensor | int, ptr: Tensor) -> bool:
    """Whether an attribute, given by its slices in a batch or else by its length, has the rows that `ptr` counts."""
    return torch.equal(rows, ptr) if isinstance(rows, Tensor) else rows == int(ptr[-1])
