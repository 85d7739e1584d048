"""With `Uniform()` each of our lightly losses is lightly's own, value and gradients; what all of them share."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import lightly.loss as host
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import undimix_lightly as ours
from tests.contrasts import Case, random_rows
from tests.references import log_weights
from undimix_plugins import HCL, FalseNegativeElimination, UnDiMix, Uniform, compose, undimix
from undimix_plugins.monitoring.warmup import set_hardness

WIDTH = 16
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def squared_distance(one: Tensor, other: Tensor) -> Tensor:
    return ((one - other) ** 2).sum(dim=1)


PAIRED: dict[str, dict[str, Any]] = {
    "DCLLoss": {},
    "DCLLoss-weights": {"weight_fn": squared_distance},
    "DCLWLoss": {"sigma": 0.3},
    "MACLLoss": {"alpha": 0.7, "A_0": 0.2},
}
REGIONS = {"DetConSLoss": 2, "DetConBLoss": 4}


def make(package: Any, name: str, **settings: Any) -> nn.Module:
    name, _, _ = name.partition("-")
    return getattr(package, name)(**settings)  # type: ignore[no-any-return]


def rows(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()


def views(batch: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    first, noise = (rows(batch, WIDTH, seed=seed, dtype=dtype) for seed in (batch, batch + 1))
    return [first, (first.detach() + 0.5 * noise.detach()).requires_grad_()]


def assert_same(
    one: nn.Module, other: nn.Module, inputs: list[Tensor], *further: Tensor, tolerance: float | None = None
) -> None:
    """`other`, the host's, works in float64: in float32 what it rounds would be held against us."""
    double = [part.detach().double().requires_grad_() for part in inputs]
    results = []
    for criterion, rows in ((one, inputs), (other, double)):
        loss = criterion(*rows, *further)
        results.append([part.double() for part in (loss, *torch.autograd.grad(loss, rows))])
    for got, want in zip(*results, strict=True):
        scale = max(1.0, float(want.detach().abs().max()))  # MACL's gradients do not shrink as others do
        torch.testing.assert_close(got, want, rtol=0, atol=scale * (tolerance or TOLERANCE[inputs[0].dtype]))


@pytest.mark.filterwarnings("ignore:To copy construct")  # of lightly's own weights
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("batch", [2, 3, 7, 32, 128])
@pytest.mark.parametrize("name", PAIRED)
def test_uniform_is_lightly(name: str, batch: int, dtype: torch.dtype) -> None:
    settings = {"temperature": 0.2, **PAIRED[name]}
    plain = make(host, name, **settings)
    assert_same(undimix(plain, Uniform()), plain, views(batch, dtype))
    assert_same(make(ours, name, **settings, weighting=Uniform()), plain, views(batch, dtype))
    defaults = make(ours, name, weighting=Uniform()), make(host, name)
    assert_same(*defaults, views(batch, dtype))


