"""Losses on several processes: each rank has its host's own value, all together that of one process.

Gradients are those of a layer whose outputs the losses get, averaged over the ranks as DistributedDataParallel does.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightly import loss as lightly_losses
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import BoW
from torch import Tensor, nn

from integration_tests.ranks import leave_group
from integration_tests.text.tiny_models import encoder
from tests.releases import is_older, needs
from undimix_plugins import HCL, PositiveAware, SimilarityPenalty, UnDiMix, Uniform, Weighting, undimix

BATCH, WIDTH, REGIONS = 5, 8, 3
BAD = ("short", "empty", "not finite")
DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
WEIGHTINGS = {"uniform": Uniform(), "undimix": UnDiMix(), "linear": UnDiMix(mixing="linear"), "hcl": HCL()}


def lightly(name: str, **settings: Any) -> Callable[[bool], nn.Module]:
    return lambda gather: getattr(lightly_losses, name)(0.2, gather_distributed=gather, **settings)


def with_bank(gather: bool) -> nn.Module:
    torch.manual_seed(0)  # all processes begin with one bank, of a size that no number of them divides
    return lightly_losses.NTXentLoss(0.5, memory_bank_size=(41, WIDTH), gather_distributed=gather).double()


def model() -> SentenceTransformer:
    return SentenceTransformer(modules=[BoW(vocab=["a"])], device="cpu")


def ranking(name: str, **settings: Any) -> Callable[[bool], nn.Module]:
    cached = name.startswith("Cached")
    return lambda gather: getattr(losses, name)(
        encoder() if cached else model(), gather_across_devices=gather, **settings
    )


def distances(one: Tensor, other: Tensor) -> Tensor:
    """Similarities that are no inner products, and differ from zero: a row has a gradient beside itself."""
    return -(1 + (one[:, None] - other).square().sum(dim=2)).log()


def guided(gather: bool) -> nn.Module:
    tiny = encoder()  # asked for its tokenizer alone
    return losses.CachedGISTEmbedLoss(tiny, tiny, 0.2, contrast_anchors=False, gather_across_devices=gather)


# A loss, and how many columns of embeddings it is given.
LOSSES: dict[str, tuple[Callable[[bool], nn.Module], int]] = {
    "NTXentLoss": (lightly("NTXentLoss"), 2),
    "NTXentLoss-bank": (with_bank, 2),
    "DCLLoss": (lightly("DCLLoss"), 2),
    "DCLWLoss": (lightly("DCLWLoss"), 2),
    "DetConSLoss": (lightly("DetConSLoss"), 2),
    "DetConBLoss": (lightly("DetConBLoss"), 4),
    "MultipleNegativesRankingLoss": (ranking("MultipleNegativesRankingLoss", directions=DIRECTIONS), 3),
    "MultipleNegativesRankingLoss, of distances": (
        ranking("MultipleNegativesRankingLoss", directions=DIRECTIONS, similarity_fct=distances, scale=2.0),
        3,
    ),
    "MultipleNegativesSymmetricRankingLoss": (ranking("MultipleNegativesSymmetricRankingLoss"), 2),
    "CachedMultipleNegativesRankingLoss": (ranking("CachedMultipleNegativesRankingLoss", mini_batch_size=2), 3),
    "CachedGISTEmbedLoss": (guided, 3),
}
ABSENT = {  # in old releases
    **dict.fromkeys(("DCLLoss", "DCLWLoss"), ("lightly", "1.5.21", "its loss is refused")),
    **{
        name: ("sentence-transformers", "5.3", "it gathers from 5.1 on, and has these directions from 5.3 on")
        for name in LOSSES
        if name.startswith(("Multiple", "Cached"))
    },
}
JOINED = [name for name in LOSSES if name != "DCLWLoss"]  # whose softmax over positives is a rank's own


def value(loss: nn.Module, columns: list[Tensor], masks: Tensor) -> Tensor:
    name = type(loss).__name__
    if name.startswith("DetCon"):
        return loss(*(column.unflatten(0, (-1, REGIONS)) for column in columns), *masks)  # type: ignore[no-any-return]
    if "GIST" in name:
        of_guide = [[column.detach().roll(1, 1)] for column in columns]
        return loss.calculate_loss([[column] for column in columns], of_guide)  # type: ignore[operator,no-any-return]
    if name.startswith("Cached"):
        return loss.calculate_loss([list(column.split(2)) for column in columns])  # type: ignore[operator,no-any-return]
    if name.startswith("Multiple"):
        return loss.compute_loss_from_embeddings(columns, None)  # type: ignore[operator,no-any-return]
    return loss(*columns)  # type: ignore[no-any-return]


def make_layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, WIDTH).double()


def outcome(loss: nn.Module, inputs: list[Tensor], masks: Tensor) -> list[Tensor]:
    """The value, and the gradients of the layer's parameters."""
    layer = make_layer()
    result = value(loss, [layer(part) for part in inputs], masks)
    return [result.detach(), *torch.autograd.grad(result, list(layer.parameters()))]


