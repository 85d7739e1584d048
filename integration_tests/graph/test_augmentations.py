"""GraphCL's augmentations on PyG's own Data, Batch and DataLoader, against their definition in plain Python."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.data.batch import Batch
from torch_geometric.data.data import Data
from torch_geometric.data.hetero_data import HeteroData
from torch_geometric.loader.dataloader import DataLoader
from torch_geometric.utils import to_scipy_sparse_matrix

from integration_tests.molecules import mutag
from undimix_pyg.augmentations import AttributeMasking, EdgePerturbation, NodeDropping, RandomWalkSubgraph

ALL = [NodeDropping, EdgePerturbation, AttributeMasking, RandomWalkSubgraph]
NODE_SUBSETS = [NodeDropping, RandomWalkSubgraph]
KINDS = [
    "random",
    "one node",
    "no edges",
    "self-loops",
    "complete",
    "nearly complete",
    "two components",
    "path",
    "one edge",
]
Augmentation = Callable[[float], Callable[[Any], Any]]

seeds = st.integers(0, 2**32 - 1)
ratios = st.one_of(st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9]), st.floats(0, 0.999))


def edge_features(i: int, j: int, directed: bool) -> list[float]:
    """Tells which edge it is; the same in both directions of an undirected one."""
    return [float(i), float(j), 1.0] if directed else [float(min(i, j)), float(max(i, j)), 0.0]


def graph(kind: str, directed: bool, featured: bool, label: int, rng: random.Random) -> Data:
    """A graph whose features say which node or edge they are of."""
    n = {"one node": 1, "one edge": 2}.get(kind, rng.randint(2, 9))
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j and (directed or i < j)]
    chosen = {
        "one node": [(0, 0)] if rng.random() < 0.5 else [],
        "no edges": [],
        "complete": pairs,
        "nearly complete": pairs[1:],
        "two components": [(i, j) for i, j in pairs if (i < n // 2) == (j < n // 2)],
        "path": [(i, i + 1) for i in range(n - 1)],
        "one edge": [(0, 1)],
        "self-loops": [pair for pair in pairs if rng.random() < 0.4] + [(i, i) for i in range(n) if i % 2 == 0],
    }.get(kind, [pair for pair in pairs if rng.random() < 0.4])
    rng.shuffle(chosen)
    edges = chosen if directed else [*chosen, *[(j, i) for i, j in chosen if i != j]]
    directed = any((j, i) not in edges for i, j in edges)  # a complete graph is undirected in any case
    data = Data(
        edge_index=torch.tensor(edges, dtype=torch.long).view(-1, 2).t().contiguous(),
        edge_attr=torch.tensor([edge_features(i, j, directed) for i, j in edges]).view(-1, 3),
        edge_weight=torch.tensor([i * 100.0 + j if directed else (i + j) * 1.0 for i, j in edges]),
        y=torch.tensor([label]),
        name=f"graph {label}",
    )
    if featured:
        data.x = torch.tensor([[i, label, 0.5] for i in range(n)])
        data.train_mask = torch.tensor([i % 3 == 0 for i in range(n)])
    data.num_nodes = n
    return data


def graphs(seed: int, count: int, featured: bool = True) -> list[Data]:
    rng = random.Random(seed)
    return [graph(rng.choice(KINDS), rng.random() < 0.4, featured, label, rng) for label in range(count)]


def edges(data: Data) -> list[tuple[int, int]]:
    assert data.edge_index is not None
    return [(int(i), int(j)) for i, j in data.edge_index.t().tolist()]


def attributed_edges(data: Data) -> Counter[Any]:
    assert data.edge_attr is not None
    assert data.edge_weight is not None
    rows = zip(edges(data), data.edge_attr.tolist(), data.edge_weight.tolist(), strict=True)
    return Counter((edge, tuple(features), weight) for edge, features, weight in rows)


def is_undirected(data: Data) -> bool:
    return all((j, i) in edges(data) for i, j in edges(data))


def units(data: Data) -> set[frozenset[int]] | set[tuple[int, int]]:
    """The edges, the two directions of an undirected one together."""
    return {frozenset(edge) for edge in edges(data)} if is_undirected(data) else set(edges(data))


def assert_same(one: Any, two: Any) -> None:
    """Equality of all that a Data or Batch holds."""
    assert type(one) is type(two)
    assert set(one.keys()) == set(two.keys())
    for key in one.keys():  # noqa: SIM118 - iterating over a Data gives pairs
        if isinstance(one[key], Tensor):
            assert one[key].dtype == two[key].dtype, key
            assert torch.equal(one[key], two[key]), key
        else:
            assert one[key] == two[key], key


def assert_well_kept(batch: Any, number: int) -> None:
    """The batch is what PyG would have built of the graphs that it gives back."""
    assert isinstance(batch, Batch)
    assert batch.num_graphs == number
    examples = batch.to_data_list()
    assert_same(batch, Batch.from_data_list(examples))
    for example in examples:
        assert example.num_nodes >= 1
        assert example.validate()


def assert_node_subset(before: Data, after: Data, ratio: float) -> list[int]:
    """`after` is the subgraph of `before` that its nodes induce, of the size asked for; returns those nodes."""
    assert before.num_nodes is not None
    assert after.num_nodes == before.num_nodes - int(ratio * before.num_nodes)
    assert after.x is not None
    assert before.x is not None
    kept = [int(i) for i in after.x[:, 0]]
    assert kept == sorted(set(kept))
    assert torch.equal(after.x, before.x[kept])
    assert torch.equal(after.train_mask, before.train_mask[kept])
    place = {node: position for position, node in enumerate(kept)}
    expected = Counter(
        {
            ((place[i], place[j]), features, weight): number
            for ((i, j), features, weight), number in attributed_edges(before).items()
            if i in place and j in place
        }
    )
    assert attributed_edges(after) == expected
    assert torch.equal(after.y, before.y)
    assert after.name == before.name
    return kept


def components(data: Data, nodes: list[int]) -> list[set[int]]:
    """The weakly connected components of what `nodes` induce."""
    adjacency = to_scipy_sparse_matrix(data.edge_index, num_nodes=data.num_nodes).tocsr()[nodes][:, nodes]
    number, label = connected_components(adjacency, directed=True, connection="weak")
    return [{node for node, own in zip(nodes, label, strict=True) if own == c} for c in range(number)]


def assert_walk(before: Data, kept: list[int]) -> None:
    """Whole components are visited one after another, and the last, perhaps in part, without a gap."""
    assert before.num_nodes is not None
    whole = components(before, list(range(before.num_nodes)))
    parts = components(before, kept)
    assert len(parts) == sum(bool(component & set(kept)) for component in whole)
    assert sum(part not in whole for part in parts) <= 1


@settings(deadline=None, max_examples=60)
@given(seed=seeds, count=st.integers(1, 8), ratio=ratios)
@pytest.mark.parametrize("augmentation", NODE_SUBSETS)
def test_node_subsets_are_the_induced_subgraphs_of_the_size_asked_for(
    augmentation: Augmentation, seed: int, count: int, ratio: float
) -> None:
    before = graphs(seed, count)
    torch.manual_seed(seed)
    after = augmentation(ratio)(Batch.from_data_list(before))
    assert_well_kept(after, count)
    for i in range(count):
        kept = assert_node_subset(before[i], after.get_example(i), ratio)
        if augmentation is RandomWalkSubgraph:
            assert_walk(before[i], kept)
        kept = assert_node_subset(before[i], augmentation(ratio)(before[i]), ratio)
        if augmentation is RandomWalkSubgraph:
            assert_walk(before[i], kept)


def assert_perturbed(before: Data, after: Data, ratio: float) -> None:
    assert before.num_nodes is not None
    n = before.num_nodes
    assert torch.equal(after.x, before.x)
    assert torch.equal(after.y, before.y)
    # Remaining edges come first, as they were; new ones are no old ones, no self-loops and among themselves distinct.
    old = edges(before)
    remaining = [edge for edge in edges(after) if edge in old]
    new = edges(after)[len(remaining) :]
    assert edges(after)[: len(remaining)] == remaining == [edge for edge in old if edge in remaining]
    assert not set(new) & set(old)
    assert all(i != j for i, j in new)
    assert len(set(new)) == len(new)
    # As many go as the ratio says, and as many come, as far as there is room.
    undirected = is_undirected(before)
    room = n * (n - 1) - sum(i != j for i, j in old)
    exchanged = int(ratio * len(units(before)))
    added = min(exchanged, room // 2 if undirected else room)
    kept_units = {frozenset(edge) for edge in remaining} if undirected else set(remaining)
    assert len(kept_units) == len(units(before)) - exchanged
    assert len(new) == (2 * added if undirected else added)
    # Attributes: old edges keep theirs, new ones have those of an edge of the graph, the same in both directions.
    assert attributed_edges(after) - Counter(
        {key: 1 for key in attributed_edges(after) if key[0] in new}
    ) <= attributed_edges(before)
    attributes = {key[1:] for key in attributed_edges(before)}
    assert {key[1:] for key in attributed_edges(after)} <= attributes
    if undirected:
        assert after.is_undirected()
        assert torch.equal(*(after.edge_weight[order] for order in both_directions(after)))


def both_directions(data: Data) -> tuple[Tensor, Tensor]:
    """Orders that put each edge and its reverse at the same place."""
    place = {edge: position for position, edge in enumerate(edges(data))}
    return torch.arange(len(place)), torch.tensor([place[j, i] for i, j in edges(data)], dtype=torch.long)


@settings(deadline=None, max_examples=100)
@given(seed=seeds, count=st.integers(1, 8), ratio=ratios)
def test_perturbation_exchanges_edges_within_each_graph(seed: int, count: int, ratio: float) -> None:
    before = graphs(seed, count)
    torch.manual_seed(seed)
    after = EdgePerturbation(ratio)(Batch.from_data_list(before))
    assert_well_kept(after, count)
    for i in range(count):
        assert_perturbed(before[i], after.get_example(i), ratio)
        assert_perturbed(before[i], EdgePerturbation(ratio)(before[i]), ratio)


@settings(deadline=None, max_examples=60)
@given(seed=seeds, count=st.integers(1, 8), ratio=ratios, whole=st.booleans())
def test_masking_fills_in_the_mean_of_the_graph(seed: int, count: int, ratio: float, whole: bool) -> None:
    before = graphs(seed, count)
    for data in before:
        assert data.x is not None
        data.x = (1 + data.x * data.x * 10).long() if whole else 1 + data.x * data.x
    torch.manual_seed(seed)
    after = AttributeMasking(ratio)(Batch.from_data_list(before))
    assert_well_kept(after, count)
    for old, new in zip(before, after.to_data_list(), strict=True):
        changed = (old.x != new.x).any(dim=1)
        mean = old.x.double().mean(dim=0).to(old.x.dtype)
        # A row may be the mean already, so that masking it changes nothing.
        already = (old.x == mean).all(dim=1)
        masked = int(ratio * old.num_nodes)
        assert masked - int(already.sum()) <= int(changed.sum()) <= masked
        torch.testing.assert_close(new.x[changed], mean.expand(int(changed.sum()), 3))
        new.x = old.x
        assert_same(new, old)


@settings(deadline=None, max_examples=40)
@given(seed=seeds, count=st.integers(1, 6), ratio=ratios)
@pytest.mark.parametrize("augmentation", ALL)
def test_without_features(augmentation: Augmentation, seed: int, count: int, ratio: float) -> None:
    before = graphs(seed, count, featured=False)
    after = augmentation(ratio)(Batch.from_data_list(before))
    assert_well_kept(after, count)
    assert after.x is None
    single = augmentation(ratio)(before[0])
    for old, new in [*zip(before, after.to_data_list(), strict=True), (before[0], single)]:
        assert torch.equal(new.y, old.y)
        dropped = int(ratio * old.num_nodes) if augmentation in NODE_SUBSETS else 0
        assert new.num_nodes == old.num_nodes - dropped
        assert is_undirected(new) or not is_undirected(old)


@settings(deadline=None, max_examples=25)
@given(seed=seeds, count=st.integers(1, 6), ratio=ratios, featured=st.booleans())
@pytest.mark.parametrize("augmentation", ALL)
def test_input_stays_and_seed_reproduces(
    augmentation: Augmentation, seed: int, count: int, ratio: float, featured: bool
) -> None:
    batch = Batch.from_data_list(graphs(seed, count, featured))
    untouched = copy.deepcopy(batch)
    torch.manual_seed(seed)
    first = augmentation(ratio)(batch)
    assert_same(batch, untouched)
    for one, two in zip(batch.to_data_list(), untouched.to_data_list(), strict=True):
        assert_same(one, two)
    torch.manual_seed(seed)
    assert_same(augmentation(ratio)(batch), first)


@settings(deadline=None, max_examples=25)
@given(seed=seeds, count=st.integers(1, 6), featured=st.booleans())
@pytest.mark.parametrize("augmentation", ALL)
def test_ratio_0_changes_nothing(augmentation: Augmentation, seed: int, count: int, featured: bool) -> None:
    before = graphs(seed, count, featured)
    batch = Batch.from_data_list(before)
    assert_same(augmentation(0.0)(batch), batch)
    assert_same(augmentation(0.0)(before[0]), before[0])


@pytest.mark.parametrize("augmentation", ALL)
def test_different_draws_differ(augmentation: Augmentation) -> None:
    batch = Batch.from_data_list(mutag()[:32])
    one, two = augmentation(0.2)(batch), augmentation(0.2)(batch)
    assert not (torch.equal(one.x, two.x) and torch.equal(one.edge_index, two.edge_index))


def test_means_of_half_precision_features() -> None:
    # Their sum, 200,000, has no float16.
    data = Data(x=torch.full((2000, 1), 100, dtype=torch.float16))
    assert torch.equal(AttributeMasking(0.5)(data).x, data.x)


def frequencies(augmentation: Any, data: Data, read: Callable[[Data], Iterator[Any]]) -> dict[Any, float]:
    """How often each outcome occurs in 10,000 copies of a graph, all in one batch."""
    copies = 10_000
    torch.manual_seed(0)
    after = augmentation(Batch.from_data_list([data] * copies))
    counts = Counter(outcome for example in after.to_data_list() for outcome in read(example))
    return {outcome: number / copies for outcome, number in counts.items()}


def assert_frequencies(observed: dict[Any, float], expected: dict[Any, float]) -> None:
    # Five standard deviations of a frequency among 10,000.
    assert set(observed) == set(expected)
    for outcome, probability in expected.items():
        deviation = (probability * (1 - probability) / 10_000) ** 0.5
        assert abs(observed[outcome] - probability) <= 5 * deviation, outcome


def walk_probabilities(neighbours: dict[int, list[int]], size: int) -> dict[tuple[int, ...], float]:
    """Of each set that the walk of RandomWalkSubgraph's definition can visit, by going through all walks."""
    states = {(node,): Fraction(1, len(neighbours)) for node in neighbours}
    for _ in range(size - 1):
        following: dict[tuple[int, ...], Fraction] = {}
        for visited, probability in states.items():
            steps = [j for i in visited for j in neighbours[i] if j not in visited]
            steps = steps or [j for j in neighbours if j not in visited]
            for j in steps:
                key = tuple(sorted([*visited, j]))
                following[key] = following.get(key, Fraction(0)) + probability / len(steps)
        states = following
    return {visited: float(probability) for visited, probability in states.items()}


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_walks_have_the_probabilities_of_their_definition(directed: bool, size: int) -> None:
    # A triangle with a tail, and a pair by itself, so that some walks restart.
    pairs = [(0, 1), (1, 2), (0, 2), (2, 3), (4, 5)]
    rows = pairs if directed else [*pairs, *[(j, i) for i, j in pairs]]
    data = Data(x=torch.arange(6.0)[:, None], edge_index=torch.tensor(rows).t().contiguous())
    neighbours: dict[int, list[int]] = {i: [] for i in range(6)}
    for i, j in pairs:
        neighbours[i].append(j)
        neighbours[j].append(i)
    observed = frequencies(RandomWalkSubgraph((6 - size) / 6), data, lambda d: iter([tuple(d.x[:, 0].int().tolist())]))
    assert_frequencies(observed, walk_probabilities(neighbours, size))


