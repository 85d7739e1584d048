"""GraphCL's, GRACE's and InfoGraph's losses against slow loops: plain as in the papers, weighted, with labels."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from torch_geometric.datasets import KarateClub
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCN, GIN

from integration_tests.molecules import mutag
from tests import references
from tests.contrasts import Case, random_rows
from undimix_plugins import HCL, UnDiMix, Uniform, Weighting, undimix
from undimix_pyg import GRACE, GRACELoss, GraphCL, GraphCLLoss, InfoGraph, InfoGraphLoss

WIDTH = 6
LOSSES: dict[str, type[Any]] = {"GraphCL": GraphCLLoss, "GRACE": GRACELoss, "InfoGraph": InfoGraphLoss}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


# --- plain, from the papers


def grace_objective(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """arXiv 2006.04131, equations 1 and 2, a node at a time."""
    losses = []
    for u, v in ((z1, z2), (z2, z1)):
        for i in range(len(u)):
            between = (cosine_similarity(u[i], v, dim=1) / temperature).exp()
            within = (cosine_similarity(u[i], u, dim=1) / temperature).exp()
            others = [k for k in range(len(u)) if k != i]
            losses.append(-(between[i] / (between[i] + between[others].sum() + within[others].sum())).log())
    return torch.stack(losses).sum() / (2 * len(z1))


def infograph_objective(graphs: Tensor, nodes: Tensor, batch: Tensor, temperature: float) -> Tensor:
    """A graph's mean cross-entropy of each of its nodes among all nodes of the batch."""
    losses = []
    for g in range(len(graphs)):
        similar = cosine_similarity(graphs[g], nodes, dim=1) / temperature
        each = [cross_entropy(similar, torch.tensor(u)) for u in range(len(nodes)) if batch[u] == g]
        losses.append(sum(each, torch.zeros_like(similar[0])) / max(1, len(each)))
    return torch.stack(losses).mean()


def batch_of(graphs: int) -> Tensor:
    """Graphs of 1, 2, 3, 1, 2, 3, ... nodes, in no order; the third has none."""
    sizes = torch.tensor([i % 3 + 1 if i != 2 else 0 for i in range(graphs)])
    batch = torch.arange(graphs).repeat_interleave(sizes)
    return batch[torch.randperm(len(batch), generator=torch.Generator().manual_seed(graphs))]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 17])
@pytest.mark.parametrize("method", ["GRACE", "InfoGraph"])
def test_uniform_is_the_papers_objective(method: str, count: int, dtype: torch.dtype, tolerance: float) -> None:
    rows = [random_rows(count, WIDTH, seed=0, unit=False, dtype=dtype).requires_grad_()]
    if method == "GRACE":
        rows.append(random_rows(count, WIDTH, seed=1, unit=False, dtype=dtype).requires_grad_())
        values = GRACELoss(0.4, Uniform())(*rows), grace_objective(*rows, 0.4)
    else:
        batch = batch_of(count)
        rows.append(random_rows(len(batch), WIDTH, seed=1, unit=False, dtype=dtype).requires_grad_())
        values = InfoGraphLoss(0.4, Uniform())(*rows, batch), infograph_objective(*rows, batch, 0.4)
    torch.testing.assert_close(*values, rtol=0, atol=tolerance)
    gradients = [torch.autograd.grad(value, rows) for value in values]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


# --- weighted, and with labels


class Spelt(NamedTuple):
    """What a loss is given, and the contrast that it stands for."""

    given: list[Tensor]
    case: Case
    positives: list[list[int]]  # of each anchor, in the pool
    in_denominator: bool


def marked(labels: list[int], of_pool: list[int], positives: list[list[int]]) -> list[list[int]]:
    """What is no negative of an anchor: its positives, and what has its label."""
    return [
        [j for j in range(len(of_pool)) if j in positives[i] or of_pool[j] == labels[i]] for i in range(len(labels))
    ]


def graphcl(labels: list[int]) -> Spelt:
    n = len(labels)
    given = [random_rows(n, WIDTH, seed=seed, unit=False).requires_grad_() for seed in range(2)]
    first, second = (normalize(z, dim=1) for z in given)
    positives = [[i] for i in range(n)]
    case = Case(first, second, second, 0.3, [-1] * n, marked(labels, labels, positives), True)
    return Spelt(given, case, positives, in_denominator=False)