def joined(name: str, ranks: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = ranks * BATCH * (REGIONS if name.startswith("DetCon") else 1)
    inputs = torch.randn(LOSSES[name][1], rows, WIDTH, generator=generator, dtype=torch.float64)
    return list(inputs), torch.randint(2, (2, ranks * BATCH, REGIONS), generator=generator)


def of_rank(name: str, rank: int, ranks: int) -> tuple[list[Tensor], Tensor]:
    inputs, masks = joined(name, ranks)
    rows = len(inputs[0]) // ranks
    mine = [part[rank * rows : (rank + 1) * rows] for part in inputs]
    return mine, masks[:, rank * BATCH : (rank + 1) * BATCH]


def with_layer(
    make: Callable[[bool], nn.Module], weighting: UnDiMix, inputs: list[Tensor], masks: Tensor
) -> list[Tensor]:
    """With gradients at the layer's weight, whose inputs are gathered as well."""
    layer = make_layer()
    result = value(undimix(make(True), weighting, last_layer=layer), [layer(part) for part in inputs], masks)
    return [result.detach(), *torch.autograd.grad(result, list(layer.parameters()))]


# Of an anchor's own hard negatives, whose columns in the gathered pool a rank has to know.
HARD = {
    "hard": SimilarityPenalty(5.0, "hard_negatives"),
    "in batch": SimilarityPenalty(5.0, "in_batch_negatives"),
    "spared": PositiveAware(0.1, scope="in_batch_negatives"),
}
WITH_HARD = [name for name, (_, columns) in LOSSES.items() if columns == 3]
AT_WEIGHT = UnDiMix(gradient="weight")
WITH_LAYER = ("NTXentLoss", "DetConSLoss", "MultipleNegativesRankingLoss")


def refusal(loss: nn.Module, name: str, rank: int, ranks: int, bad: str) -> str:
    """What a rank says to a batch that is bad on the last: a sample shorter, empty, or not finite."""
    inputs, masks = of_rank(name, rank, ranks)
    if rank == ranks - 1 and bad == "not finite":
        inputs = [part.index_fill(0, torch.tensor([1]), torch.nan) for part in inputs]
    elif rank == ranks - 1:
        samples = BATCH - 1 if bad == "short" else 0
        rows = len(inputs[0]) // BATCH
        inputs, masks = [part[: samples * rows] for part in inputs], masks[:, :samples]
    try:
        value(loss, inputs, masks)
    except ValueError as error:
        return str(error)
    return "nothing"


class Failing(Weighting):
    def log_weights(self, prepared: Any, rows: slice) -> Tensor:
        raise ValueError("a weighting's own")


def queues(rank: int, ranks: int) -> dict[str, Any]:
    """The memory bank after some steps, the host's, and after one more, which fails on the last rank alone."""
    inputs, _ = of_rank("NTXentLoss-bank", rank, ranks)
    host, loss = with_bank(True), undimix(with_bank(True), HCL())
    for step in range(6):  # of 10 rows or more each, into 41 entries
        for criterion in (host, loss):
            criterion(inputs[0].roll(step, 1).requires_grad_(), inputs[1].roll(step, 1))
    found = {"host": host.memory_bank.bank.clone(), "ours": loss.memory_bank.bank.clone()}
    failing = undimix(loss, Failing()) if rank == ranks - 1 else loss
    host(inputs[0].requires_grad_(), inputs[1])
    try:
        failing(inputs[0], inputs[1])
    except ValueError as error:
        found["raised"] = str(error)
    return {**found, "host, then": host.memory_bank.bank, "ours, then": failing.memory_bank.bank}


def labels_on_one(rank: int, ranks: int) -> str:
    """What a rank says where labels are given on the first alone."""
    inputs, _ = of_rank("NTXentLoss", rank, ranks)
    try:
        undimix(LOSSES["NTXentLoss"][0](True))(*inputs, torch.arange(BATCH) if rank == 0 else None)
    except ValueError as error:
        return str(error)
    return "nothing"


def on_a_rank(rank: int, ranks: int, root: str) -> None:
    torch.set_num_threads(1)
    encoder()  # before there are ranks, of which the first alone would save it
    patience = timedelta(seconds=120)  # with a rank that waits for one that does not come
    dist.init_process_group("gloo", init_method=f"file://{root}/init", rank=rank, world_size=ranks, timeout=patience)
    results: dict[str, Any] = {"queues": queues(rank, ranks), "labels on one": labels_on_one(rank, ranks)}
    for name, (make, _) in LOSSES.items():
        if name in ABSENT and is_older(*ABSENT[name][:2]):
            continue
        batch = of_rank(name, rank, ranks)
        results[name] = {
            "host": outcome(make(True), *batch),
            "alone": outcome(undimix(make(False), UnDiMix()), *batch),
            "refusals": {bad: refusal(undimix(make(True)), name, rank, ranks, bad) for bad in BAD},
            **{kind: outcome(undimix(make(True), method), *batch) for kind, method in WEIGHTINGS.items()},
        }
        if LOSSES[name][1] == 3:
            results[name] |= {kind: outcome(undimix(make(True), method), *batch) for kind, method in HARD.items()}
        if name in WITH_LAYER:
            results[name]["weight"] = with_layer(make, AT_WEIGHT, *batch)
    torch.save(results, f"{root}/{rank}.pt")
    leave_group()


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank got, by loss and weighting; all in one start of the processes, which takes long."""
    root: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(on_a_rank, (request.param, str(root)), nprocs=request.param)
    return [torch.load(root / f"{rank}.pt") for rank in range(request.param)]


@pytest.fixture(autouse=True)
def present(request: pytest.FixtureRequest) -> None:
    """Skips what an old release has no loss for."""
    name = request.node.callspec.params.get("name")  # every test has parameters: the ranks
    if name in ABSENT:
        needs(*ABSENT[name])


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6 if other.dtype is torch.float32 else 0, atol=1e-10)


def mean(ranks: list[dict[str, Any]], name: str, kind: str) -> list[Tensor]:
    return [torch.stack(parts).mean(dim=0) for parts in zip(*(results[name][kind] for results in ranks), strict=True)]


@pytest.mark.parametrize("name", LOSSES)
def test_uniform_is_the_host_on_every_rank(name: str, ranks: list[dict[str, Any]]) -> None:
    if name == "CachedGISTEmbedLoss":
        needs(
            "sentence-transformers", "5.6", "on all ranks but the first it spares another candidate than the positive"
        )
    tolerance = 1e-7 if name.startswith("DetCon") else 1e-10  # lightly shares labels in float32
    for results in ranks:
        for one, other in zip(results[name]["uniform"], results[name]["host"], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", WEIGHTINGS)
@pytest.mark.parametrize("name", JOINED)
def test_the_ranks_together_are_one_process(name: str, kind: str, ranks: list[dict[str, Any]]) -> None:
    loss = undimix(LOSSES[name][0](False), WEIGHTINGS[kind])
    assert_same(mean(ranks, name, kind), outcome(loss, *joined(name, len(ranks))))
    assert (mean(ranks, name, kind)[0] - mean(ranks, name, "alone")[0]).abs() > 1e-3  # the control


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("name", WITH_HARD)
def test_hard_negatives_are_those_of_one_process(name: str, kind: str, ranks: list[dict[str, Any]]) -> None:
    loss = undimix(LOSSES[name][0](False), HARD[kind])
    assert_same(mean(ranks, name, kind), outcome(loss, *joined(name, len(ranks))))
    assert (mean(ranks, name, kind)[0] - mean(ranks, name, "uniform")[0]).abs() > 1e-3  # the control


@pytest.mark.parametrize("name", WITH_LAYER)
def test_gradients_at_the_last_layers_weight(name: str, ranks: list[dict[str, Any]]) -> None:
    layer = make_layer()
    inputs, masks = joined(name, len(ranks))
    loss = undimix(LOSSES[name][0](False), AT_WEIGHT, last_layer=layer)
    want = value(loss, [layer(part) for part in inputs], masks)
    torch.testing.assert_close(mean(ranks, name, "weight")[0], want.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_without_gathering_each_rank_is_its_own(name: str, ranks: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(ranks):
        loss = undimix(LOSSES[name][0](False), UnDiMix())
        assert_same(results[name]["alone"], outcome(loss, *of_rank(name, rank, len(ranks))))


@pytest.mark.parametrize("name", LOSSES)
def test_unequal_batches_are_refused_on_every_rank(name: str, ranks: list[dict[str, Any]]) -> None:
    rows = REGIONS if name.startswith("DetCon") else 1
    sizes = [BATCH] * (len(ranks) - 1) + [BATCH - 1]
    assert rows in (1, REGIONS)
    for results in ranks:
        assert "expected as many rows on every process" in results[name]["refusals"]["short"]
        assert str(sizes) in results[name]["refusals"]["short"]


@pytest.mark.parametrize("bad", ["empty", "not finite"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_bad_batch_on_one_rank_is_refused_on_every_rank(name: str, bad: str, ranks: list[dict[str, Any]]) -> None:
    *others, last = (results[name]["refusals"][bad] for results in ranks)
    assert ("expected at least one row" if bad == "empty" else "expected finite embeddings") in last
    for refused in others:
        assert (
            f"expected a batch on every process, since negatives are gathered, got none on [{len(others)}]" in refused
        )


def test_labels_on_one_rank_alone_are_refused_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert results["labels on one"] == (
            "labels: expected some on every process or on none, since they are gathered, got some on [0] alone"
        )


def test_the_queue_is_the_hosts_and_no_rank_waits_for_one_whose_loss_raises(ranks: list[dict[str, Any]]) -> None:
    *others, last = (results["queues"] for results in ranks)
    for found in (*others, last):
        torch.testing.assert_close(found["ours"], found["host"], rtol=0, atol=1e-12)
        assert not torch.equal(found["host, then"], found["host"])
    for found in others:
        torch.testing.assert_close(found["ours, then"], found["host, then"], rtol=0, atol=1e-12)
    assert last["raised"] == "a weighting's own"
    assert torch.equal(last["ours, then"], last["ours"])