def test_every_node_is_as_likely_to_be_dropped_or_masked() -> None:
    data = Data(x=torch.arange(1.0, 6)[:, None], edge_index=torch.tensor([[0, 1], [1, 0]]))
    kept = frequencies(NodeDropping(0.4), data, lambda d: iter(d.x[:, 0].tolist()))
    assert_frequencies(kept, dict.fromkeys([1.0, 2.0, 3.0, 4.0, 5.0], 0.6))
    data.x = torch.tensor([1.0, 2.0, 3.0, 4.0, 6.0])[:, None]
    masked = frequencies(AttributeMasking(0.4), data, lambda d: iter((d.x[:, 0] == 3.2).nonzero().view(-1).tolist()))
    assert_frequencies(masked, dict.fromkeys(range(5), 0.4))


@pytest.mark.parametrize("directed", [False, True])
def test_every_edge_is_as_likely_to_go_and_every_other_pair_to_come(directed: bool) -> None:
    pairs = [(0, 1), (1, 2), (2, 3), (3, 4), (0, 2)]
    rows = pairs if directed else [*pairs, *[(j, i) for i, j in pairs]]
    data = Data(num_nodes=5, edge_index=torch.tensor(rows).t().contiguous())
    others = [(i, j) for i in range(5) for j in range(5) if i != j and (i, j) not in rows]
    observed = frequencies(EdgePerturbation(0.4), data, lambda d: iter(edges(d)))
    added = 2 / len(others) if directed else 4 / len(others)
    assert_frequencies(observed, {**dict.fromkeys(rows, 0.6), **dict.fromkeys(others, added)})


