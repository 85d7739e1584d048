"""With Uniform() the losses are pytorch-metric-learning's own, in value and gradients, in all that it offers them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from torch import Tensor, nn

from undimix_plugins import Uniform, undimix

WIDTH = 6
LOSSES = [losses.NTXentLoss, losses.SupConLoss]
Make = Callable[..., nn.Module]


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def classes(count: int, most: int, seed: int = 0) -> Tensor:
    return torch.randint(most, (count,), generator=torch.Generator().manual_seed(seed))


def outcome(loss: nn.Module, embeddings: Tensor, *further: Any, **named: Any) -> list[Tensor]:
    """The value, and the gradients at the embeddings and at the rows of the reference, if there are any."""
    inputs = [embeddings.clone().requires_grad_()]
    if "ref_emb" in named:
        inputs.append(named["ref_emb"].clone().requires_grad_())
        named["ref_emb"] = inputs[1]
    value = loss(inputs[0], *further, **named)
    return [value.detach(), *torch.autograd.grad(value, inputs, materialize_grads=True)]


def assert_equal(make: Make, *batch: Any, control: bool = True, **named: Any) -> None:
    """Compares the host's loss with ours; both must be other than 0 with `control`."""
    host, ours = outcome(make(), *batch, **named), outcome(undimix(make(), Uniform()), *batch, **named)
    for one, other in zip(ours, host, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert bool(host[0] != 0) == control


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("most", [2, 5, 20], ids=lambda most: f"{most} classes")
def test_a_batch_with_labels(make: Make, most: int) -> None:
    assert_equal(make, rows(21), classes(21, most))


@pytest.mark.parametrize("make", LOSSES)
def test_a_reference_with_labels(make: Make) -> None:
    labels, reference = classes(9, 4), rows(14, seed=1)
    assert_equal(make, rows(9), labels, ref_emb=reference, ref_labels=classes(14, 5, seed=1))
    assert_equal(make, rows(9), labels, ref_emb=rows(9, seed=1), ref_labels=labels.clone())
    assert_equal(make, rows(9), labels, ref_emb=rows(9, seed=1), ref_labels=labels)  # without an anchor's own row
    one = {"ref_emb": rows(1, seed=1), "ref_labels": labels[:1]}  # none has both a positive and a negative there
    assert_equal(make, rows(9), labels, control=False, **one)


@pytest.mark.parametrize("make", LOSSES)
def test_the_batch_itself_as_reference(make: Make) -> None:
    """With labels of its own, it has an anchor's own row among the positives or the negatives."""
    for of_reference in (classes(9, 4), classes(9, 4, seed=1)):
        results = []
        for loss in (make(), undimix(make(), Uniform())):
            embeddings = rows(9).requires_grad_()
            value = loss(embeddings, classes(9, 4), ref_emb=embeddings, ref_labels=of_reference)
            results.append([value.detach(), *torch.autograd.grad(value, embeddings)])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_small_losses_keep_their_digits_in_float32() -> None:
    """Losses of 1e-8 beside log-sums of 20: the default reducer of SupConLoss leaves out what is rounded to 0."""
    draw = torch.Generator().manual_seed(0)
    views = torch.randn(32, 128, generator=draw).repeat(2, 1)
    embeddings = views + 0.02 * torch.randn(64, 128, generator=draw)
    embeddings[5] = torch.randn(128, generator=draw)
    labels = torch.arange(32).repeat(2)
    for make in LOSSES:
        precise = make(temperature=0.05)(embeddings.double(), labels)
        value = undimix(make(temperature=0.05), Uniform())(embeddings, labels)
        torch.testing.assert_close(value.double(), precise, rtol=1e-4, atol=0)


def test_yes_and_no_as_labels() -> None:
    for make in LOSSES:
        assert_equal(make, rows(5), torch.tensor([True, False, True, False, True]))


def test_labels_of_any_kind() -> None:
    for labels in (torch.tensor([0.5, 2.5, 0.5, 2.5, 1.0]), torch.tensor([-3, 900, -3, 900, 7], dtype=torch.int16)):
        for make in LOSSES:
            assert_equal(make, rows(5), labels)


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize(
    "labels", [[0, 0, 0], [0, 1, 2], [0], [0, 0], [0, 0, 1]], ids=lambda labels: f"labels {labels}"
)
def test_batches_without_positives_or_negatives(make: Make, labels: list[int]) -> None:
    assert_equal(make, rows(len(labels)), torch.tensor(labels), control=labels == [0, 0, 1])


@pytest.mark.parametrize("make", LOSSES)
def test_anchors_without_a_positive_or_a_negative(make: Make) -> None:
    """By a reference, an anchor may lack either, or both."""
    labels, reference = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1, 1])
    assert_equal(make, rows(3), labels, ref_emb=rows(4, seed=1), ref_labels=reference)
    none = torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([0, 2, 2]), torch.tensor([1, 0, 3])
    assert_equal(make, rows(3), None, none, ref_emb=rows(4, seed=1))
    assert_equal(lambda: make(reducer=reducers.PerAnchorReducer()), rows(4), None, none)