def grace(labels: list[int]) -> Spelt:
    n = len(labels)
    given = [random_rows(n, WIDTH, seed=seed, unit=False).requires_grad_() for seed in range(2)]
    views = normalize(torch.cat(given), dim=1)
    positives = [[(i + n) % (2 * n)] for i in range(2 * n)]
    case = Case(
        views,
        views[[i for [i] in positives]],
        views,
        0.3,
        list(range(2 * n)),
        marked(labels * 2, labels * 2, positives),
        True,
    )
    return Spelt(given, case, positives, in_denominator=True)


def infograph(labels: list[int]) -> Spelt:
    n, batch = len(labels), batch_of(len(labels))
    given = [random_rows(rows, WIDTH, seed=rows, unit=False).requires_grad_() for rows in (n, len(batch))]
    graphs, nodes = (normalize(rows, dim=1) for rows in given)
    of = batch.tolist()
    positives = [[j for j in range(len(of)) if of[j] == i] for i in range(n)]
    case = Case(
        graphs, graphs, nodes, 0.3, [-1] * n, marked(labels, [labels[g] for g in of], positives), positives_in_pool=True
    )
    return Spelt([*given, batch], case, positives, in_denominator=True)


SPELT: dict[str, Callable[[list[int]], Spelt]] = {"GraphCL": graphcl, "GRACE": grace, "InfoGraph": infograph}


def loop(spelt: Spelt, weights: Any) -> Tensor:
    """The loss an anchor at a time; one without negatives or positives adds nothing of them."""
    case, losses = spelt.case, []
    for i, mine in enumerate(spelt.positives):
        similar = (case.anchors[i] @ case.pool.T / case.temperature).exp()
        nothing = 0 * similar.sum()
        total = sum((weights[i, j] * similar[j] for j in case.negatives(i)), nothing)
        if spelt.in_denominator:
            total = total + sum(similar[j] for j in mine)
        elif not case.negatives(i):
            mine = []
        losses.append(sum(((total / similar[j]).log() for j in mine), nothing) / max(1, len(mine)))
    return torch.stack(losses).mean()


