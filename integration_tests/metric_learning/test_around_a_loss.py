"""The line on what pytorch-metric-learning puts around a loss, on other kinds of losses, and on bad input."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_metric_learning import distances, losses, miners
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import Tensor, nn

import undimix_pytorch_metric_learning
from undimix_plugins import HCL, FalseNegativeAttraction, Ring, UnDiMix, Uniform, negative_statistics, undimix, watch
from undimix_plugins.toolkit import set_hardness

WIDTH = 6
LOSSES = [losses.NTXentLoss, losses.SupConLoss]


def batch(seed: int = 0, count: int = 16) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, WIDTH, dtype=torch.float64, generator=draw),
        torch.randint(4, (count,), generator=draw),
    )


@pytest.mark.parametrize("make", LOSSES)
def test_the_line_keeps_the_class_and_its_settings(make: Any) -> None:
    loss = make(temperature=0.3, distance=distances.DotProductSimilarity())
    weighted = undimix(loss, hardness=2.0)
    assert type(weighted) is getattr(undimix_pytorch_metric_learning, make.__name__)
    assert isinstance(weighted, make)
    assert weighted.temperature == 0.3
    assert weighted.distance is loss.distance
    assert weighted.weighting == UnDiMix(hardness=2.0)
    assert weighted.loss_method.__self__ is weighted
    ours = type(weighted)(temperature=0.3, weighting=UnDiMix(hardness=2.0), distance=loss.distance)
    assert torch.equal(ours(*batch()), weighted(*batch()))
    assert not torch.isclose(weighted(*batch()), loss(*batch()), rtol=1e-3)
    assert undimix(weighted) is weighted
    for same in (copy.deepcopy(weighted), pickle.loads(pickle.dumps(weighted))):
        assert torch.equal(same(*batch()), weighted(*batch()))
        assert same.loss_method.__self__ is same


def test_the_defaults_are_the_hosts() -> None:
    for make in LOSSES:
        ours = getattr(undimix_pytorch_metric_learning, make.__name__)
        assert ours().temperature == make().temperature
        assert type(ours().reducer) is type(make().reducer)
        assert ours().weighting == UnDiMix()


AROUND: dict[str, Callable[[nn.Module], nn.Module]] = {
    "CrossBatchMemory": lambda loss: losses.CrossBatchMemory(loss, WIDTH, memory_size=40),
    "CrossBatchMemory, miner": lambda loss: losses.CrossBatchMemory(
        loss, WIDTH, memory_size=40, miner=miners.MultiSimilarityMiner()
    ),
    "MultipleLosses": lambda loss: losses.MultipleLosses([losses.TripletMarginLoss(), loss], weights=[1.0, 0.5]),
    "MultipleLosses, by name": lambda loss: losses.MultipleLosses(
        {"triplets": losses.TripletMarginLoss(), "pairs": loss}, miners={"pairs": miners.MultiSimilarityMiner()}
    ),
    "DistributedLossWrapper": DistributedLossWrapper,
}


@pytest.mark.filterwarnings("ignore:DistributedLossWrapper is being used in a non-distributed setting")
@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("name", AROUND)
def test_a_loss_around_it(name: str, make: Any) -> None:
    host = AROUND[name](make())
    outside, inside = undimix(AROUND[name](make()), Uniform()), AROUND[name](undimix(make(), Uniform()))
    other = undimix(AROUND[name](make(temperature=0.3)), HCL(beta=1.0, tau_plus=0.0))
    plain = AROUND[name](make(temperature=0.3))
    assert isinstance(outside, type(host))
    assert type(outside).__name__ == type(host).__name__
    for step in range(5):
        of_step = batch(step)
        if step == 0 and name == "CrossBatchMemory":
            of_step = (*of_step, miners.BatchHardMiner()(*of_step))  # what it has listed, some pairs twice
        want = host(*of_step)
        torch.testing.assert_close(outside(*of_step), want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(inside(*of_step), want, rtol=1e-12, atol=1e-12)
        assert not torch.isclose(other(*of_step), plain(*of_step), rtol=1e-4)
    assert outside.state_dict().keys() == host.state_dict().keys()
    assert undimix(other) is other


def test_settings_reach_the_loss_inside() -> None:
    views = batch()[0], batch(1)[0]
    around = undimix(losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=0.3)), hardness=2.0)
    assert around.weighting is around.loss.weighting
    around.weighting = Uniform()
    assert around.loss.weighting == Uniform()
    want = losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=0.3))(*views)
    for same in (around, copy.deepcopy(around), pickle.loads(pickle.dumps(around))):
        torch.testing.assert_close(same(*views), want, rtol=1e-12, atol=1e-12)
    set_hardness(around, 0.5)
    assert around.loss.weighting == Uniform().softened(0.5)


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_two_views(make: Any, symmetric: bool) -> None:
    host = losses.SelfSupervisedLoss(make(temperature=0.3), symmetric=symmetric)
    first, second = batch()[0], batch(1)[0]
    torch.testing.assert_close(undimix(host, Uniform())(first, second), host(first, second), rtol=1e-12, atol=1e-12)
    assert not torch.isclose(undimix(host)(first, second), host(first, second), rtol=1e-3)


def test_a_memory_goes_on_as_it_was() -> None:
    """The line in the middle of a training: the memory is shared, as lightly's memory bank is."""
    host = losses.CrossBatchMemory(losses.NTXentLoss(), WIDTH, memory_size=40)
    host(*batch())
    weighted = undimix(host, Uniform())
    assert weighted.queue_idx == host.queue_idx == 16
    torch.testing.assert_close(weighted(*batch(1)), host(*batch(1)), rtol=1e-12, atol=1e-12)


