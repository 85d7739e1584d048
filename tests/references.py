"""Slow, obvious references, written from the definitions: loops and autograd, one anchor and one negative at a time."""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.contrasts import Case
from undimix_plugins import UnDiMix


def similarity(anchors: Tensor, pool: Tensor) -> Tensor:
    return torch.tensor([[(z * v).sum().item() for v in pool] for z in anchors], dtype=anchors.dtype)


def last_layer_gradient(row: Tensor, candidates: Tensor, temperature: float, inputs: Tensor | None = None) -> Tensor:
    """The gradient of a row's pseudo-labelling task at the last layer, a real one whose output the row is.

    At the layer's bias [d], or, given its inputs [h], at its weight [d * h].
    """
    h = torch.ones(1, dtype=row.dtype) if inputs is None else inputs
    layer = nn.Linear(len(h), len(row), dtype=row.dtype)
    with torch.no_grad():
        layer.bias.copy_(row - layer.weight @ h)
    if len(candidates) == 0:
        return torch.zeros_like(layer.bias if inputs is None else layer.weight).flatten()
    logits = candidates.detach() @ layer(h) / temperature
    loss = cross_entropy(logits[None], logits.argmax()[None])
    at_bias, at_weight = torch.autograd.grad(loss, [layer.bias, layer.weight])
    return at_bias if inputs is None else at_weight.flatten()