@pytest.mark.parametrize("augmentation", ALL)
@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, float("nan"), float("inf"), "0.2", None])
def test_bad_ratios(augmentation: Any, ratio: Any) -> None:
    with pytest.raises(ValueError, match=r"^ratio: expected a finite number at least 0 and below 1, got "):
        augmentation(ratio)


@pytest.mark.parametrize("augmentation", NODE_SUBSETS)
def test_a_ratio_just_below_1_leaves_a_node(augmentation: Augmentation) -> None:
    sizes = range(1, 40)
    graphs_of_sizes = [Data(x=torch.ones(n, 1), edge_index=torch.empty(2, 0, dtype=torch.long)) for n in sizes]
    after = augmentation(1 - 2**-53)(Batch.from_data_list(graphs_of_sizes))
    assert [data.num_nodes for data in after.to_data_list()] == [1] * 39


@pytest.mark.parametrize("augmentation", ALL)
def test_repr(augmentation: Any) -> None:
    assert repr(augmentation()) == f"{augmentation.__name__}(ratio=0.2)"


@pytest.mark.parametrize("augmentation", ALL)
def test_what_is_no_graph_in_edge_index(augmentation: Augmentation) -> None:
    with pytest.raises(ValueError, match=r"^data: expected a Data or a Batch of them, got HeteroData$"):
        augmentation(0.2)(HeteroData())
    with pytest.raises(ValueError, match=r"^data: .* got a sparse adj_t$"):
        augmentation(0.2)(Data(x=torch.eye(3), adj_t=torch.eye(3).to_sparse()))
    with pytest.raises(
        ValueError, match=r"^data.batch: expected graph numbers in ascending order, got \[1, 0\] at node 1$"
    ):
        augmentation(0.2)(Data(x=torch.eye(3), batch=torch.tensor([0, 1, 0])))
    none = torch.empty(0, dtype=torch.long)
    assert augmentation(0.2)(Data(x=torch.empty(0, 2), edge_index=none.view(2, 0), batch=none)).num_nodes == 0