def assert_equal(loss: nn.Module, spelt: Spelt, weights: Any, *labels: Tensor) -> None:
    values = loss(*spelt.given, *labels), loop(spelt, weights)
    torch.testing.assert_close(*values, rtol=0, atol=1e-10)
    rows = [given for given in spelt.given if given.is_floating_point()]
    for one, other in zip(*(torch.autograd.grad(value, rows) for value in values), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


WEIGHTINGS = [
    UnDiMix(),
    UnDiMix(detached=True),
    UnDiMix(mixing="linear"),
    UnDiMix(similarity=0, diversity=0, hardness=2.0),
]


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
@pytest.mark.parametrize("method", LOSSES)
def test_undimix_is_the_slow_reference(method: str, weighting: UnDiMix) -> None:
    spelt = SPELT[method]([0, 1, 2, 3, 4, 5, 6])
    weights = references.weights_of(spelt.case, weighting)
    assert_equal(LOSSES[method](0.3, weighting), spelt, weights)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
@pytest.mark.parametrize("method", LOSSES)
def test_one_row_has_no_negatives_to_weight(method: str, weighting: UnDiMix) -> None:
    spelt = SPELT[method]([0])
    assert_equal(LOSSES[method](0.3, weighting), spelt, torch.full((2, 2), torch.nan))
    if method != "InfoGraph":
        assert LOSSES[method](0.3, weighting)(*spelt.given).item() == 0


@pytest.mark.parametrize("weighting", [Uniform(), UnDiMix()], ids=repr)
@pytest.mark.parametrize("labels", [[0, 1, 0, 2, 1, 0, 3], [5] * 7, [0, 0, 0, 0, 0, 0, 1]], ids=str)
@pytest.mark.parametrize("method", LOSSES)
def test_rows_of_one_label_are_no_negatives(method: str, labels: list[int], weighting: Weighting) -> None:
    spelt = SPELT[method](labels)
    weights: Any = torch.ones(len(spelt.case.anchors), len(spelt.case.pool), dtype=torch.float64)
    if isinstance(weighting, UnDiMix):
        weights = references.weights_of(spelt.case, weighting)
    assert_equal(LOSSES[method](0.3, weighting), spelt, weights, torch.tensor(labels))


@pytest.mark.parametrize("method", LOSSES)
def test_labels_that_differ_change_nothing(method: str) -> None:
    given = SPELT[method]([0, 1, 2, 3, 4]).given
    loss = LOSSES[method]()
    torch.testing.assert_close(loss(*given, torch.arange(5)), loss(*given), rtol=1e-12, atol=1e-12)
    assert not torch.equal(loss(*given, torch.tensor([0, 0, 1, 2, 3])), loss(*given))


# --- gradients at the last layer's weight


def gradient_at_weight(layer: nn.Linear, inputs: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    """Of a row's pseudo-labelling task, by autograd through the normalisation of the layer's output."""
    logits = candidates.detach() @ normalize(layer(inputs), dim=0) / temperature
    loss = cross_entropy(logits[None], logits.argmax()[None])
    return torch.autograd.grad(loss, layer.weight)[0].flatten()


def weights_of_influence(spelt: Spelt, layer: nn.Linear, inputs: Tensor, pool_inputs: Tensor) -> Tensor:
    """`UnDiMix(similarity=0, diversity=0)` with the influence at the weight of a real layer, a pair at a time."""
    case, method = spelt.case, UnDiMix(similarity=0, diversity=0)
    n, m = len(case.anchors), len(case.pool)
    of_anchors, of_pool = [], []
    for i in range(n):
        candidates = case.pool[[j for j in range(m) if j != case.own_columns[i]]]
        of_anchors.append(gradient_at_weight(layer, inputs[i], candidates, case.temperature))
    for j in range(m):
        candidates = case.anchors[[i for i in range(n) if case.own_columns[i] != j]]
        of_pool.append(gradient_at_weight(layer, pool_inputs[j], candidates, case.temperature))
    weights = torch.zeros(n, m, dtype=torch.float64)
    for i in range(n):
        negatives = case.negatives(i)
        scores = references.standardised([(of_anchors[i] @ of_pool[j]).item() for j in negatives])
        mixed = (method.hardness * method.influence * torch.tensor(scores, dtype=torch.float64)).exp()
        weights[i, negatives] = mixed / mixed.mean()
    return weights


def model_and_data(method: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    if method == "GRACE":
        model, data = GRACE(GCN(34, 8, num_layers=2), 8), KarateClub()[0]
    else:
        model, data = GraphCL(GIN(7, 8, num_layers=2), 8, 5), next(iter(DataLoader(mutag(), batch_size=12)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # the projections of an untrained model are all but one point
    return model.double(), data.update({"x": data.x.double()})


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("method", ["GraphCL", "GRACE"])
def test_influence_at_the_weight_is_that_of_autograd(method: str, labelled: bool) -> None:
    model, data = model_and_data(method)
    layer, inputs = model.head[-1], []
    layer.register_forward_hook(lambda layer, given, output: inputs.append(given[0].detach()))
    method_of = {"similarity": 0, "diversity": 0}
    loss = undimix(LOSSES[method](0.3, Uniform()), last_layer=layer, **method_of)
    assert loss.weighting == UnDiMix(**method_of, gradient="weight")
    z1, z2 = model(data)
    labels = data.y.tolist() if labelled else list(range(len(z1)))
    got = loss(z1, z2, *([data.y] if labelled else []))

    spelt = SPELT[method](labels)
    first, second = (normalize(z, dim=1) for z in (z1, z2))
    if method == "GRACE":
        views = torch.cat([first, second])
        spelt = spelt._replace(case=spelt.case._replace(anchors=views, pool=views))
        weights = weights_of_influence(spelt, layer, torch.cat(inputs), torch.cat(inputs))
    else:
        spelt = spelt._replace(case=spelt.case._replace(anchors=first, pool=second))
        weights = weights_of_influence(spelt, layer, *inputs)
    want = loop(spelt, weights)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    gradients = [torch.autograd.grad(value, layer.weight, retain_graph=True)[0] for value in (got, want)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)
    at_embedding = LOSSES[method](0.3, UnDiMix(**method_of))(z1, z2, *([data.y] if labelled else []))
    assert abs(got.item() - at_embedding.item()) > 1e-7


def test_last_layers_that_are_none() -> None:
    for loss in (GraphCLLoss(), GRACELoss()):
        with pytest.raises(TypeError, match=r"^last_layer: expected the nn\.Linear .* got Sequential"):
            undimix(loss, last_layer=GRACE(GCN(34, 8, num_layers=2), 8).head)
    with pytest.raises(ValueError, match=r"^last_layer: expected none with InfoGraphLoss, .*use gradient='embedding'$"):
        undimix(InfoGraphLoss(), last_layer=nn.Linear(8, 8))


# --- objects, precision, bad input


@pytest.mark.parametrize("method", LOSSES)
@pytest.mark.parametrize("weighting", [Uniform(), UnDiMix(mixing="linear"), HCL()], ids=repr)
def test_copies_and_states(method: str, weighting: Weighting) -> None:
    given = SPELT[method]([0, 1, 2, 3, 4]).given
    loss = LOSSES[method](0.7, weighting)
    assert repr(loss) == f"{method}Loss(temperature=0.7, weighting={weighting})"
    assert loss.state_dict() == {}
    loss.load_state_dict({}, strict=True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        loss.load_state_dict({"temperature": torch.tensor(0.7)}, strict=True)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(other) == repr(loss)
        assert torch.equal(other(*given), loss(*given))


@pytest.mark.parametrize("method", ["GraphCL", "GRACE"])
def test_copies_and_states_with_a_last_layer(method: str) -> None:
    model, data = model_and_data(method)
    loss = undimix(LOSSES[method](), last_layer=model.head[-1])
    assert loss.state_dict() == {}
    for make in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
        other, its_loss = make((model, loss))  # together, as the layer is one of the model
        values = []
        for one, criterion in ((model, loss), (other, its_loss)):
            torch.manual_seed(1)
            values.append(criterion(*one(data)))
        assert torch.equal(*values)


@pytest.mark.parametrize("method", ["GraphCL", "GRACE", "InfoGraph"])
def test_autocast_in_bfloat16(method: str) -> None:
    """The model works in half precision, the loss on what comes of it does not."""
    torch.manual_seed(0)
    batch = next(iter(DataLoader(mutag(), batch_size=12)))
    models = {"GraphCL": GraphCL, "GRACE": GRACE, "InfoGraph": InfoGraph}
    model, loss = models[method](GIN(7, 8, num_layers=2), 8), LOSSES[method](0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = model(batch)
        assert rows[0].dtype == rows[1].dtype == torch.bfloat16
        got = loss(*rows)
    got.backward()
    assert got.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    single = [part.float() if part.is_floating_point() else part for part in rows]
    assert torch.equal(got, loss(*single))


@pytest.mark.parametrize("method", ["GraphCL", "GRACE"])
def test_autocast_with_a_last_layer(method: str) -> None:
    model, data = model_and_data(method)
    model, data = model.float(), data.update({"x": data.x.float()})
    loss = undimix(LOSSES[method](0.3), last_layer=model.head[-1])
    torch.manual_seed(1)
    want = loss(*model(data))
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(*model(data))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)  # bfloat16 has 8 bits


@each_loss
def test_bad_settings(loss: type[Any]) -> None:
    for temperature in (0, -1.0, float("nan"), "0.5", None):
        with pytest.raises(ValueError, match=r"^temperature: expected a finite number above 0, got"):
            loss(temperature)
    with pytest.raises(TypeError, match=r"^weighting: expected an instance of Weighting such as UnDiMix"):
        loss(weighting="UnDiMix")


@pytest.mark.parametrize("method", LOSSES)
@pytest.mark.parametrize(
    ("labels", "came"),
    [(torch.arange(4), r"\[4\]"), (torch.arange(6), r"\[6\]"), (torch.zeros(5, 1), r"\[5, 1\]"), ([0] * 5, "list")],
)
def test_bad_labels(method: str, labels: Any, came: str) -> None:
    given = SPELT[method]([0, 1, 2, 3, 4]).given
    row = "node" if method == "GRACE" else "graph"
    with pytest.raises(ValueError, match=rf"^labels: expected one for each {row}, of shape \[5\], got {came}$"):
        LOSSES[method]()(*given, labels)


def test_labels_on_another_device() -> None:
    z = torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"^labels: expected device cpu, as the embeddings have, got meta$"):
        GRACELoss()(z, z, torch.zeros(4, device="meta"))


def test_bad_projections() -> None:
    good = torch.randn(4, 8)
    for z2, message in [
        (torch.randn(4, 9), r"^z2: expected width 8, as z1 has"),
        (torch.randn(3, 8), r"^z2: expected 4 rows, as z1 has, got 3"),
        (torch.full((4, 8), torch.nan), r"^z2: expected finite embeddings, got a non-finite value in row 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            GRACELoss()(good, z2)


@pytest.mark.parametrize(
    ("nodes", "batch", "message"),
    [
        (torch.randn(3, 7), torch.tensor([0, 0, 1]), r"^nodes: expected width 8, as graphs has"),
        (torch.full((3, 8), torch.inf), torch.tensor([0, 0, 1]), r"^nodes: expected finite embeddings"),
        (torch.randn(3, 8), torch.tensor([0, 1]), r"^batch: .* torch\.int64 \[3\], got torch\.int64 \[2\]$"),
        (torch.randn(3, 8), torch.zeros(3), r"^batch: .* torch\.int64 \[3\], got torch\.float32 \[3\]$"),
        (torch.randn(3, 8), None, r"^batch: .* torch\.int64 \[3\], got NoneType$"),
        (torch.randn(3, 8), torch.tensor([0, 1, 2]), r"^batch: expected numbers from 0 to 1, got 0 to 2$"),
        (torch.randn(3, 8), torch.tensor([-1, 0, 1]), r"^batch: expected numbers from 0 to 1, got -1 to 1$"),
        (torch.randn(3, 8), torch.zeros(3, dtype=torch.long, device="meta"), r"^batch: expected device cpu, as nodes"),
    ],
)
def test_bad_nodes(nodes: Tensor, batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfoGraphLoss()(torch.randn(2, 8), nodes, batch)


@each_loss
def test_undimix_takes_the_loss(loss: type[Any]) -> None:
    plain = loss(weighting=Uniform())
    assert undimix(plain).weighting == UnDiMix()
    assert isinstance(undimix(plain), loss)
    assert plain.weighting == Uniform()
    assert undimix(loss(), HCL()).weighting == HCL()
    assert loss(hardness=2.0).weighting == UnDiMix(hardness=2.0)
    with pytest.raises(TypeError, match="hardness"):
        loss(weighting=HCL(), hardness=2.0)
    assert undimix(plain, hardness=2.0)(*SPELT[loss.__name__.removesuffix("Loss")]([0, 1, 2]).given).isfinite()
    with pytest.raises(
        TypeError, match=rf"^exclude_same_class: .* {loss.__name__}, which takes labels last in the call"
    ):
        undimix(plain, exclude_same_class=True)


@each_loss
def test_a_temperature_is_checked_once(loss: type[Any]) -> None:
    """And is a float; what the verb refuses gets no warning of a loss that there never is."""
    with pytest.warns(UserWarning, match="all candidates count nearly the same") as caught:
        warm = loss(temperature=3, weighting=Uniform())
    assert len(caught) == 1
    assert repr(warm) == f"{loss.__name__}(temperature=3.0, weighting=Uniform())"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TypeError, match="exclude_same_class"):
            undimix(warm, exclude_same_class=True)


def test_what_has_no_negatives_is_refused() -> None:
    supported = "undimix_pyg: GRACELoss, GraphCLLoss, InfoGraphLoss$"
    with pytest.raises(TypeError, match=rf"^loss: GRACE looks like a model, not a loss: .*; supported: {supported}"):
        undimix(GRACE(GCN(34, 8, num_layers=2), 8))