def test_negatives_are_those_of_the_labels_or_of_the_miner() -> None:
    embeddings, labels = batch()
    criterion = undimix(losses.NTXentLoss(temperature=0.3))
    with watch(lambda contrast, weighting: seen.append(contrast)):
        seen: list[Any] = []
        criterion(embeddings, labels)
        pairs = miners.MultiSimilarityMiner()(embeddings, labels)
        criterion(embeddings, labels, pairs)
        criterion(embeddings, labels, (pairs[0], pairs[1], pairs[2].repeat(2), pairs[3].repeat(2)))
    by_labels, mined, twice = seen
    assert torch.equal(by_labels.is_negative(slice(0, 16)), labels[:, None] != labels)
    listed = torch.zeros(16, 16, dtype=torch.bool)
    listed[pairs[2], pairs[3]] = True
    assert torch.equal(mined.is_negative(slice(0, 16)), listed)
    assert 0 < listed.sum() < (labels[:, None] != labels).sum()
    assert torch.equal(twice.count, 2 * mined.count)


def test_statistics_of_the_negatives() -> None:
    embeddings, labels = batch()
    with watch(lambda contrast, weighting: numbers.append(negative_statistics(contrast, weighting))):
        numbers: list[Any] = []
        undimix(losses.SupConLoss(temperature=0.3))(embeddings, labels)
    assert 0 < float(numbers[0]["effective_number"]) <= 16


@pytest.mark.parametrize("make", LOSSES)
def test_gradients_at_the_last_layer(make: Any) -> None:
    layer = nn.Linear(5, WIDTH).double()
    inputs, labels = torch.randn(16, 5, dtype=torch.float64), batch()[1]
    at_weight = undimix(make(temperature=0.3), last_layer=layer)
    value = at_weight(layer(inputs), labels)
    assert not torch.isclose(value, undimix(make(temperature=0.3))(layer(inputs), labels), rtol=1e-6)
    twice = undimix(make(temperature=0.3), last_layer=layer)
    rows = layer(inputs)
    pairs = miners.TripletMarginMiner(margin=3.0)(rows, labels)
    assert twice(rows, labels, pairs).isfinite()
    other = undimix(make(temperature=0.3), last_layer=layer)
    first, second = layer(inputs), layer(inputs.flip(0))
    assert other(first, labels, ref_emb=second, ref_labels=labels.flip(0)).isfinite()