@pytest.mark.parametrize("augmentation", ALL)
def test_no_edge_index_at_all(augmentation: Augmentation) -> None:
    after = augmentation(0.5)(Data(x=torch.eye(4)))
    assert after.num_nodes == (2 if augmentation in NODE_SUBSETS else 4)
    assert after.edge_index is None
    batch = augmentation(0.5)(Batch.from_data_list([Data(x=torch.eye(4)), Data(x=torch.ones(1, 4))]))
    assert_well_kept(batch, 2)


@pytest.mark.parametrize("augmentation", ALL)
def test_graph_labels_stay_where_their_number_is_that_of_edges(augmentation: Augmentation) -> None:
    # PyG's own Data.subgraph takes these labels to be edge-level, and drops them with the edges.
    one_edge = [Data(x=torch.eye(2), edge_index=torch.tensor([[0], [1]]), y=torch.tensor([i])) for i in range(5)]
    uneven = [
        Data(x=torch.eye(2), edge_index=torch.tensor([[0, 1], [1, 0]]), y=torch.tensor([0])),
        Data(x=torch.ones(3, 2), edge_index=torch.empty(2, 0, dtype=torch.long), y=torch.tensor([1])),
    ]
    for data in (one_edge, uneven):
        after = augmentation(0.5)(Batch.from_data_list(data))
        assert after.y.tolist() == [int(d.y) for d in data]
        assert_well_kept(after, len(data))
    assert augmentation(0.5)(one_edge[3]).y.tolist() == [3]