def precise_gradient(row: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    """The same at the bias, of a loss written so that it keeps its digits where the softmax is all but one-hot."""
    row = row.clone().requires_grad_()
    label = int((candidates @ row).argmax())
    others = [j for j in range(len(candidates)) if j != label]
    loss = torch.log1p(((candidates[others] - candidates[label]) @ row / temperature).exp().sum())
    return torch.autograd.grad(loss, row)[0]


def influence(case: Case, *, at_weight: bool = False) -> Tensor:
    n, m = len(case.anchors), len(case.pool)
    of_anchors, of_pool = [], []
    for i in range(n):
        candidates = [case.pool[j] for j in range(m) if j != case.own_columns[i]]
        if not case.positives_in_pool:
            candidates.append(case.positives[i])
        inputs = case.anchor_inputs[i] if at_weight and case.anchor_inputs is not None else None
        of_anchors.append(last_layer_gradient(case.anchors[i], stacked(candidates, case), case.temperature, inputs))
    for j in range(m):
        candidates = [case.anchors[i] for i in range(n) if case.own_columns[i] != j]
        inputs = case.pool_inputs[j] if at_weight and case.pool_inputs is not None else None
        of_pool.append(last_layer_gradient(case.pool[j], stacked(candidates, case), case.temperature, inputs))
    return similarity(torch.stack(of_anchors), torch.stack(of_pool))


def stacked(rows: list[Tensor], case: Case) -> Tensor:
    return torch.stack(rows) if rows else case.pool[:0]


def distance(one: Tensor, other: Tensor, kind: str) -> float:
    if kind == "euclidean":
        return math.dist(one.tolist(), other.tolist())
    lengths = one.norm().item() * other.norm().item()
    return 1 - (one @ other).item() / lengths if lengths else 1.0  # a row of zeros has cosine 0


def diversity(case: Case, kind: str) -> Tensor:
    """V_ij in the columns that are negatives, NaN elsewhere."""
    scores = torch.full((len(case.anchors), len(case.pool)), math.nan, dtype=case.pool.dtype)
    for i in range(len(case.anchors)):
        negatives = case.negatives(i)
        for j in negatives:
            distances = [distance(case.pool[j], case.pool[k], kind) for k in negatives if k != j]
            scores[i, j] = sum(distances) / len(distances) if distances else 0.0
    return scores


def log_weights(case: Case, method: UnDiMix) -> Tensor:
    """log w_ij in the columns that are negatives, NaN elsewhere."""
    components = [
        (method.similarity, similarity(case.anchors, case.pool)),
        (method.influence, influence(case, at_weight=method.gradient == "weight")),
        (method.diversity, diversity(case, method.distance)),
    ]
    total = sum(strength for strength, _ in components)
    result = torch.full((len(case.anchors), len(case.pool)), math.nan, dtype=case.pool.dtype)
    for i in range(len(case.anchors)):
        negatives = case.negatives(i)
        if not negatives:
            continue
        scores = [(strength, standardised([score[i, j].item() for j in negatives])) for strength, score in components]
        if method.mixing == "geometric":
            logits = [(case.anchors[i] @ case.pool[j]).item() / case.temperature for j in negatives]
            hardness = method.hardness * share(statistics.pstdev(logits))
            mixed = [hardness * sum(l * s[k] for l, s in scores) for k in range(len(negatives))]  # noqa: E741
            mean = sum(map(math.exp, mixed)) / len(mixed)
            logs = [score - math.log(mean) for score in mixed]
        else:
            weights = [0.0] * len(negatives)
            for strength, score in scores:
                exponentials = [math.exp(method.hardness * s) for s in score]
                for k, exponential in enumerate(exponentials):
                    weights[k] += len(negatives) * strength / total * exponential / sum(exponentials)
            logs = list(map(math.log, weights))
        result[i, negatives] = torch.tensor(logs, dtype=result.dtype)
    return result


def weights_of(case: Case, method: UnDiMix) -> dict[tuple[int, int], Tensor]:
    """w_ij by anchor and negative, with a gradient of the similarity: its mean and deviation held."""
    constant, weights = log_weights(case._replace(anchors=case.anchors.detach(), pool=case.pool.detach()), method), {}
    for i in range(len(case.anchors)):
        negatives = case.negatives(i)
        scores = [case.anchors[i] @ case.pool[j] for j in negatives]
        there = [score.item() for score in scores]
        spread = statistics.pstdev(there) / case.temperature if there else 0.0
        follows = method.carries_gradient and spread * case.temperature > 1e-13
        hardness = method.hardness * share(spread)
        slope = share(spread) / (max(spread, 1) * case.temperature)
        strength = hardness * method.similarity * slope if follows else 0.0
        moved = [(constant[i, j] + strength * (s - s.item())).exp() for j, s in zip(negatives, scores, strict=True)]
        for j, weight in zip(negatives, moved, strict=True):
            weights[i, j] = weight * len(negatives) / sum(moved)
    return weights


def share(spread: float) -> float:
    """The share of the hardness for logits of that standard deviation."""
    return min(1.0, math.exp(1 - spread**2 / math.log(2)))


def standardised(scores: list[float]) -> list[float]:
    """Mean 0 and population deviation 1; zeros where there is no deviation."""
    mean = sum(scores) / len(scores)
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
    if deviation < 1e-13:
        return [0.0] * len(scores)
    return [(score - mean) / deviation for score in scores]


def info_nce(case: Case, weights: Tensor | dict[tuple[int, int], Tensor] | None = None) -> Tensor:
    """The loss of weights [n, m], all 1 if None, with the gradient that is theirs too."""
    losses = []
    for i in range(len(case.anchors)):
        positive = (case.anchors[i] @ case.positives[i] / case.temperature).exp()
        negatives = torch.zeros((), dtype=case.pool.dtype)
        for j in case.negatives(i):
            weight = 1.0 if weights is None else weights[i, j]
            negatives = negatives + weight * (case.anchors[i] @ case.pool[j] / case.temperature).exp()
        losses.append(-(positive / (positive + negatives)).log())
    return torch.stack(losses).mean()


def hcl(case: Case, beta: float, tau_plus: float) -> tuple[Tensor, list[bool]]:
    """The published objective with gradient, and which anchors' estimates its lower bound replaced."""
    losses, clamped = [], []
    t = case.temperature
    for i in range(len(case.anchors)):
        negatives = case.negatives(i)
        n = len(negatives)
        positive = (case.anchors[i] @ case.positives[i] / t).exp()
        neg = torch.stack([(case.anchors[i] @ case.pool[j] / t).exp() for j in negatives])
        imp = neg**beta
        reweight = (imp * neg).sum() / imp.mean()
        estimate = (-tau_plus * n * positive + reweight) / (1 - tau_plus)
        least = n * math.exp(-1 / t)
        clamped.append(estimate.item() < least)
        losses.append(-(positive / (positive + estimate.clamp(min=least))).log())
    return torch.stack(losses).mean(), clamped