def test_a_distance_that_is_set_later_is_looked_at() -> None:
    criterion = undimix(losses.NTXentLoss())
    criterion.distance = distances.LpDistance()
    with pytest.raises(ValueError, match="distance: expected CosineSimilarity or DotProductSimilarity"):
        criterion(*batch())


def test_a_reference_in_another_precision() -> None:
    """As autocast leaves it beside a memory in float32."""
    embeddings, labels = batch()
    half = embeddings.to(torch.bfloat16)
    value = undimix(losses.NTXentLoss(), Uniform())(half, labels, ref_emb=embeddings.float(), ref_labels=labels.clone())
    wanted = losses.NTXentLoss()(half.float(), labels, ref_emb=embeddings.float(), ref_labels=labels.clone())
    torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)


def test_every_kind_of_method() -> None:
    for make in LOSSES:
        plain = make(temperature=0.3)(*batch())
        for weighting in (Ring(), HCL(beta=0.5, tau_plus=0.1), HCL(beta=0.5, tau_plus=0.0, alpha=0.5)):
            value = undimix(make(temperature=0.3), weighting)(*batch())
            assert value.isfinite()
            assert not torch.isclose(value, plain, rtol=1e-4)
        with pytest.raises(ValueError, match="expected one that makes no positives"):
            undimix(make(), FalseNegativeAttraction(k=2))(*batch())


def test_the_factor_on_the_positive() -> None:
    """HN-NCE's alpha multiplies the positive's term: half of it leaves log 1/2 where negatives are far away."""
    embeddings = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 1]]
    value = undimix(losses.NTXentLoss(temperature=0.01), HCL(beta=0.0, tau_plus=0.0, alpha=0.5))(
        embeddings, torch.tensor([0, 0, 1, 1])
    )
    assert float(value) == pytest.approx(math.log(0.5), abs=1e-9)


class OfOnesOwn(losses.NTXentLoss):  # type: ignore[misc]
    def _compute_loss(self, pos_pairs: Any, neg_pairs: Any, indices_tuple: Any) -> Any:
        return super()._compute_loss(pos_pairs, 2 * neg_pairs, indices_tuple)


class Renamed(losses.SupConLoss):  # type: ignore[misc]
    pass


