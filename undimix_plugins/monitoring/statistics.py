"""What the weights do to the negatives while a model trains, in a few numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from undimix_plugins.blocks import blocks_of
from undimix_plugins.checks import check_number
from undimix_plugins.components import TaskGradients
from undimix_plugins.contrast import Contrast, LastLayerInputs
from undimix_plugins.fast.logits import Logits, row_lengths
from undimix_plugins.fast.numerators import workspace
from undimix_plugins.fast.tasks import all_task_gradients
from undimix_plugins.loss import OBSERVERS
from undimix_plugins.rows import full_precision
from undimix_plugins.weightings.undimix import Prepared, UnDiMix, mix_of
from undimix_plugins.weightings.weighting import Weighting, check_compared, checked

Observer = Callable[[Contrast, Weighting], object]

COMPONENTS = UnDiMix()  # as it has them by default
MOST_ANCHORS = 128
MOST_PAIRS = 2**20  # of anchors and candidates, unless more anchors are asked for


@contextmanager
def watch(observer: Observer) -> Iterator[None]:
    """Shows an observer what the losses compare, as long as the context lasts: for any loop and any loss.

    All losses in this thread or task are watched, each contrast before its loss is worked out. Losses that the observer
    works out itself are not, nor those under `torch.compile`.

    Args:
        observer: Is called with a Contrast, whose tensors carry no gradient, and the Weighting; what it returns is
            ignored.

    Examples:
        >>> seen = []
        >>> with watch(lambda contrast, weighting: seen.append(negative_statistics(contrast, weighting))):
        ...     loss = info_nce(two_views(torch.randn(8, 4), torch.randn(8, 4), 0.5), UnDiMix())
        >>> seen[0]["count"]
        14.0
    """

    def observe(contrast: Contrast, weighting: Weighting) -> None:
        with torch.no_grad():
            observer(without_gradient(contrast), weighting)

    with OBSERVERS.holding(observe):
        yield


def without_gradient(contrast: Contrast) -> Contrast:
    """The contrast, its tensors detached, what is one tensor staying one."""
    tensors = {name: value for name, value in vars(contrast).items() if isinstance(value, Tensor)}
    by_identity = {id(value): value.detach() for value in tensors.values()}
    changes: dict[str, Any] = {name: by_identity[id(value)] for name, value in tensors.items()}
    if (layer := contrast.last_layer) is not None:
        inputs = layer.anchor_inputs.detach(), layer.pool_inputs.detach()
        changes["last_layer"] = LastLayerInputs(*inputs, layer.normalized)
    return replace(contrast, **changes)


@torch.no_grad()
def negative_statistics(
    contrast: Contrast, weighting: Weighting, *, labels: Tensor | None = None, most_anchors: int | None = None
) -> dict[str, float]:
    """How a weighting treats a contrast's negatives, averaged over its first anchors.

    With a pool gathered from all processes these wait for each other, so it is to be called on each.

    Args:
        contrast: What is compared, n anchors and a pool of m.
        weighting: How much each negative counts.
        labels: A class for each of the batch's b samples [b], of any dtype that compares, to find false negatives by.
            Anchors and pool are taken for whole columns of the batch (its views, its documents), row j of either
            belonging to sample `j % b`. Refused where that is not so: with a memory bank, the batches of all
            processes, or several positives (regions of images, nodes of graphs).
        most_anchors: How many anchors are looked at, at least 1; by default up to 128, and so few that they make about
            2^20 pairs with the pool.

    Returns:
        By name a float; a name is left out where no anchor has a value. Anchors whose negatives have no weight, or that
        have none, are left out of what is said of weights.

        - `hardness`: what the weighting multiplies its scores by, as it is in force: UnDiMix's `hardness`, `beta` of
          HCL and BCL, `alpha` of a SimilarityPenalty, what `Weighting.strength` names of one's own, the share of
          another on its way through a warm-up.
        - `count`: n_i, how many negatives an anchor has.
        - `effective_number`: of these, `(sum_j w_j)^2 / sum_j w_j^2`, from 1 to n_i (`effective_number`).
        - `weight_on_hardest`: the share of the weight, from 0 to 1, on the most similar hundredth of the negatives
          (rounded up); `Uniform()` has their share of the negatives.
        - `similarity_influence`, `similarity_diversity`, `influence_diversity`: Pearson's correlation of two of
          UnDiMix's components over an anchor's negatives, from -1 to 1, whatever the weighting (`gradient="embedding"`,
          `distance="cosine"`); of anchors where both vary.
        - `gradient_norm`: the length of the anchor's pseudo-labelling gradient, `|delta|` of `influence`; near 0 where
          the model is confident, and then the influence has little to tell negatives apart by.
        - With labels `false_negatives`: the share of the negatives, from 0 to 1, that have the anchor's label; and
          `weight_on_false_negatives`: their share of the weight.

    Raises:
        ValueError: For labels that are no vector, whose number does not divide those of anchors and pool, or where
            they can't be used; for `most_anchors` below 1, and as the weighting does.
        TypeError: For something else than a Contrast and a Weighting.

    References:
        Kish: Survey Sampling, 1965 (effective number); arXiv 2206.01197, section 3 (the components).

    Examples:
        >>> contrast = two_views(torch.randn(8, 4), torch.randn(8, 4), temperature=0.5)
        >>> statistics = negative_statistics(contrast, UnDiMix(), labels=torch.arange(8) % 2)
        >>> statistics["count"], 1 <= statistics["effective_number"] <= 14
        (14.0, True)
    """
    check_compared(contrast, weighting)
    if most_anchors is None:
        most_anchors = min(MOST_ANCHORS, MOST_PAIRS // len(contrast.pool) + 1)
    rows = slice(0, int(check_number("most_anchors", most_anchors, at_least=1)))
    same = None if labels is None else _same_label(contrast, labels, rows)
    in_force = {} if (hardness := weighting._hardness()) is None else {"hardness": hardness}
    contrast, weighting = weighting.choose(contrast), weighting._weigher()
    with full_precision(contrast.pool):
        tasks, negative = _tasks(contrast), contrast.is_negative(rows)
        gradients = tasks[0].at_scale(contrast.held_temperature)[rows].norm(dim=1)
        scores = COMPONENTS.scores(Prepared(contrast, tasks), rows, negative)
        similarity = contrast.anchors[rows] @ contrast.pool.T
        mix = mix_of(weighting)
        if mix is not None and (mix.gradient, mix.distance) == (COMPONENTS.gradient, COMPONENTS.distance):
            log_weights = mix.mixed(scores, negative)
        else:
            log_weights = weighting.log_weights(weighting.prepare(contrast), rows)
        log_weights = checked(weighting, log_weights, similarity)

    count = negative.sum(dim=1)
    log_weights = log_weights.masked_fill(~negative, -torch.inf)
    shares = log_weights.softmax(dim=1)  # NaN without any weight
    weighted = (log_weights > -torch.inf).any(dim=1)
    every = torch.ones_like(weighted)
    values = {
        "count": (count, weighted),
        "effective_number": (1 / shares.square().sum(dim=1), weighted),
        "weight_on_hardest": (_on_hardest(shares, similarity.masked_fill(~negative, -torch.inf), count), weighted),
    }
    for (one, left), (other, right) in combinations(scores.items(), 2):
        both_vary = (left != 0).any(dim=1) & (right != 0).any(dim=1)
        values[f"{one}_{other}"] = ((left * right).sum(dim=1) / count, both_vary)
    values["gradient_norm"] = (gradients, every)
    if same is not None:
        values["false_negatives"] = ((same & negative).to(shares.dtype).sum(dim=1) / count, weighted)
        values["weight_on_false_negatives"] = (shares.masked_fill(~same, 0).sum(dim=1), weighted)
    # One look at the device for all.
    sums = [part.sum().to(shares.dtype) for value, has in values.values() for part in (value.masked_fill(~has, 0), has)]
    means = zip(values, torch.stack(sums).view(-1, 2).tolist(), strict=True)
    return {**in_force, **{name: total / number for name, (total, number) in means if number}}


def _tasks(contrast: Contrast) -> tuple[TaskGradients, TaskGradients]:
    """The tasks' gradients, by the fast path: the plain way takes several times the time and the memory."""
    if contrast.gathered is not None:
        tasks = COMPONENTS.prepare(contrast).tasks
        assert tasks is not None  # its influence counts
        return tasks
    with workspace(contrast) as memory:
        rows = blocks_of(contrast.anchors, contrast.pool)[0].stop
        scratch = [memory.block(rows, len(contrast.pool)) for _ in range(2)]
        logits = Logits(contrast, None)
        return all_task_gradients(logits, scratch, row_lengths(logits.pool).max())


