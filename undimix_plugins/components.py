"""The three properties of a useful hard negative, a score each (arXiv 2206.01197, section 3).

Plain functions on tensors, in closed form. The rows are used as they stand: pass rows of length 1 for cosines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from undimix_plugins.blocks import rows_at_once
from undimix_plugins.checks import (
    check_choice,
    check_columns,
    check_embeddings,
    check_inputs,
    check_number,
    check_same_length,
    values_are_free,
)
from undimix_plugins.columns import is_not_among
from undimix_plugins.contrast import GatheredPool
from undimix_plugins.rows import full_precision

LEAST_ROWS = 16  # of a block of tasks or distances


def anchor_similarity(anchors: Tensor, pool: Tensor) -> Tensor:
    """P1, anchor vicinity: `A_ij = <z_i, z_j>`.

    Args:
        anchors: Embeddings [n, d], floating point.
        pool: The candidates [m, d], same dtype.

    Returns:
        Inner products [n, m], same dtype; in [-1, 1] for rows of length 1.

    Raises:
        ValueError: For shapes, dtypes or devices that do not fit, or (on the CPU) non-finite rows.

    Examples:
        >>> z = torch.eye(3)
        >>> anchor_similarity(z[:1], z)
        tensor([[1., 0., 0.]])
    """
    check_embeddings(anchors=anchors, pool=pool)
    with full_precision(pool):
        return anchors @ pool.T


def influence(
    anchors: Tensor,
    pool: Tensor,
    *,
    temperature: float,
    own_columns: Tensor | None = None,
    positives: Tensor | None = None,
    anchor_inputs: Tensor | None = None,
    pool_inputs: Tensor | None = None,
) -> Tensor:
    """P2, model uncertainty and influence: `I_ij = <g_i, g_j>`, inner products of last-layer gradients.

    Each row's pseudo-labelling task is "which candidate am I aligned with?": its probabilities p are the softmax of
    its similarities over the temperature t, its pseudo-label y is the argmax, its loss the cross-entropy with that
    label. The gradient of that loss at the row itself (the candidates held fixed) is

        delta = (1/t) * sum over j != y of p_j (v_j - v_y),

    a small one where the model is confident. An anchor's candidates are the pool but itself, plus its positive where
    that is no row of the pool; a pool row's candidates are the anchors but itself. `influence(z, z, temperature=t)` is
    the self-contrast of one batch of views: each pseudo-labels itself against all others.

    With the last layer's inputs h, the gradient at its weight is `delta (outer) h`, so
    `I_ij = <delta_i, delta_j> <h_i, h_j>`.

    Args:
        anchors: Embeddings [n, d], floating point.
        pool: The candidates [m, d], same dtype.
        temperature: A finite number above 0.
        own_columns: The anchors' own columns in the pool [n], integers, -1 where there is none. None for no anchor at
            all, except where `anchors` and `pool` are the same tensor object: then anchor i is row i.
        positives: The anchors' positives [n, d] where these are no rows of the pool (a memory bank), else None.
        anchor_inputs: The last layer's inputs [n, h] behind `anchors`; None for the gradient at the embedding.
        pool_inputs: Likewise for the pool [m, h].

    Returns:
        Inner products of gradients [n, m], same dtype. A row without candidates has gradient 0.

    Raises:
        ValueError: For shapes, dtypes or devices that do not fit, a temperature that is no finite number above 0,
            inputs of the last layer for one side alone, or (on the CPU) non-finite rows or columns out of range.

    References:
        UnDiMix, arXiv 2206.01197, section 3.1 (model-based component).

    Examples:
        >>> z = torch.nn.functional.normalize(torch.randn(6, 16), dim=1)
        >>> influence(z, z, temperature=0.5).shape
        torch.Size([6, 6])
    """
    check_embeddings(anchors=anchors, pool=pool)
    temperature = check_number("temperature", temperature, above=0)
    if positives is not None:
        check_embeddings(anchors=anchors, positives=positives)
        check_same_length(anchors=anchors, positives=positives)
    if own_columns is not None:
        own_columns = check_columns("own_columns", own_columns, shape=(len(anchors),), pool=pool)
    check_inputs(anchors, pool, anchor_inputs, pool_inputs)
    with full_precision(pool):
        of_anchors, of_pool = task_gradients(anchors, pool, temperature, own_columns, positives)
        inner = of_anchors.at_scale(temperature) @ of_pool.at_scale(temperature).T
        if anchor_inputs is None or pool_inputs is None:
            return inner
        return inner * (anchor_inputs.to(inner.dtype) @ pool_inputs.to(inner.dtype).T)


class TaskGradients(NamedTuple):
    """Gradients of the pseudo-labelling tasks, with their scale apart: `delta = exp(log_scale) * direction / t`.

    A confident row's gradient is as small as `exp(-1/t)`, below float32 at a temperature of .01, and products of two
    are smaller still. Weights only need gradients relative to each other, so these never leave the range.

    Attributes:
        direction: [rows, d].
        log_scale: [rows], at most 0; -inf for a row with fewer than two candidates, whose gradient is 0.
        terms: [rows], the length of the terms summed in `direction`: times eps, its rounding error.
    """

    direction: Tensor
    log_scale: Tensor
    terms: Tensor

    def at_scale(self, temperature: float | Tensor) -> Tensor:
        """The gradients themselves, delta [rows, d]."""
        return self.log_scale.exp()[:, None] * self.direction / temperature

    def along_sphere(self, rows: Tensor) -> TaskGradients:
        """The same through the normalisation that made the rows [rows, d], but for their lengths before it."""
        along = self.direction - rows * (rows * self.direction).sum(dim=1, keepdim=True)
        return self._replace(direction=along)


def task_gradients(
    anchors: Tensor,
    pool: Tensor,
    temperature: float | Tensor,
    own_columns: Tensor | None,
    positives: Tensor | None,
    gathered: GatheredPool | None = None,
) -> tuple[TaskGradients, TaskGradients]:
    """The gradients of the anchors' tasks and of the pool's; arguments as `influence` and `Contrast` have them."""
    self_contrast = own_columns is None and anchors is pool
    columns = torch.arange(len(pool), device=pool.device)
    if self_contrast:
        own_columns = columns

    def of_anchors(rows: slice) -> TaskGradients:
        logits = anchors[rows] @ pool.T / temperature
        if own_columns is not None:
            logits = logits.masked_fill(columns == own_columns[rows, None], -torch.inf)
        own = None if positives is None else positives[rows]
        return _gradients(logits, pool, own, anchors[rows], temperature)

    first = _by_block(of_anchors, len(anchors), len(pool))
    # A row's task is the same on either side of one batch with itself.
    if self_contrast and positives is None:
        return first, first
    of_all_anchors, own_rows, all_anchors = own_columns, columns, anchors
    if gathered is not None:
        of_all_anchors, own_rows = gathered.own_columns, gathered.own_rows
        all_anchors = gathered.anchors if isinstance(gathered.anchors, Tensor) else gathered.anchors()
    candidates = pool if gathered is None else pool[gathered.own_rows]

    def of_pool(rows: slice) -> TaskGradients:
        logits = candidates[rows] @ all_anchors.T / temperature
        if of_all_anchors is not None:
            logits = logits.masked_fill(own_rows[rows, None] == of_all_anchors, -torch.inf)
        return _gradients(logits, all_anchors, None, candidates[rows], temperature)

    # Where a process's candidates are its anchors, their tasks are these.
    own_views = gathered is not None and gathered.own_rows is own_columns and positives is None
    second = first if own_views else _by_block(of_pool, len(candidates), len(all_anchors))
    if gathered is None:
        return first, second
    # In one piece: a collective for each would cost as many waits.
    width = second.direction.shape[1]
    together = gathered.gather(torch.cat([second.direction, second.log_scale[:, None], second.terms[:, None]], dim=1))
    return first, TaskGradients(together[:, :width], together[:, width], together[:, width + 1])


def _by_block(of_rows: Callable[[slice], TaskGradients], count: int, width: int) -> TaskGradients:
    step = rows_at_once(width, LEAST_ROWS)
    blocks = [of_rows(slice(start, start + step)) for start in range(0, count, step)]
    return TaskGradients(*(torch.cat(part) for part in zip(*blocks, strict=True)))


def _gradients(
    logits: Tensor,
    candidates: Tensor,
    positives: Tensor | None,
    rows: Tensor,
    temperature: float | Tensor,
) -> TaskGradients:
    """`logits` [rows, candidates] of the shared candidates, -inf for the row itself; `positives` a further one each."""
    # Differences of candidates are all that counts: taken about the mean, they keep their digits when concentrated.
    m, centre, longest = len(candidates), candidates.mean(dim=0), candidates.norm(dim=1).amax()
    candidates, key = candidates - centre, _keys(candidates)
    keys = key.T[:, None]
    if positives is not None:
        logits = torch.cat([logits, (rows * positives).sum(1, keepdim=True) / temperature], dim=1)
        own_longest, own_key = positives.norm(dim=1).amax(), _keys(positives)
        positives = positives - centre
        keys = torch.cat([keys.expand(-1, len(rows), -1), own_key.T[:, :, None]], dim=2)
    top, label = logits.max(dim=1, keepdim=True)
    most_likely, label_key = (shared[label[:, 0].clamp(max=m - 1)] for shared in (candidates, key))
    if positives is not None:
        most_likely = torch.where(label < m, most_likely, positives)
        label_key = torch.where(label < m, label_key, own_key)
    # What is the label over again adds v_y - v_y; beside it, rounding would leave nothing of the other terms.
    is_label = (keys == label_key.T[:, :, None]).all(dim=0).scatter(1, label, True)
    others = logits.masked_fill(is_label, -torch.inf)
    # Probabilities relative to the second likeliest: 1 - p_label is never formed, so that nothing cancels.
    second = others.amax(dim=1, keepdim=True)
    second = second.masked_fill(second.isneginf(), 0)
    relative = (others - second).exp()
    total = relative.sum(dim=1, keepdim=True)
    top = top.masked_fill(top.isneginf(), 0)
    log_label = top + (logits - top).exp().masked_fill(~is_label, 0).sum(dim=1, keepdim=True).log()
    log_scale = second - torch.logaddexp(log_label, second + total.log())

    expected = relative[:, :m] @ candidates
    if positives is not None:
        expected = expected + relative[:, m:] * positives
        longest = torch.maximum(longest, own_longest)
    return TaskGradients(
        direction=expected - total * most_likely,
        log_scale=log_scale.masked_fill(total == 0, -torch.inf)[:, 0],
        terms=(total * longest)[:, 0],
    )


def _keys(rows: Tensor) -> Tensor:
    return torch.stack([equality_key(rows, 0), equality_key(rows, 1)], dim=1)


def equality_key(rows: Tensor, number: int) -> Tensor:
    """A number for each row [rows] that equal rows share; two of them (0 and 1) no others share, but for a freak."""
    # Sums along each row, not matrix products or sums across rows, whose rounding depends on where a row stands.
    rows = rows.contiguous()
    if number == 0:
        return rows.sum(dim=1)
    return (rows * torch.arange(1, 1 + rows.shape[1], device=rows.device, dtype=rows.dtype).sin()).sum(dim=1)


def groups(rows: Tensor) -> Tensor | None:
    """A number for each row [rows] that equal ones share, or None where a look is free and shows none equal."""
    first = equality_key(rows, 0)
    ordered = first.sort().values
    if values_are_free(rows) and bool((ordered[1:] != ordered[:-1]).all()):
        return None
    second = equality_key(rows, 1)
    order = second.argsort()
    order = order[first[order].argsort(stable=True)]
    new = (first[order].diff() != 0) | (second[order].diff() != 0)
    if values_are_free(rows) and bool(new.all()):
        return None
    return torch.zeros_like(order).scatter(0, order, torch.cat([new.new_zeros(1), new]).cumsum(0))


@torch.no_grad()
def first_copies(rows: Tensor) -> Tensor | None:
    """For each row the first that equals it [rows], or None where a look is free and shows no equal ones.

    Products with equal rows may differ by rounding, on which no rank and no cut is to depend.

    Examples:
        >>> first_copies(torch.tensor([[1.0, 2.0], [0.0, 1.0], [1.0, 2.0]]))
        tensor([0, 1, 0])
    """
    group = groups(rows)
    if group is None:
        return None
    places = torch.arange(len(rows), device=rows.device)
    return torch.full_like(places, len(rows)).scatter_reduce(0, group, places, "amin")[group]


def diversity(pool: Tensor, excluded: Tensor, *, distance: str = "cosine") -> Tensor:
    """P3, diversity ("representativeness" in UnReMix): mean distance to the anchor's other negatives.

        V_ij = 1 / (n_i - 1) * sum over k in N_i, k != j, of distance(z_j, z_k),

    with N_i the n_i negatives of anchor i: the pool but its excluded columns.

    Args:
        pool: The candidates [m, d], floating point.
        excluded: Columns of the pool that are no negatives for an anchor [n, k], integers, padded with -1.
        distance: "cosine" (1 minus the cosine, which is 0 with a row of zeros) or "euclidean".

    Returns:
        Mean distances [n, m], at least 0 up to rounding; 0 where an anchor has fewer than two negatives. Columns
        that are no negatives of an anchor hold no meaningful value.

    Raises:
        ValueError: For a pool that is no matrix of floats, columns that are no integers [n, k] or (on the CPU) out of
            range, or an unknown distance.

    References:
        UnDiMix, arXiv 2206.01197, section 3.1 (density-based component).

    Examples:
        >>> pool = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> diversity(pool, torch.tensor([[-1]]))
        tensor([[0.5000, 0.5000, 1.0000]])
    """
    check_embeddings(pool=pool)
    check_choice("distance", distance, ("cosine", "euclidean"))
    excluded = check_columns("excluded", excluded, shape=(None, None), pool=pool)
    with full_precision(pool):
        return mean_distances(pool, is_not_among(excluded, len(pool)), distance)


def mean_distances(pool: Tensor, negative: Tensor, distance: str) -> Tensor:
    """`diversity`, given which columns are an anchor's negatives, bool [n, m]."""
    among = negative.to(pool.dtype)
    count = among.sum(dim=1, keepdim=True)
    others = (count - 1).clamp(min=1)
    if distance == "cosine":
        unit = torch.nn.functional.normalize(pool, dim=1)
        # About their mean, rows keep their digits when concentrated: <z_j, sum> = <x_j, sum> + <mean, sum>, and the
        # last is the same for every j. A row's own distance to itself, which is left out, is 1 less its squared length.
        mean = unit.mean(dim=0)
        total = among @ unit
        own = unit.square().sum(dim=1)
        mean_distance = (others - total @ mean[:, None]) / others - (total @ (unit - mean).T - own) / others
    else:
        step = rows_at_once(len(pool), LEAST_ROWS)
        blocks = zip(torch.split(pool, step), torch.split(among, step, dim=1), strict=True)
        mean_distance = torch.zeros_like(among)
        for rows, weight in blocks:
            mean_distance = mean_distance + weight @ euclidean_distances(rows, pool)
        mean_distance = mean_distance / others
    return torch.where(count > 1, mean_distance, torch.zeros_like(mean_distance))


def euclidean_distances(left: Tensor, right: Tensor) -> Tensor:
    """Distances [l, r], each formed from differences: `|a|^2 + |b|^2 - 2ab` is noise for near-duplicates."""
    return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")
