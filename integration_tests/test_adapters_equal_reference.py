"""Each adapter's UnDiMix loss equals the slow reference on the contrasts that its host's batch stands for."""

from __future__ import annotations

import pytest
import torch
from lightly.loss import NTXentLoss
from pytorch_metric_learning import losses as metric_losses
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import BoW
from torch import Tensor
from torch.nn.functional import normalize
from transformers.modeling_outputs import BaseModelOutput

from tests.contrasts import Case, random_rows
from tests.references import log_weights
from undimix_plugins import UnDiMix, undimix
from undimix_pyg import GraphCLLoss
from undimix_transformers import SimCSELoss

BATCH, WIDTH = 5, 6
METHODS = [UnDiMix(), UnDiMix(mixing="linear"), UnDiMix(similarity=0, diversity=0, hardness=2.0)]
DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def columns(count: int) -> list[Tensor]:
    return [random_rows(BATCH, WIDTH, seed=seed, unit=False) for seed in range(count)]


def case(anchors: Tensor, positives: Tensor, pool: Tensor, temperature: float, **kind: object) -> Case:
    """By default, anchor i's positive is row i of the pool, which holds no anchors."""
    defaults = {
        "own_columns": [-1] * len(anchors),
        "excluded": [[i] for i in range(len(anchors))],
        "positives_in_pool": True,
    }
    return Case(anchors, positives, pool, temperature, **{**defaults, **kind})  # type: ignore[arg-type]


def terms(case: Case, method: UnDiMix) -> tuple[Tensor, Tensor]:
    """Sums of exponentials, an anchor at a time: the positive's, and the weighted negatives'."""
    weights = log_weights(case, method).exp()
    similar = (case.anchors @ case.pool.T / case.temperature).exp()
    positive = ((case.anchors * case.positives).sum(1) / case.temperature).exp()
    negative = torch.stack([(weights[i] * similar[i])[case.negatives(i)].sum() for i in range(len(case.anchors))])
    return positive, negative


def nt_xent(case: Case, method: UnDiMix) -> Tensor:
    positive, negative = terms(case, method)
    return -(positive / (positive + negative)).log().mean()


def unit(rows: list[Tensor]) -> list[Tensor]:
    return [normalize(row, dim=1) for row in rows]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_lightly_in_batch(method: UnDiMix) -> None:
    first, second = columns(2)
    views, n = normalize(torch.cat([first, second]), dim=1), 2 * BATCH
    other = [(i + BATCH) % n for i in range(n)]
    wanted = nt_xent(
        case(views, views[other], views, 0.2, own_columns=list(range(n)), excluded=[[j] for j in other]), method
    )
    got = undimix(NTXentLoss(temperature=0.2), method)(first, second)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_lightly_memory_bank(method: UnDiMix) -> None:
    first, second = columns(2)
    criterion = undimix(NTXentLoss(temperature=0.2, memory_bank_size=(11, WIDTH)).double(), method)
    bank = criterion.memory_bank.bank.clone()
    kind = {"excluded": [[] for _ in range(BATCH)], "positives_in_pool": False}
    wanted = nt_xent(case(*unit([first, second]), bank, 0.2, **kind), method)
    torch.testing.assert_close(criterion(first, second), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("count", [2, 4])
def test_sentence_transformers_every_direction(count: int, method: UnDiMix) -> None:
    """The joint softmax has the positive once for each pool that holds it: twice in four directions."""
    model = SentenceTransformer(modules=[BoW(vocab=["a"])], device="cpu")
    embeddings = columns(count)
    queries, *docs = unit(embeddings)
    own, all_docs = list(range(BATCH)), torch.cat(docs)
    cases = {
        "query_to_doc": case(queries, docs[0], all_docs, 0.05),
        "query_to_query": case(queries, docs[0], queries, 0.05, own_columns=own, positives_in_pool=False),
        "doc_to_query": case(docs[0], queries, queries, 0.05),
        "doc_to_doc": case(
            docs[0],
            queries,
            all_docs,
            0.05,
            own_columns=own,
            excluded=[[i + BATCH * column for column in range(len(docs))] for i in own],
            positives_in_pool=False,
        ),
    }
    every = {direction: terms(cases[direction], method) for direction in DIRECTIONS}
    for directions in (DIRECTIONS[:1], DIRECTIONS[:2], ("query_to_doc", "doc_to_query"), DIRECTIONS):
        positive = every["query_to_doc"][0]
        times = sum(cases[direction].positives_in_pool for direction in directions)
        wanted = -(positive / (times * positive + sum(every[d][1] for d in directions))).log().mean()
        loss = undimix(MultipleNegativesRankingLoss(model, directions=directions), method)
        got = loss.compute_loss_from_embeddings(embeddings, None)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_graphcl(method: UnDiMix) -> None:
    z1, z2 = columns(2)
    first, second = unit([z1, z2])
    positive, negative = terms(case(first, second, second, 0.2), method)
    got = GraphCLLoss(temperature=0.2, weighting=method)(z1, z2)
    torch.testing.assert_close(got, -(positive / negative).log().mean(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_simcse(method: UnDiMix) -> None:
    first, second = columns(2)
    hidden = torch.stack([first, second], dim=1).flatten(0, 1)[:, None].expand(-1, 3, -1)
    wanted = nt_xent(case(*unit([first, second]), normalize(second, dim=1), 0.1), method)
    got = SimCSELoss(temperature=0.1, weighting=method)(BaseModelOutput(last_hidden_state=hidden))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("reference", [False, True], ids=["in batch", "reference"])
def test_pytorch_metric_learning(reference: bool, method: UnDiMix) -> None:
    """NT-Xent compares each positive with the negatives alone, SupCon all positives at once."""
    embeddings, other = columns(2)
    labels, of_pool = torch.tensor([0, 1, 0, 2, 0]), torch.tensor([0, 0, 1, 3, 1])
    anchors, pool = unit([embeddings, other if reference else embeddings])
    of_pool = of_pool if reference else labels
    own = [-1] * BATCH if reference else list(range(BATCH))
    positives = [[j for j in range(BATCH) if of_pool[j] == label and j != own[i]] for i, label in enumerate(labels)]
    among = case(anchors, anchors, pool, 0.3, own_columns=own, excluded=positives)
    similar, (_, negative) = (anchors @ pool.T / 0.3).exp(), terms(among, method)
    pairs = [-(similar[i, j] / (similar[i, j] + negative[i])).log() for i in range(BATCH) for j in positives[i]]
    each = [
        -sum((similar[i, j] / (sum(similar[i, p] for p in positives[i]) + negative[i])).log() for j in positives[i])
        / len(positives[i])
        for i in range(BATCH)
        if positives[i]
    ]
    assert (len(pairs), len(each)) == ((8, 4) if reference else (6, 3))
    further = {"ref_emb": other, "ref_labels": of_pool} if reference else {}
    for host, of_batch in ((metric_losses.NTXentLoss, pairs), (metric_losses.SupConLoss, each)):
        got = undimix(host(temperature=0.3), method)(embeddings, labels, **further)
        torch.testing.assert_close(got, torch.stack(of_batch).mean(), rtol=0, atol=1e-10)
