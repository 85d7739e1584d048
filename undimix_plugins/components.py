"""The scores of the three properties of a useful hard negative (arXiv 2206.01197, section 3).

They are plain functions of tensors, in closed form. Rows are not normalised: pass rows of length 1 for cosine
similarity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from undimix_plugins.blocks import LEAST_ROWS_AT_ONCE, rows_at_once
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


def anchor_similarity(anchors: Tensor, pool: Tensor) -> Tensor:
    """Returns the similarity of each candidate to each anchor (P1, anchor vicinity): `A_ij = <z_i, z_j>`.

    Args:
        anchors: Embeddings [n, d], floating point.
        pool: The candidates [m, d], same dtype.

    Returns:
        Inner products [n, m], same dtype; in [-1, 1] for rows of length 1.

    Raises:
        ValueError: If shapes, dtypes or devices do not match, or (on the CPU) if a row is not finite.

    References:
        UnDiMix, arXiv 2206.01197, section 3.1.

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
    """Returns the influence of each candidate on each anchor (P2, model uncertainty and influence).

    It is the inner product of their last-layer gradients, `I_ij = <g_i, g_j>`. Each row has a pseudo-labelling task:
    "Which candidate am I aligned with?". The probabilities p are the softmax of its similarities divided by the
    temperature t. The pseudo-label y is the most likely candidate, and the loss is the cross-entropy with y. The
    gradient of this loss with respect to the row, with fixed candidates v, is

        delta = (1/t) * sum over j != y of p_j (v_j - v_y)

    It is small if the model is confident. The candidates of an anchor are all rows of the pool except itself, and its
    positive if that is not in the pool. The candidates of a row of the pool are all anchors except itself. In
    `influence(z, z, temperature=t)`, each view of a batch is compared with all other views.

    If the last layer has inputs h, the gradient with respect to its weight is `delta (outer) h`, so that
    `I_ij = <delta_i, delta_j> <h_i, h_j>`.

    Args:
        anchors: Embeddings [n, d], floating point.
        pool: The candidates [m, d], same dtype.
        temperature: The temperature t, a finite number above 0.
        own_columns: For each anchor its own column in the pool [n], integers, -1 if it is not in the pool. None if the
            pool contains no anchors, or if `anchors` and `pool` are the same tensor object: then anchor i is row i.
        positives: The positive of each anchor [n, d] if the pool does not contain them (a memory bank), otherwise None.
        anchor_inputs: The inputs of the last layer [n, h] that gave `anchors`. None for gradients with respect to the
            embedding.
        pool_inputs: The inputs of the last layer [m, h] that gave `pool`. Pass both inputs or none.

    Returns:
        Inner products of gradients [n, m], same dtype. A row with fewer than two candidates has gradient 0.

    Raises:
        ValueError: If shapes, dtypes or devices do not match, if the temperature is not a finite number above 0, if
            only one of `anchor_inputs` and `pool_inputs` is given, or (on the CPU) if a row is not finite or a column
            is out of range.

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
    """Gradients of pseudo-labelling tasks with a separate scale: `delta = exp(log_scale) * direction / t`.

    The gradient of a confident row can be as small as `exp(-1/t)`. At a temperature of .01 this is below the range of
    float32, and products of two gradients are smaller still. Weights depend only on the ratio of gradients, so they
    are computed within the range.

    Attributes:
        direction: [rows, d].
        log_scale: [rows], at most 0; -inf for a row with fewer than two candidates, whose gradient is 0.
        terms: [rows], the length of the terms summed in `direction`. Multiplied by eps, it is the rounding error.

    Examples:
        >>> gradients = TaskGradients(torch.ones(1, 2), torch.zeros(1), torch.ones(1))
        >>> gradients.at_scale(temperature=0.5)
        tensor([[2., 2.]])
    """

    direction: Tensor
    log_scale: Tensor
    terms: Tensor

    def at_scale(self, temperature: float | Tensor) -> Tensor:
        """Returns the gradients delta [rows, d].

        Args:
            temperature: The temperature t of the tasks, a number above 0 or a scalar tensor.
        """
        return self.log_scale.exp()[:, None] * self.direction / temperature

    def along_sphere(self, rows: Tensor) -> TaskGradients:
        """Returns the gradients with respect to the rows before their normalisation, without their lengths.

        Args:
            rows: The normalised rows [rows, d].

        Returns:
            The gradients projected onto the tangent space of the sphere. To obtain the exact gradients, divide them by
            the lengths of the rows before normalisation.
        """
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
    """Returns the gradients of the tasks of the anchors and of the pool.

    Args:
        anchors: Embeddings [n, d], floating point.
        pool: The candidates [m, d], same dtype.
        temperature: The temperature, a number above 0 or a scalar tensor.
        own_columns: For each anchor its own column in the pool [n], or None, as in `influence`.
        positives: The positive of each anchor [n, d] if the pool does not contain them, otherwise None.
        gathered: Describes a pool that is gathered from several processes, as in `Contrast`.

    Returns:
        The gradients of the n anchors and of the m candidates. With `gathered`, all processes have to call it.

    Examples:
        >>> of_anchors, of_pool = task_gradients(torch.randn(4, 8), torch.randn(6, 8), 0.5, None, None)
        >>> of_anchors.direction.shape, of_pool.direction.shape
        (torch.Size([4, 8]), torch.Size([6, 8]))
    """
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
    # In the self-contrast of a batch, a row has the same task as an anchor and as a candidate.
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

    # If a process's candidates are its anchors, they have the same tasks.
    own_views = gathered is not None and gathered.own_rows is own_columns and positives is None
    second = first if own_views else _by_block(of_pool, len(candidates), len(all_anchors))
    if gathered is None:
        return first, second
    # In one tensor, so that there is a single collective.
    width = second.direction.shape[1]
    together = gathered.gather(torch.cat([second.direction, second.log_scale[:, None], second.terms[:, None]], dim=1))
    return first, TaskGradients(together[:, :width], together[:, width], together[:, width + 1])


def _by_block(of_rows: Callable[[slice], TaskGradients], count: int, width: int) -> TaskGradients:
    step = rows_at_once(width, LEAST_ROWS_AT_ONCE)
    blocks = [of_rows(slice(start, start + step)) for start in range(0, count, step)]
    return TaskGradients(*(torch.cat(part) for part in zip(*blocks, strict=True)))


def _gradients(
    logits: Tensor,
    candidates: Tensor,
    positives: Tensor | None,
    rows: Tensor,
    temperature: float | Tensor,
) -> TaskGradients:
    """Returns the gradients of the tasks of `rows`.

    `logits` [rows, candidates] are -inf in the column of the row itself. `positives` are a further candidate for each.
    """
    # Only differences of candidates count. The mean is subtracted, so that close candidates keep their digits.
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
    # Copies of the label add v_y - v_y = 0. Their rounding error would exceed the other terms.
    is_label = (keys == label_key.T[:, :, None]).all(dim=0).scatter(1, label, True)
    others = logits.masked_fill(is_label, -torch.inf)
    # Probabilities are relative to the second most likely one. 1 - p_label is not computed: its digits would cancel.
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
    """Returns a key for each row [rows], floating point. Equal rows have equal keys.

    Different rows differ in key 0 or in key 1, except by an unlikely coincidence.

    Args:
        rows: Rows [rows, d], floating point.
        number: Which key, 0 or 1.

    Examples:
        >>> equality_key(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), number=0)
        tensor([3., 3.])
    """
    # Sums along each row. The rounding of matrix products, or of sums across rows, depends on the place of a row.
    rows = rows.contiguous()
    if number == 0:
        return rows.sum(dim=1)
    return (rows * torch.arange(1, 1 + rows.shape[1], device=rows.device, dtype=rows.dtype).sin()).sum(dim=1)


def groups(rows: Tensor) -> Tensor | None:
    """Returns a group number for each row [rows], int64. Equal rows have equal numbers.

    The result is None if no two rows are equal. This is only found on the CPU, where values can be read at no cost.

    Args:
        rows: Rows [rows, d], floating point.

    Examples:
        >>> groups(torch.tensor([[1.0, 2.0], [0.0, 1.0], [1.0, 2.0]]))
        tensor([1, 0, 1])
    """
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
    """Returns for each row the index of the first row that equals it.

    Inner products with equal rows may differ by rounding. Ranks and thresholds must not depend on that.

    Args:
        rows: Rows [m, d], floating point.

    Returns:
        Indices [m], int64. None if no two rows are equal, which is only found on the CPU.

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
    """Returns the mean distance of each negative to the anchor's other negatives (P3, diversity).

        V_ij = 1 / (n_i - 1) * sum over k in N_i, k != j, of distance(z_j, z_k)

    N_i are the n_i negatives of anchor i: all columns of the pool except the excluded ones. UnReMix calls this score
    "representativeness".

    Args:
        pool: The candidates [m, d], floating point.
        excluded: For each anchor the columns of the pool that are not its negatives [n, k], integers, padded with -1.
        distance: "cosine" (1 minus the cosine similarity, which is 0 for a row of zeros) or "euclidean".

    Returns:
        Mean distances [n, m], same dtype, at least 0 up to rounding; 0 if an anchor has fewer than two negatives.
        Ignore the values in columns that are not negatives of an anchor.

    Raises:
        ValueError: If the pool is not a matrix of floats, if `excluded` is not an integer tensor [n, k], if `distance`
            is unknown, or (on the CPU) if a row is not finite or a column is out of range.

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
    """Returns `diversity` for the negatives that a mask marks.

    Args:
        pool: The candidates [m, d], floating point.
        negative: Which columns are negatives of an anchor, bool [n, m].
        distance: "cosine" or "euclidean".

    Returns:
        Mean distances [n, m], same dtype as `pool`. Ignore the values in columns that are not negatives.

    Examples:
        >>> mean_distances(torch.tensor([[0.0], [3.0], [5.0]]), torch.ones(1, 3, dtype=torch.bool), "euclidean")
        tensor([[4.0000, 2.5000, 3.5000]])
    """
    among = negative.to(pool.dtype)
    count = among.sum(dim=1, keepdim=True)
    others = (count - 1).clamp(min=1)
    if distance == "cosine":
        unit = torch.nn.functional.normalize(pool, dim=1)
        # The mean is subtracted, so that close rows keep their digits: <z_j, sum> = <x_j, sum> + <mean, sum>, and the
        # last term is the same for every j. The distance of a row to itself, 1 - |z_j|^2, is left out.
        mean = unit.mean(dim=0)
        total = among @ unit
        own = unit.square().sum(dim=1)
        mean_distance = (others - total @ mean[:, None]) / others - (total @ (unit - mean).T - own) / others
    else:
        step = rows_at_once(len(pool), LEAST_ROWS_AT_ONCE)
        blocks = zip(torch.split(pool, step), torch.split(among, step, dim=1), strict=True)
        mean_distance = torch.zeros_like(among)
        for rows, weight in blocks:
            mean_distance = mean_distance + weight @ euclidean_distances(rows, pool)
        mean_distance = mean_distance / others
    return torch.where(count > 1, mean_distance, torch.zeros_like(mean_distance))


def euclidean_distances(left: Tensor, right: Tensor) -> Tensor:
    """Returns Euclidean distances, computed from differences.

    `|a|^2 + |b|^2 - 2ab` would be dominated by rounding errors for near-duplicates.

    Args:
        left: Rows [l, d], floating point.
        right: Rows [r, d], same dtype.

    Returns:
        Distances [l, r], same dtype.

    Examples:
        >>> euclidean_distances(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([[5.]])
    """
    return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")