@pytest.mark.parametrize("augmentation", ALL)
def test_attributes_named_for_edges_follow_them_where_nodes_are_as_many(augmentation: Augmentation) -> None:
    n = 6
    ring = Data(
        x=torch.arange(n)[:, None],
        edge_index=torch.stack([torch.arange(n), (torch.arange(n) + 1) % n]),
        edge_source=torch.arange(n),
        e_id=torch.arange(n),
        number=torch.arange(n),
        y=torch.tensor([1]),
    )
    after = augmentation(0.5)(Batch.from_data_list([ring, ring]))
    assert_well_kept(after, 2)
    for example in after.to_data_list():
        if augmentation is not AttributeMasking:
            assert torch.equal(example.number, example.x[:, 0])
        assert torch.equal(example.edge_source, example.e_id)
        for i, j, source in zip(*example.edge_index, example.edge_source, strict=True):
            if (example.number[j] - example.number[i]) % n == 1:  # one of the old edges
                assert source == example.number[i]


@pytest.mark.parametrize("augmentation", ALL)
def test_other_attributes_with_node_numbers_keep_the_old_ones(augmentation: Augmentation) -> None:
    before = graphs(1, 4)
    for data in before:
        data.root_index = torch.tensor([data.num_nodes - 1])  # PyG shifts what has "index" in its name
    after = augmentation(0.5)(Batch.from_data_list(before))
    assert [int(d.root_index) for d in after.to_data_list()] == [int(d.root_index) for d in before]