REDUCERS = {
    "mean": reducers.MeanReducer(),
    "sum": reducers.SumReducer(),
    "above 0": reducers.AvgNonZeroReducer(),
    "between": reducers.ThresholdReducer(low=1.0, high=9.0),
    "by anchor": reducers.PerAnchorReducer(),
    "by class": reducers.ClassWeightedReducer(torch.tensor([1.0, 2.0, 0.5, 3.0])),
}


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("reducer", REDUCERS)
def test_reducers(make: Make, reducer: str) -> None:
    assert_equal(lambda: make(reducer=REDUCERS[reducer]), rows(12), classes(12, 4))


@pytest.mark.parametrize("make", LOSSES)
def test_no_reducer(make: Make) -> None:
    reduce_nothing = {"reducer": reducers.DoNothingReducer()}
    host, ours = (
        loss(rows(8), classes(8, 3))["loss"] for loss in (make(**reduce_nothing), _uniform(make, **reduce_nothing))
    )
    torch.testing.assert_close(ours["losses"], host["losses"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours["indices"], host["indices"])
    assert ours["reduction_type"] == host["reduction_type"]


def _uniform(make: Make, **settings: Any) -> nn.Module:
    return undimix(make(**settings), Uniform())


DISTANCES: dict[str, Callable[[], nn.Module]] = {
    "cosine": distances.CosineSimilarity,
    "inner product of unit rows": distances.DotProductSimilarity,
    "inner product": lambda: distances.DotProductSimilarity(normalize_embeddings=False),
    "unit rows by the sum of magnitudes": lambda: distances.DotProductSimilarity(p=1),
}


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("distance", DISTANCES)
def test_distances(make: Make, distance: str) -> None:
    kind = {"distance": DISTANCES[distance](), "temperature": 0.7}
    assert_equal(lambda: make(**kind), rows(12), classes(12, 4))
    assert_equal(
        lambda: make(**kind), rows(5), classes(5, 3), ref_emb=rows(8, seed=1), ref_labels=classes(8, 3, seed=1)
    )


@pytest.mark.parametrize("make", LOSSES)
def test_a_regularizer(make: Make) -> None:
    regular = {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.3}
    assert_equal(lambda: make(**regular), rows(12), classes(12, 4))
    assert float(make(**regular)(rows(12), classes(12, 4)) - make()(rows(12), classes(12, 4))) > 0.1  # the control


@pytest.mark.parametrize("make", LOSSES)
def test_statistics(make: Make) -> None:
    loss, host = _uniform(make, collect_stats=True), make(collect_stats=True)
    for one in (loss, host):
        one.distance.collect_stats = one.reducer.collect_stats = True
        one(2 * rows(12), classes(12, 4))
    for name in ("initial_avg_query_norm", "initial_avg_ref_norm", "final_avg_query_norm", "final_avg_ref_norm"):
        assert getattr(loss.distance, name) == pytest.approx(getattr(host.distance, name), rel=1e-12)
    assert host.distance.initial_avg_query_norm > 2
    assert loss.reducer.losses_size == host.reducer.losses_size > 1


MINERS: dict[str, Callable[[], nn.Module]] = {
    "pairs, MultiSimilarity": miners.MultiSimilarityMiner,
    "pairs, PairMargin": lambda: miners.PairMarginMiner(pos_margin=0.2, neg_margin=0.8),
    "pairs, BatchEasyHard": miners.BatchEasyHardMiner,
    "triplets, BatchHard": miners.BatchHardMiner,
    "triplets, all": lambda: miners.TripletMarginMiner(margin=3.0, type_of_triplets="all"),
}


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("miner", MINERS)
def test_pairs_and_triplets_of_a_miner(make: Make, miner: str) -> None:
    indices = MINERS[miner]()(rows(16), classes(16, 4))
    assert len(indices) == (3 if miner.startswith("triplets") else 4)
    if miner == "triplets, all":
        anchors, _, negatives = indices
        assert len(torch.unique(anchors * 16 + negatives)) < len(anchors)  # some are listed more than once
    assert_equal(make, rows(16), classes(16, 4), indices)
    assert_equal(make, rows(16), None, indices)
    assert_equal(make, rows(16), classes(16, 4), indices, ref_emb=rows(16, seed=1), ref_labels=classes(16, 4))


@pytest.mark.parametrize("make", LOSSES)
def test_one_pair_of_each_kind_is_none_at_all(make: Make) -> None:
    one = torch.tensor([0])
    assert_equal(make, rows(3), None, (one, one + 1, one, one + 2), control=False)
    assert_equal(make, rows(3), None, (one, one + 1, one.repeat(2), torch.tensor([1, 2])[[1, 1]]))
    assert_equal(make, rows(3), None, (one.repeat(2), one.repeat(2) + 1, one, one + 2))
    empty = one[:0]
    assert_equal(make, rows(3), None, (empty, empty, one, one + 2), control=False)
    assert_equal(make, rows(3), None, (one.repeat(2), torch.tensor([1, 2]), empty, empty), control=False)


@given(data=st.data(), make=st.sampled_from(LOSSES), anchors=st.integers(1, 8), pool=st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_any_pairs(data: st.DataObject, make: Make, anchors: int, pool: int) -> None:
    """Any pairs, of which none is both positive and negative, in any order and as often as it comes."""
    kinds = [[data.draw(st.integers(-1, 1)) for _ in range(pool)] for _ in range(anchors)]
    places = st.tuples(st.integers(0, anchors - 1), st.integers(0, pool - 1))
    drawn = data.draw(st.lists(places, max_size=30))
    pairs = {kind: [place for place in drawn if kinds[place[0]][place[1]] == kind] for kind in (1, -1)}
    indices = [
        torch.tensor([place[side] for place in pairs[kind]], dtype=torch.long) for kind in (1, -1) for side in (0, 1)
    ]
    named = {"ref_emb": rows(pool, seed=1)}
    host, ours = (outcome(loss, rows(anchors), None, indices, **dict(named)) for loss in (make(), _uniform(make)))
    for one, other in zip(ours, host, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", LOSSES)
def test_many_positives_do_without_a_copy_for_each(make: Make) -> None:
    """Few rows and many pairs are looked up in a matrix of similarities, many rows and few pairs by rows."""
    assert_equal(make, rows(40), classes(40, 2))
    assert_equal(make, rows(40), torch.arange(40) % 20)


@pytest.mark.parametrize("make", LOSSES)
def test_half_precision_is_computed_in_float32(make: Make) -> None:
    batch = rows(12).to(torch.bfloat16), classes(12, 4)
    ours = undimix(make(), Uniform())(*batch)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, make()(batch[0].float(), batch[1]), rtol=1e-6, atol=1e-6)
