"""Negatives of all processes: with `Uniform()` each rank has its host's own value, and gradients flow between ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightly.loss import NTXentLoss
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import BoW
from torch import Tensor, nn

from undimix_plugins import UnDiMix, Uniform, undimix

RANKS, BATCH, WIDTH = 2, 5, 8
DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def lightly_loss(gather: bool) -> nn.Module:
    return NTXentLoss(temperature=0.2, gather_distributed=gather)


def ranking_loss(gather: bool) -> nn.Module:
    model = SentenceTransformer(modules=[BoW(vocab=["a"])], device="cpu")
    return MultipleNegativesRankingLoss(model, gather_across_devices=gather, directions=DIRECTIONS)


LOSSES = {"lightly": (lightly_loss, 2), "sentence-transformers": (ranking_loss, 3)}


def value_and_gradients(loss: nn.Module, columns: list[Tensor]) -> list[Tensor]:
    columns = [column.clone().requires_grad_() for column in columns]
    is_ranking = isinstance(loss, MultipleNegativesRankingLoss)
    value = loss.compute_loss_from_embeddings(columns, None) if is_ranking else loss(*columns)
    value.backward()
    return [value.detach(), *(column.grad for column in columns if column.grad is not None)]


def joined_columns(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(count, RANKS * BATCH, WIDTH, generator=generator, dtype=torch.float64))


def on_a_rank(rank: int, root: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/init", rank=rank, world_size=RANKS)
    results = {}
    for name, (make, count) in LOSSES.items():
        mine = [column[rank * BATCH : (rank + 1) * BATCH] for column in joined_columns(count)]
        results[name] = {
            "host": value_and_gradients(make(True), mine),
            "uniform": value_and_gradients(undimix(make(True), Uniform()), mine),
            "undimix": value_and_gradients(undimix(make(True), UnDiMix()), mine),
        }
    torch.save(results, f"{root}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, list[Tensor]]]]:
    """What each rank got, by loss and weighting; all in one start of the processes, which takes long."""
    root = tmp_path_factory.mktemp("ranks")
    mp.spawn(on_a_rank, (str(root),), nprocs=RANKS)
    return [torch.load(root / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", LOSSES)
def test_uniform_is_the_host_on_every_rank(name: str, ranks: list[dict[str, dict[str, list[Tensor]]]]) -> None:
    for results in ranks:
        for one, other in zip(results[name]["uniform"], results[name]["host"], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    # The ranks' mean is the loss of the joined batch.
    make, count = LOSSES[name]
    whole = value_and_gradients(make(False), joined_columns(count))[0]
    mean = torch.stack([results[name]["uniform"][0] for results in ranks]).mean()
    torch.testing.assert_close(mean, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_weighted_loss_on_every_rank(name: str, ranks: list[dict[str, dict[str, list[Tensor]]]]) -> None:
    for results in ranks:
        assert (results[name]["undimix"][0] - results[name]["host"][0]).abs() > 1e-4
        assert all(value.isfinite().all() for value in results[name]["undimix"])