@pytest.mark.parametrize("augmentation", ALL)
def test_follow_batch(augmentation: Augmentation) -> None:
    loader = DataLoader(graphs(2, 6), batch_size=6, follow_batch=["x", "edge_attr", "edge_index", "y"])
    after = augmentation(0.5)(next(iter(loader)))
    expected = Batch.from_data_list(after.to_data_list(), follow_batch=["x", "edge_attr", "edge_index", "y"])
    assert_same(after, expected)


@pytest.mark.parametrize("augmentation", ALL)
def test_edge_index_with_metadata(augmentation: Augmentation) -> None:
    def ring(n: int) -> Data:
        rows = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
        index = EdgeIndex(rows, sparse_size=(n, n), sort_order="row")
        return Data(x=torch.arange(float(n))[:, None], edge_index=index)

    after = augmentation(0.5)(Batch.from_data_list([ring(5), ring(4)]))
    for example in after.to_data_list():
        assert example.validate()
    if augmentation is not AttributeMasking:
        assert not isinstance(after.edge_index, EdgeIndex)  # its metadata would be wrong
        assert_well_kept(after, 2)


@pytest.mark.parametrize("augmentation", ALL)
def test_a_data_with_a_batch_vector(augmentation: Augmentation) -> None:
    before = graphs(3, 5)
    batch = Batch.from_data_list(before)
    data = Data(x=batch.x, edge_index=batch.edge_index, edge_attr=batch.edge_attr, batch=batch.batch, y=batch.y)
    torch.manual_seed(0)
    after = augmentation(0.5)(data)
    torch.manual_seed(0)
    expected = augmentation(0.5)(batch)
    for key in ("x", "edge_index", "edge_attr", "batch", "y"):
        assert torch.equal(after[key], expected[key])