def test_subclasses() -> None:
    assert isinstance(undimix(Renamed()), Renamed)
    with pytest.raises(TypeError, match=r"OfOnesOwn replaces NTXentLoss._compute_loss by its own, which would be lost"):
        undimix(OfOnesOwn())


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a loss of triplets": (
        lambda: undimix(losses.TripletMarginLoss()),
        TypeError,
        "TripletMarginLoss has no negatives to weight or is not supported; supported: pytorch_metric_learning: "
        "NTXentLoss, SupConLoss",
    ),
    "losses of triplets": (
        lambda: undimix(losses.MultipleLosses([losses.TripletMarginLoss(), losses.ContrastiveLoss()])),
        TypeError,
        "expected a MultipleLosses with a loss that can be weighted, directly in it, got Triplet",
    ),
    "a memory of triplets": (
        lambda: undimix(losses.CrossBatchMemory(losses.TripletMarginLoss(), 4)),
        TypeError,
        "TripletMarginLoss has no negatives to weight",
    ),
    "a distance": (
        lambda: undimix(losses.NTXentLoss(distance=distances.LpDistance())),
        ValueError,
        "distance: expected CosineSimilarity or DotProductSimilarity, whose similarities are inner products, got "
        "LpDistance",
    ),
    "a noise ratio": (
        lambda: undimix_pytorch_metric_learning.SupConLoss(distance=distances.SNRDistance()),
        ValueError,
        "got SNRDistance",
    ),
    "a power": (
        lambda: undimix(losses.SupConLoss(distance=distances.DotProductSimilarity(power=2))),
        ValueError,
        "got DotProductSimilarity to the power of 2",
    ),
    "a temperature": (lambda: undimix(losses.NTXentLoss(temperature=0)), ValueError, "temperature: expected"),
    "labels as an option": (
        lambda: undimix(losses.NTXentLoss(), exclude_same_class=True),
        TypeError,
        "exclude_same_class: expected none for NTXentLoss, whose negatives already have other labels",
    ),
    "an option": (lambda: undimix(losses.SupConLoss(), hardnes=2), TypeError, "hardnes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    make, error, words = REFUSED[name]
    with pytest.raises(error) as came:
        make()
    assert words in str(came.value)


PAIR = torch.tensor([0, 1])
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "not finite": (
        {"embeddings": batch()[0].index_fill(0, torch.tensor([3]), torch.nan)},
        "embeddings: expected finite embeddings, got a non-finite value in row 3",
    ),
    "empty": ({"embeddings": batch()[0][:0], "labels": batch()[1][:0]}, "embeddings: expected at least one row"),
    "integers": ({"embeddings": batch()[0].long()}, "embeddings: expected floating-point embeddings, got torch.int64"),
    "three dimensions": ({"embeddings": batch()[0][:, None]}, "embeddings: expected a tensor of shape [rows, width]"),
    "another width": ({"ref_emb": batch()[0][:, :3], "ref_labels": batch()[1]}, "ref_emb: expected width 6"),
    "another dtype": ({"ref_emb": batch()[0].half(), "ref_labels": batch()[1]}, "ref_emb: expected torch.float64"),
    "nothing to tell pairs by": ({"labels": None}, "labels and indices_tuple cannot both be None"),
    "no labels of the reference": (
        {"ref_emb": batch(1)[0]},
        "ref_labels: expected a label for each row of ref_emb, or an indices_tuple, got None",
    ),
    "labels of fewer": ({"labels": batch()[1][:3]}, "Number of embeddings must equal number of labels"),
    "two tensors": ({"indices_tuple": (PAIR, PAIR)}, "indices_tuple: expected pairs"),
    "no tuple": ({"indices_tuple": PAIR}, "indices_tuple: expected pairs"),
    "lists": (
        {"indices_tuple": ([0], [1], [0], [2])},
        "indices_tuple[0]: expected a tensor of shape [pairs], got list",
    ),
    "floats": ({"indices_tuple": (PAIR, PAIR, PAIR.float())}, "indices_tuple[2]: expected integers, got torch.float32"),
    "lengths": ({"indices_tuple": (PAIR, PAIR[:1], PAIR, PAIR)}, "indices_tuple: expected an anchor for each"),
    "out of range": (
        {"indices_tuple": (PAIR, PAIR + 15, PAIR)},
        "indices_tuple: expected rows from 0 to 15, got 15 to 16",
    ),
    "below 0": ({"indices_tuple": (PAIR - 1, PAIR, PAIR)}, "indices_tuple: expected rows from 0 to 15, got -1 to 0"),
    "its own negative": (
        {"indices_tuple": (PAIR, PAIR.flip(0), PAIR, PAIR)},
        "indices_tuple: expected no anchor as its own negative, got one",
    ),
    "both kinds": (
        {"indices_tuple": (PAIR, PAIR.flip(0), PAIR, PAIR.flip(0))},
        "indices_tuple: expected each pair to be either positive or negative, got one as both",
    ),
}


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("name", BAD)
def test_bad_batches(name: str, make: Any) -> None:
    given, words = BAD[name]
    embeddings, labels = batch()
    arguments = {"embeddings": embeddings, "labels": labels, **given}
    with pytest.raises(ValueError) as came:  # noqa: PT011
        undimix(make())(**arguments)
    assert words in str(came.value)