def _on_hardest(shares: Tensor, similarity: Tensor, count: Tensor) -> Tensor:
    """The share of the weight on the most similar hundredth of each anchor's `count` negatives [r], rounded up."""
    places = similarity.topk((similarity.shape[1] + 99) // 100, dim=1).indices
    hardest = torch.arange(places.shape[1], device=places.device) < ((count + 99) // 100)[:, None]
    return shares.gather(1, places).masked_fill(~hardest, 0).sum(dim=1)


def _same_label(contrast: Contrast, labels: Tensor, rows: slice) -> Tensor:
    """Which columns have the label of a block of anchors, bool [r, m]; a ValueError where that is not known."""
    if not isinstance(labels, Tensor) or labels.dim() != 1:
        came = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels: expected a label for each sample, of shape [samples], got {came}")
    n, m, b = len(contrast.anchors), len(contrast.pool), len(labels)
    holds_anchors = contrast.own_columns is not None and bool((contrast.own_columns >= 0).any())
    why = None
    if not (contrast.positives_in_pool or contrast.is_own_pool or holds_anchors):
        why = "a memory bank, whose entries have none"
    elif contrast.gathered is not None:
        why = "the batches of all processes"
    elif contrast.positive_columns is not None:
        why = "several positives, so that rows are parts of samples (regions of images, nodes of graphs)"
    if why:
        raise ValueError(f"labels: expected none, since they could not be used, got some with {why}")
    if not b or n % b or m % b:
        raise ValueError(
            f"labels: expected one for each sample of the batch, so many that anchors ({n}) and pool ({m}) are a "
            f"multiple, got {b}"
        )
    labels = labels.to(contrast.pool.device)
    of_anchors, of_pool = labels.repeat(n // b), labels.repeat(m // b)
    return of_anchors[rows, None] == of_pool


def mean_statistics(statistics: Iterable[dict[str, float]]) -> dict[str, float]:
    """The mean of each name over those that have it.

    Examples:
        >>> mean_statistics([{"count": 2.0}, {"count": 4.0, "effective_number": 1.5}])
        {'count': 3.0, 'effective_number': 1.5}
    """
    by_name: dict[str, list[float]] = {}
    for one in statistics:
        for name, value in one.items():
            by_name.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in by_name.items()}