@pytest.mark.parametrize("augmentation", ALL)
def test_a_graph_of_no_nodes_harms_no_other(augmentation: Augmentation) -> None:
    empty = Data(x=torch.empty(0, 2), edge_index=torch.empty(2, 0, dtype=torch.long), edge_attr=torch.empty(0, 1))
    path = Data(x=torch.eye(2), edge_index=torch.tensor([[0, 1], [1, 0]]), edge_attr=torch.ones(2, 1))
    after = augmentation(0.5)(Batch.from_data_list([empty, path, empty]))
    assert after.num_graphs == 3
    assert after.get_example(0).num_nodes == after.get_example(2).num_nodes == 0
    assert after.get_example(1).num_nodes == (1 if augmentation in NODE_SUBSETS else 2)


@pytest.mark.parametrize("augmentation", ALL)
def test_all_tensors_are_made_on_the_device_of_the_data(augmentation: Augmentation) -> None:
    # What is made on the default device instead cannot be used together with the data.
    batch = Batch.from_data_list(graphs(4, 8))
    single = graphs(4, 1)[0]
    with torch.device("meta"):
        after = augmentation(0.5)(batch)
        augmentation(0.5)(single)
    assert all(after[key].device.type == "cpu" for key in ("x", "edge_index", "edge_attr", "batch", "ptr"))
    assert_well_kept(after, 8)


@pytest.mark.parametrize("augmentation", ALL)
def test_gradients_flow_back_to_features(augmentation: Augmentation) -> None:
    batch = Batch.from_data_list(graphs(5, 8))
    batch.x.requires_grad_()
    augmentation(0.5)(batch).x.sum().backward()
    assert batch.x.grad is not None
    assert batch.x.grad.abs().sum() > 0


@pytest.mark.parametrize("augmentation", ALL)
def test_mutag_through_the_loader(augmentation: Augmentation) -> None:
    dataset = mutag()
    assert (len(dataset), dataset.num_node_features, dataset.num_edge_features, dataset.num_classes) == (188, 7, 4, 2)
    labels = []
    for batch in DataLoader(dataset, batch_size=64):
        torch.manual_seed(0)
        after = augmentation(0.2)(batch)
        assert_well_kept(after, batch.num_graphs)
        assert torch.equal(after.batch[after.edge_index[0]], after.batch[after.edge_index[1]])
        labels.append(after.y)
        for old, new in zip(batch.to_data_list(), after.to_data_list(), strict=True):
            assert new.is_undirected()
            if augmentation in NODE_SUBSETS:
                assert new.num_nodes == old.num_nodes - int(0.2 * old.num_nodes)
            else:
                assert new.num_nodes == old.num_nodes
                assert new.num_edges == old.num_edges  # molecules are sparse enough for all new edges
            if augmentation is RandomWalkSubgraph:
                assert len(components(new, list(range(new.num_nodes)))) == 1  # as all of MUTAG's molecules are
    assert torch.equal(torch.cat(labels), dataset.y)
    # The transform of a dataset gives single graphs, which the loader then puts together.
    dataset.transform = augmentation(0.2)
    for batch in DataLoader(dataset, batch_size=64):
        assert_well_kept(batch, batch.num_graphs)
