"""Statistics of the negatives and their weights during training."""

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
from undimix_plugins.plan import OBSERVERS
from undimix_plugins.rows import full_precision
from undimix_plugins.weightings.undimix import Prepared, UnDiMix, mix_of
from undimix_plugins.weightings.weighting import Weighting, check_compared, checked

Observer = Callable[[Contrast, Weighting], object]

COMPONENTS = UnDiMix()  # its scores, with their default settings
MOST_ANCHORS = 128
MOST_PAIRS = 2**20  # of anchors and candidates, by default


@contextmanager
def watch(observer: Observer) -> Iterator[None]:
    """Context manager that shows a function the contrast of every loss inside it, for any loss and any training loop.

    All losses in the current thread or asyncio task are watched. The function is called before each loss is computed.
    Losses that the function computes itself, and losses under `torch.compile`, are not watched.

    Args:
        observer: A function that is called with the `Contrast`, whose tensors have no gradient, and the `Weighting`.
            Its result is ignored.

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
    """Returns the contrast with detached tensors. Fields with the same tensor object still share one."""
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
    """Computes statistics of a contrast's negatives and their weights, averaged over its first anchors.

    If the pool is gathered from all processes, all of them have to call it.

    Args:
        contrast: A contrast with n anchors and a pool of m candidates.
        weighting: How much each negative counts.
        labels: A class for each of the b samples of the batch [b], of any dtype, to find false negatives. Row j of the
            anchors and row j of the pool must belong to sample `j % b`, as the views or the documents of a batch do.
            Labels are not accepted with a memory bank, with the batches of all processes, or with several positives
            (regions of images, nodes of graphs).
        most_anchors: The maximum number of anchors that are used, at least 1. By default 128, or fewer, so that there
            are about 2^20 pairs of anchors and candidates.

    Returns:
        Floats by name. A name is left out if no anchor has a value. Statistics of weights leave out anchors without
        negatives, and anchors whose negatives all have weight 0.

        - `hardness`: the number that the weighting multiplies its scores by, at the current step of a warm-up:
          `hardness` of UnDiMix, `beta` of HCL and BCL, `alpha` of SimilarityPenalty, the attribute named by
          `Weighting.strength` for your own weighting. For other weightings the share of the warm-up, during one.
        - `hardness_in_force`: only for `UnDiMix` with geometric mixing: the hardness of an anchor, h_i. It is less than
          the hardness if the temperature is low.
        - `count`: the number of negatives of an anchor, n_i.
        - `effective_number`: the effective number of negatives, `(sum_j w_j)^2 / sum_j w_j^2`, from 1 to n_i.
        - `weight_on_hardest`: the share of the weight on the most similar hundredth of the negatives (rounded up), from
          0 to 1. For `Uniform()`, it is their share of the negatives.
        - `similarity_influence`, `similarity_diversity`, `influence_diversity`: the Pearson correlation of two scores
          of UnDiMix over an anchor's negatives, from -1 to 1. It is computed for every weighting, with
          `gradient="embedding"` and `distance="cosine"`, and leaves out anchors for which a score is constant.
        - `gradient_norm`: the length of the anchor's pseudo-labelling gradient, `|delta|` of `influence`. It is close
          to 0 if the model is confident. The influence then hardly distinguishes negatives.
        - `false_negatives`, only with labels: the share of the negatives that have the anchor's label, from 0 to 1.
        - `weight_on_false_negatives`, only with labels: the share of the weight on these negatives, from 0 to 1.

    Raises:
        ValueError: If the labels are not a vector, if the numbers of anchors and candidates are not multiples of b, if
            labels are not accepted for this contrast, if `most_anchors` is below 1, or as the weighting does.
        TypeError: If `contrast` is not a `Contrast` or `weighting` is not a `Weighting`.

    References:
        Kish: Survey Sampling, 1965 (effective number); UnDiMix, arXiv 2206.01197, section 3 (scores).

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
    shares = log_weights.softmax(dim=1)  # NaN if all weights are 0
    weighted = (log_weights > -torch.inf).any(dim=1)
    every = torch.ones_like(weighted)
    values = {
        "count": (count, weighted),
        "effective_number": (1 / shares.square().sum(dim=1), weighted),
        "weight_on_hardest": (_on_hardest(shares, similarity.masked_fill(~negative, -torch.inf), count), weighted),
    }
    if mix is not None and mix.mixing == "geometric":
        values["hardness_in_force"] = (mix.hardness * scores.share[:, 0], weighted)
    for (one, left), (other, right) in combinations(scores.standardised.items(), 2):
        both_vary = (left != 0).any(dim=1) & (right != 0).any(dim=1)
        values[f"{one}_{other}"] = ((left * right).sum(dim=1) / count, both_vary)
    values["gradient_norm"] = (gradients, every)
    if same is not None:
        values["false_negatives"] = ((same & negative).to(shares.dtype).sum(dim=1) / count, weighted)
        values["weight_on_false_negatives"] = (shares.masked_fill(~same, 0).sum(dim=1), weighted)
    # All values are read from the device at once.
    sums = [part.sum().to(shares.dtype) for value, has in values.values() for part in (value.masked_fill(~has, 0), has)]
    means = zip(values, torch.stack(sums).view(-1, 2).tolist(), strict=True)
    return {**in_force, **{name: total / number for name, (total, number) in means if number}}


def _tasks(contrast: Contrast) -> tuple[TaskGradients, TaskGradients]:
    """Returns the gradients of the tasks by the fast path, which takes a fraction of the time and memory."""
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
    """Returns the share of the weight on the most similar hundredth of each anchor's negatives [r], rounded up."""
    places = similarity.topk((similarity.shape[1] + 99) // 100, dim=1).indices
    hardest = torch.arange(places.shape[1], device=places.device) < ((count + 99) // 100)[:, None]
    return shares.gather(1, places).masked_fill(~hardest, 0).sum(dim=1)


def _same_label(contrast: Contrast, labels: Tensor, rows: slice) -> Tensor:
    """Returns which columns have the label of each anchor, bool [r, m]. Raises a ValueError if that is not known."""
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
        why = (
            "several positives: rows are then parts of samples (regions, nodes), or negatives have other labels anyway"
        )
    if why:
        raise ValueError(f"labels: expected none, since they could not be used, got some with {why}")
    if not b or n % b or m % b:
        hint = "; two views of a sample have one label: labels[::2] if they are adjacent rows" if b == 2 * n else ""
        raise ValueError(
            f"labels: expected one for each sample of the batch, whose number divides those of the anchors ({n}) and "
            f"of the pool ({m}), got {b}{hint}"
        )
    labels = labels.to(contrast.pool.device)
    of_anchors, of_pool = labels.repeat(n // b), labels.repeat(m // b)
    return of_anchors[rows, None] == of_pool


def mean_statistics(statistics: Iterable[dict[str, float]]) -> dict[str, float]:
    """Returns the mean of each statistic over the dictionaries that contain it.

    Args:
        statistics: Dictionaries as `negative_statistics` returns them.

    Returns:
        The means by name.

    Examples:
        >>> mean_statistics([{"count": 2.0}, {"count": 4.0, "effective_number": 1.5}])
        {'count': 3.0, 'effective_number': 1.5}
    """
    by_name: dict[str, list[float]] = {}
    for one in statistics:
        for name, value in one.items():
            by_name.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in by_name.items()}