def regions(batch: int, count: int, tensors: int, masks: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(batch)
    inputs = [rows(batch, count, WIDTH, seed=seed, dtype=dtype) for seed in range(tensors)]
    return inputs, [torch.randint(masks, (batch, count), generator=generator) for _ in range(2)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("masks", [1, 3, 40], ids=["all alike", "a few", "hardly a positive"])
@pytest.mark.parametrize(("batch", "count"), [(1, 4), (2, 1), (3, 5), (8, 16)])
@pytest.mark.parametrize("name", REGIONS)
def test_uniform_is_detcon(name: str, batch: int, count: int, masks: int, dtype: torch.dtype) -> None:
    inputs, of_regions = regions(batch, count, REGIONS[name], masks, dtype)
    plain = make(host, name, temperature=0.2)
    # A label's share of 1/3 is float32 in lightly, whatever the embeddings are.
    tolerance = None if count != 5 and masks != 3 else 1e-6 if dtype is torch.float64 else 1e-5
    assert_same(undimix(plain, Uniform()), plain, inputs, *of_regions, tolerance=tolerance)
    assert_same(make(ours, name, weighting=Uniform()), make(host, name), inputs, *of_regions, tolerance=tolerance)


def test_detcon_without_any_positive_is_0() -> None:
    inputs, _ = regions(3, 4, 2, 1, torch.float64)
    masks = torch.arange(4).expand(3, 4), torch.arange(4, 8).expand(3, 4)
    for weighting in (UnDiMix(), Uniform(), HCL()):
        loss = undimix(host.DetConSLoss(), weighting)(*inputs, *masks)
        assert loss.item() == 0
        assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize(
    "method", [UnDiMix(hardness=0), UnDiMix(), UnDiMix(mixing="linear"), UnDiMix(similarity=0, hardness=2.0)], ids=repr
)
@pytest.mark.parametrize("name", REGIONS)
def test_detcon_weighted(name: str, method: UnDiMix) -> None:
    """Each region on its own, its negatives weighted by the slow reference; hardness 0 is the plain loss."""
    b, m, t = 3, 4, 0.3
    inputs, masks = regions(b, m, REGIONS[name], 3, torch.float64)
    predictions, targets = inputs[:2], inputs[-2:]
    want = torch.zeros((), dtype=torch.float64)
    for view, other in ((0, 1), (1, 0)):
        anchors = normalize(predictions[view], dim=2).flatten(0, 1).detach()
        pool = normalize(torch.cat([targets[other], targets[view]]), dim=2).flatten(0, 1).detach()
        positives, excluded, own_columns = [], [], []
        for i in range(b):
            for r in range(m):
                same = [[s for s in range(m) if masks[of][i, s] == masks[view][i, r]] for of in (other, view)]
                positives.append([i * m + s for s in same[0]])
                excluded.append([*positives[-1], *(b * m + i * m + s for s in same[1])])
                own_columns.append(b * m + i * m + r if name == "DetConSLoss" else -1)
        case = Case(anchors, anchors, pool, t, own_columns, excluded, True)
        weights = log_weights(case, method).exp()
        similar = (anchors @ pool.T / t).exp()
        for k in range(b * m):
            if positives[k]:
                total = similar[k, positives[k]].sum() + (weights[k] * similar[k])[case.negatives(k)].sum()
                here = int((masks[view][k // m] == masks[view][k // m, k % m]).sum())
                want -= (similar[k, positives[k]] / total).log().mean() / here / (b * m)
    got = undimix(make(host, name, temperature=t), method)(*inputs, *masks)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def of_views(method: UnDiMix, t: float, batch: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Sums of exponentials, an anchor at a time: the positive's, and the weighted negatives'."""
    inputs, n = views(batch), 2 * batch
    z = normalize(torch.cat(inputs), dim=1).detach()
    other = [(i + batch) % n for i in range(n)]
    case = Case(z, z[other], z, t, list(range(n)), [[j] for j in other], True)
    weights, similar = log_weights(case, method).exp(), (z @ z.T / t).exp()
    positive = torch.stack([similar[i, j] for i, j in enumerate(other)])
    negative = torch.stack([(weights[i] * similar[i])[case.negatives(i)].sum() for i in range(n)])
    return positive, negative, inputs


@pytest.mark.parametrize("method", [UnDiMix(), UnDiMix(mixing="linear")], ids=repr)
def test_dcl_weighted(method: UnDiMix) -> None:
    positive, negative, inputs = of_views(method, 0.2, 5)
    want = -(positive / negative).log().mean()
    torch.testing.assert_close(undimix(host.DCLLoss(0.2), method)(*inputs), want, rtol=1e-10, atol=1e-10)
    z0, z1 = (normalize(part, dim=1) for part in inputs)
    share = torch.cat([squared_distance(z0, z1)] * 2)
    want = (negative.log() - share * positive.log()).mean()
    got = undimix(host.DCLLoss(0.2, squared_distance), method)(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", [UnDiMix(), UnDiMix(mixing="linear")], ids=repr)
def test_macl_weighted(method: UnDiMix) -> None:
    inputs = views(5)
    z0, z1 = (normalize(part, dim=1) for part in inputs)
    t = 0.1 * (1 + 0.5 * float((z0 * z1).sum(dim=1).mean().detach()))
    positive, negative, _ = of_views(method, t, 5)
    p = positive / (positive + negative)
    want = -(p.log() / (1 - p + 1e-8)).mean()
    torch.testing.assert_close(undimix(host.MACLLoss(), method)(*inputs), want, rtol=1e-9, atol=1e-10)


EVERY: dict[str, Callable[[], tuple[list[Tensor], list[Tensor]]]] = {
    "NTXentLoss": lambda: (views(6), []),
    "DirectCLRLoss": lambda: (views(6), []),
    **{name: lambda: (views(6), []) for name in ("DCLLoss", "DCLWLoss", "MACLLoss")},
    **{name: lambda name=name: regions(3, 4, REGIONS[name], 3, torch.float64) for name in REGIONS},  # type: ignore[misc]
}


@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize("name", EVERY)
def test_what_every_loss_has(name: str) -> None:
    plain = make(host, name)
    criterion = undimix(plain)
    assert isinstance(criterion, type(plain))
    assert isinstance(criterion, getattr(ours, name))
    assert repr(criterion.weighting) in repr(criterion)
    inputs, further = EVERY[name]()
    value = criterion(*inputs, *further)
    assert (value - plain(*inputs, *further)).abs() > 1e-4  # the control: weighting changes the loss
    for copied in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)), make(ours, name)):
        torch.testing.assert_close(copied(*inputs, *further), value, rtol=0, atol=0)
    # strict both ways; lightly's NTXentLoss keeps its bank out of it
    assert criterion.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(criterion.state_dict())
    criterion.load_state_dict(plain.state_dict())
    assert type(undimix(criterion, HCL()).weighting) is HCL


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize("name", EVERY)
def test_half_precision_with_a_row_of_zeros(name: str, dtype: torch.dtype) -> None:
    inputs, further = EVERY[name]()
    inputs = [part.detach().to(dtype) for part in inputs]
    inputs[0].flatten(0, -2)[0] = 0
    inputs = [part.requires_grad_() for part in inputs]
    loss = undimix(make(host, name))(*inputs, *further)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    for part in inputs:
        assert part.grad is not None
        assert part.grad.isfinite().all()
    assert inputs[0].grad is not None
    assert inputs[0].grad.flatten(0, -2)[0].count_nonzero() == 0


@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize("name", ["NTXentLoss", "DCLLoss", "DCLWLoss", "MACLLoss"])
def test_labels_leave_same_class_rows_out(name: str) -> None:
    """Each anchor on its own: the samples of other classes are all that there is."""
    torch.manual_seed(0)
    inputs, labels = views(6), torch.tensor([0, 1, 0, 2, 1, 3])
    z = normalize(torch.cat(inputs), dim=1).detach()
    alignment = (z[:6] * z[6:]).sum(dim=1)
    t = 0.1 * (1 + 0.5 * float(alignment.mean())) if name == "MACLLoss" else 0.1
    weights = 2 - 6 * (alignment / 0.5).softmax(dim=0) if name == "DCLWLoss" else torch.ones(6)
    losses = []
    for i in range(12):
        similar = (z @ z[i] / t).exp()
        negative = sum(similar[j] for j in range(12) if labels[j % 6] != labels[i % 6])
        positive = similar[(i + 6) % 12]
        p = positive / (positive + negative)
        losses.append(
            {"NTXentLoss": -p.log(), "MACLLoss": -p.log() / (1 - p + 1e-8)}.get(
                name,
                negative.log() - weights[i % 6] * positive.log(),  # type: ignore[union-attr]
            )
        )
    criterion = undimix(make(host, name, temperature=0.1), Uniform())
    torch.testing.assert_close(criterion(*inputs, labels), torch.stack(losses).mean(), rtol=1e-9, atol=1e-9)
    assert undimix(criterion, UnDiMix())(*inputs, labels).isfinite()
    with pytest.raises(ValueError, match=r"labels: expected one for each sample, of shape \[6\], got \[5\]"):
        criterion(*inputs, labels[:5])


@pytest.mark.parametrize("weight", [0.5, torch.tensor(0.5)], ids=str)
def test_a_weight_for_all_positives(weight: Any) -> None:
    """As lightly takes it."""
    plain = host.DCLLoss(weight_fn=lambda out0, out1: weight)
    assert_same(undimix(plain, Uniform()), plain, views(5))


def test_direct_clr_takes_labels_and_maps() -> None:
    labels = torch.tensor([0, 1, 0, 2])
    first, second = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    got = undimix(host.DirectCLRLoss(loss_dim=5))(first, second, labels)
    want = undimix(host.NTXentLoss())(first.flatten(1)[:, :5], second.flatten(1)[:, :5], labels)
    torch.testing.assert_close(got, want)


def test_labels_beside_a_memory_bank_are_refused() -> None:
    with pytest.raises(ValueError, match="labels: expected none beside a memory bank"):
        undimix(host.NTXentLoss(memory_bank_size=(8, WIDTH)))(*views(4), torch.arange(4))


@pytest.mark.parametrize("name", EVERY)
def test_bad_input_is_named(name: str) -> None:
    criterion = undimix(make(host, name))
    inputs, further = EVERY[name]()
    with torch.no_grad():
        inputs[1].flatten(0, -2)[2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"(out1|z1|view1|pred_view1): expected finite embeddings, got a non-finite"):
        criterion(*inputs, *further)
    with pytest.raises(ValueError, match=r"temperature: expected a finite number above 0"):
        undimix(make(host, name, temperature=torch.inf))


@pytest.mark.parametrize("name", REGIONS)
def test_regions_that_do_not_match_are_named(name: str) -> None:
    criterion = undimix(make(host, name))
    inputs, masks = EVERY[name]()
    first = "view0" if name == "DetConSLoss" else "pred_view0"
    with pytest.raises(ValueError, match=rf"{first}: expected shape \[batch, regions, width\], got \[12, 16\]"):
        criterion(*(part.flatten(0, 1) for part in inputs), *masks)
    with pytest.raises(ValueError, match=rf"view1: expected shape \[3, 4, 16\], as {first} has, got \[2, 4, 16\]"):
        criterion(inputs[0], *(part[:2] for part in inputs[1:]), *masks)
    with pytest.raises(ValueError, match=r"mask_view1: expected integers of shape \[3, 4\], got torch.int64 \[3, 3\]"):
        criterion(*inputs, masks[0], masks[1][:, :3])


# --- gradients at the last layer's weight


def gradient_at_weight(layer: nn.Linear, row: Tensor, candidates: Tensor, t: float) -> Tensor:
    """Of a row's pseudo-labelling loss, at the real layer's weight, by autograd."""
    logits = candidates.detach() @ normalize(layer(row), dim=0) / t
    loss = nn.functional.cross_entropy(logits[None], logits.argmax()[None])
    return torch.autograd.grad(loss, layer.weight)[0].flatten()


@pytest.mark.parametrize("name", ["NTXentLoss", "DCLLoss", "MACLLoss", "DetConSLoss"])
def test_gradients_at_the_weight_are_exact(name: str) -> None:
    torch.manual_seed(0)
    batch, t = 6, 1.0
    layer = nn.Linear(5, WIDTH).double()
    inputs = random_rows(2 * batch, 5, seed=3, unit=False)
    method = UnDiMix(similarity=0, diversity=0, influence=1.0, gradient="weight")
    settings = {"temperature": t} if name != "MACLLoss" else {"temperature": t, "alpha": 0.0}
    criterion = undimix(make(host, name, **settings), method, last_layer=layer)

    z = normalize(layer(inputs), dim=1).detach()
    similar = (z @ z.T / t).exp()
    every = range(2 * batch)
    losses = []
    for i in every:
        other = (i + batch) % (2 * batch)
        negatives = [j for j in every if j not in (i, other)]
        # DetCon compares the regions of one view at a time: a candidate's task is which of these it is aligned with.
        anchors = [k for k in every if k // batch == i // batch] if name == "DetConSLoss" else list(every)
        of_anchor = gradient_at_weight(layer, inputs[i], z[[j for j in every if j != i]], t)
        of_negatives = [gradient_at_weight(layer, inputs[j], z[[k for k in anchors if k != j]], t) for j in negatives]
        scores = torch.stack(of_negatives) @ of_anchor
        weights = ((scores - scores.mean()) / scores.std(correction=0)).softmax(dim=0) * len(negatives)
        negative = (weights * similar[i, negatives]).sum()
        p = similar[i, other] / (similar[i, other] + negative)
        each = {"DCLLoss": -(similar[i, other] / negative).log(), "MACLLoss": -p.log() / (1 - p + 1e-8)}
        losses.append(each.get(name, -p.log()))
    want = torch.stack(losses).mean()

    out = layer(inputs[:batch]), layer(inputs[batch:])
    if name == "DetConSLoss":  # of images of one region; its loss adds up the means of both views
        out, want = tuple(part[:, None] for part in out), 2 * want
        further = list(torch.zeros(2, batch, 1, dtype=torch.long))
    else:
        further = []
    got = criterion(*out, *further)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    at_embedding = undimix(criterion.__class__(**settings), UnDiMix(similarity=0, diversity=0, influence=1.0))
    assert (at_embedding(*out, *further) - got).abs() > 1e-4  # the control


def test_last_layer_in_a_composition() -> None:
    """It is asked for, taken, and its gradients weigh what false-negative elimination leaves."""
    layer = nn.Linear(5, WIDTH)
    weighting = compose(UnDiMix(gradient="weight"), FalseNegativeElimination(k=3, threshold=-1.0))
    with pytest.raises(TypeError, match=r"last_layer: expected the nn\.Linear whose outputs the loss is given"):
        undimix(host.NTXentLoss(), weighting)
    criterion = undimix(host.NTXentLoss(), weighting, last_layer=layer)
    first, second = (layer(torch.randn(8, 5)) for _ in range(2))
    at_embedding = undimix(host.NTXentLoss(), compose(UnDiMix(), FalseNegativeElimination(k=3, threshold=-1.0)))
    assert (criterion(first, second) - at_embedding(first, second)).abs() > 1e-4
    with pytest.raises(TypeError, match="expected a weighting with gradient='weight', which uses it, got compose"):
        undimix(host.NTXentLoss(), at_embedding.weighting, last_layer=layer)


def test_last_layer_by_the_verb() -> None:
    layer = nn.Linear(5, WIDTH)
    criterion = undimix(host.NTXentLoss(), last_layer=layer, hardness=2.0)
    assert criterion.weighting == UnDiMix(gradient="weight", hardness=2.0)
    first, second = (layer(torch.randn(4, 5)) for _ in range(2))
    assert criterion(second, first).isfinite()  # in any order
    torch.testing.assert_close(criterion(first, second), criterion(second, first))  # which asks once more
    layer(torch.randn(4, 5))  # the next batch
    with pytest.raises(ValueError, match="last_layer: expected the loss to be given this Linear's outputs"):
        criterion(first, second)
    first, second = layer(torch.randn(8, 5)).split(4)
    assert criterion(first, second).isfinite()  # cut from one call
    inputs, whole = torch.randn(8, 5), undimix(host.NTXentLoss(), last_layer=layer)
    value = whole(layer(inputs[:4]), layer(inputs[4:]))
    layer(torch.randn(16, 5))  # of another loss, or an evaluation
    out = layer(inputs)
    layer(torch.randn(8, 5))
    torch.testing.assert_close(whole(out[:4], out[4:]), value)
    out = layer(inputs.repeat_interleave(2, dim=0))
    torch.testing.assert_close(whole(out[0:8:2], out[9::2]), value)
    out = layer(inputs[:4]), layer(inputs[4:])
    torch.testing.assert_close(whole(*(part.double() for part in out)).float(), value)  # copies, in their order
    first, second = (layer(torch.randn(4, 5)) for _ in range(2))
    with pytest.raises(ValueError, match="got other values: is there a layer after it"):
        criterion(first.relu(), second)
    with pytest.raises(TypeError, match="expected a weighting with gradient='weight', which uses it, got UnDiMix"):
        undimix(host.NTXentLoss(), UnDiMix(), last_layer=layer)
    with pytest.raises(
        TypeError, match=r"last_layer: expected the nn.Linear .* which gradient='weight' needs, got None"
    ):
        undimix(host.NTXentLoss(), gradient="weight")
    first, second = (layer(torch.randn(4, 5)) for _ in range(2))
    with pytest.raises(ValueError, match="got some that were changed in place: is there a layer after it"):
        criterion(first.relu_(), second)
    for weighting in (HCL(), UnDiMix()):  # which take no gradient at a weight, so that nothing is asked for
        other = undimix(criterion, weighting)
        assert other(*(part.float() for part in views(4))).isfinite()


def test_another_device_compares_copies_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a look is not free, a layer after the Linear is found out at its first batch."""
    monkeypatch.setattr("undimix_plugins.last_layer.values_are_free", lambda tensor: False)
    layer = nn.Linear(5, WIDTH)
    criterion = undimix(host.NTXentLoss(), last_layer=layer)
    with pytest.raises(ValueError, match="got other values: is there a layer after it"):
        criterion(*(layer(torch.randn(4, 5)).tanh() for _ in range(2)))
    out = [layer(torch.randn(4, 5)) for _ in range(2)]
    assert criterion(*(part.clone() for part in out)).isfinite()
    assert criterion.last_layer.compared


def test_what_is_no_linear_is_refused() -> None:
    from lightly.models.modules import SimCLRProjectionHead

    head = SimCLRProjectionHead(8, 8, 4)
    with pytest.raises(TypeError, match=r"last_layer: expected the nn.Linear .*, got BatchNorm1d"):
        undimix(host.NTXentLoss(), last_layer=head.layers[-1])
    with pytest.raises(ValueError, match="last_layer: expected none beside a memory bank"):
        undimix(host.NTXentLoss(memory_bank_size=(8, 4)), last_layer=nn.Linear(8, 4))
    with pytest.raises(ValueError, match="last_layer: expected none with DirectCLRLoss"):
        undimix(host.DirectCLRLoss(), last_layer=nn.Linear(8, 4))
    with pytest.raises(ValueError, match="last_layer: expected none with DetConBLoss"):
        undimix(host.DetConBLoss(), last_layer=nn.Linear(8, 4))


def test_a_last_layer_survives_copies_with_its_model() -> None:
    layer = nn.Linear(5, WIDTH)
    model = nn.ModuleDict({"layer": layer, "loss": undimix(host.NTXentLoss(), last_layer=layer)})
    assert set(model.state_dict()) == {"layer.weight", "layer.bias"}
    inputs = torch.randn(4, 5), torch.randn(4, 5)
    value = model["loss"](*(layer(part) for part in inputs))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied["loss"](*(copied["layer"](part) for part in inputs)), value)


def test_a_forgotten_loss_leaves_nothing_behind() -> None:
    layer = nn.Linear(5, WIDTH)
    undimix(host.NTXentLoss(), last_layer=layer)
    layer(torch.randn(4, 5))
    assert layer(torch.randn(4, 5)).shape == (4, WIDTH)
    copied = copy.deepcopy(layer)
    assert copied(torch.randn(4, 5)).shape == (4, WIDTH)


def test_evaluation_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(5, WIDTH)
    criterion = undimix(host.NTXentLoss(), last_layer=layer)
    criterion(layer(torch.randn(4, 5)), layer(torch.randn(4, 5)))
    with torch.no_grad():
        for _ in range(100):
            layer(torch.randn(4, 5))
    assert sum(len(call.inputs) for call in criterion.last_layer.calls) <= 20
    fresh = undimix(host.NTXentLoss(), last_layer=layer)
    monkeypatch.setattr("undimix_plugins.last_layer.MOST_BYTES", 40 * 4 * (5 + WIDTH))  # before any loss has asked
    with torch.no_grad():
        for _ in range(100):
            layer(torch.randn(4, 5))
    assert sum(len(call.inputs) for call in fresh.last_layer.calls) <= 44
    assert criterion(layer(torch.randn(4, 5)), layer(torch.randn(4, 5))).isfinite()


@pytest.mark.parametrize(
    "loss",
    [host.BarlowTwinsLoss(), host.NegativeCosineSimilarity(), host.VICRegLoss(), host.TiCoLoss()],
    ids=lambda loss: type(loss).__name__,
)
def test_losses_without_negatives_are_refused(loss: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"has no negatives to weight .*; supported: .*DCLLoss.*MACLLoss.*NTXentLoss"):
        undimix(loss)


def test_undimix_takes_a_loss_that_is_warming_up_for_its_full_weighting() -> None:
    loss = undimix(host.NTXentLoss(), hardness=2.0)
    for share in (0.0, 0.5):
        set_hardness(loss, share)
        assert undimix(loss).weighting == UnDiMix(hardness=2.0)
        assert undimix(loss, HCL()).weighting == HCL()
        set_hardness(undimix(loss), 1.0)
    assert loss.weighting.hardness == 1.0  # of which they are copies
