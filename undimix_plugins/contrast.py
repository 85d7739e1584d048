"""What is compared: anchors, their positives and the pool of negatives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from undimix_plugins.checks import (
    FLOATS,
    check_columns,
    check_embeddings,
    check_finite,
    check_inputs,
    check_kinds,
    check_lengths,
    check_number,
    check_same_length,
    largest_product,
    values_are_free,
)
from undimix_plugins.distributed import gather_parts, processes

# From a block of r anchors to marks on the pool, bool [r, m].
Verdicts = Callable[[slice], Tensor]

WIDE = 64  # columns that are listed for an anchor, beyond which marks on the whole pool are cheaper
MARKED_AT_ONCE = 2**22  # pairs of anchors and candidates whose marks are counted


@dataclass(frozen=True)
class Everyone:
    """What makes a contrast with a pool gathered from all processes the same as on one process.

    A candidate's pseudo-labelling task is which anchor it is aligned with: all processes' anchors. Each process works
    out the tasks of its own candidates, and the results are gathered.

    Attributes:
        anchors: All processes' anchors [N, d], constants; or a function that gathers them, which all processes call.
        itself: Those anchors' own columns in the pool [N], -1 where there is none; None for no anchor at all.
        own: This process's own rows of the pool [p]; the contrast's `itself` where these are its anchors.
        gather: From numbers for this process's rows [p, k] to those for the whole pool [m, k], without gradient.
    """

    anchors: Tensor | Callable[[], Tensor]
    itself: Tensor | None
    own: Tensor
    gather: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Contrast:
    """Anchors, a positive for each, and the pool that their negatives come from.

    The similarity of two rows is their inner product *as they stand here*: an adapter whose host compares by cosine
    passes rows of length 1. Rows in half precision are converted to float32 (gradients flow back through that).

    Attributes:
        anchors: Embeddings [n, d], floating point.
        positives: Each anchor's positive [n, d]; or, where the pool holds them, their columns [n, p], integers padded
            with -1: several, one or none. They are no negatives then, all stand in the denominator, and what is read
            here is their mean [n, d].
        pool: The candidates [m, d]: the batch's views, a memory bank, all documents.
        excluded: Columns of the pool that are no negatives for an anchor [n, k], integers, padded with -1: itself,
            its positive, duplicates, known false negatives. None excludes nothing. A column may stand twice.
        temperature: What similarities are divided by, a finite number above 0, or a tensor of one (a parameter that is
            learned, a number that another device holds), which gets its gradient.
        itself: The anchors' own columns in the pool [n], -1 where there is none; None for no anchor at all, except
            where `anchors` and `pool` are the same tensor object: then anchor i is row i. An anchor is never its own
            negative, so these need not stand in `excluded`.
        positives_in_pool: Whether the pool holds the positives too (those then belong in `excluded`). Defaults to
            whether `anchors` and `pool` are the same tensor object. A memory bank holds none.
        anchor_inputs: Inputs of the last layer [n, h], whose outputs the anchors are; `gradient="weight"` needs them.
        pool_inputs: Likewise for the pool [m, h].
        normalized: Whether anchors and pool are the last layer's outputs brought to length 1, and its inputs divided by
            those outputs' lengths: gradients at its weight then go through that too.
        verdicts: Further columns that are no negatives, too many or too scattered to be listed (a guide model's, rows
            of the same class, duplicates): a function from a block of r anchors to marks, bool [r, m]. It is asked
            for a block several times, and has to say the same. None marks nothing.
        everyone: Where the pool is gathered from several processes, what it needs of them; None for this process's
            own contrast.
        anchor_weights: How much each anchor's loss counts in the mean over all [n], constants
            of at least 0; None for 1 each.
        positive_columns: The positives' columns [n, p], where `positives` gave those, or `with_positives`; else None.
        has_own_positive: Whether `positives` is a positive itself, beside those of the columns.

    Raises:
        ValueError: For tensors that are no matrices, that are empty, or whose widths, lengths, dtypes or devices
            differ; a temperature that is no finite number above 0. On the CPU also for non-finite rows and columns
            out of range; on other devices, where looking would cost a synchronisation, a non-finite row makes the
            loss NaN.

    Examples:
        >>> z = torch.nn.functional.normalize(torch.randn(6, 16), dim=1)
        >>> positive_of = torch.tensor([3, 4, 5, 0, 1, 2])
        >>> contrast = Contrast(z, z[positive_of], z, positive_of[:, None], temperature=0.5)
        >>> contrast.count.tolist()
        [4.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    """

    anchors: Tensor
    positives: Tensor
    pool: Tensor
    excluded: Tensor | None
    temperature: float | Tensor
    itself: Tensor | None = None
    positives_in_pool: bool | None = None
    anchor_inputs: Tensor | None = None
    pool_inputs: Tensor | None = None
    normalized: bool = False
    verdicts: Verdicts | None = None
    everyone: Everyone | None = None
    anchor_weights: Tensor | None = None
    positive_columns: Tensor | None = field(init=False, default=None)
    has_own_positive: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        by_column = isinstance(self.positives, Tensor) and not self.positives.is_floating_point()
        rows = {"anchors": self.anchors, "positives": self.positives, "pool": self.pool}
        rows = {name: of for name, of in rows.items() if name != "positives" or not by_column}
        lengths = check_finite(**rows)
        check_inputs(self.anchors, self.pool, self.anchor_inputs, self.pool_inputs)
        one_batch = self.anchors is self.pool
        n, device = len(self.anchors), self.anchors.device
        if isinstance(self.temperature, Tensor):
            self._set("temperature", checked_temperature(self.temperature, self.pool.dtype))
        else:
            self._set("temperature", check_number("temperature", self.temperature, above=0))
        if lengths:
            check_lengths(rows, lengths)
            self._check_that_logits_fit(lengths)

        pool = as_full_precision(self.pool)
        self._set("anchors", pool if one_batch else as_full_precision(self.anchors))
        self._set("pool", pool)
        if by_column:
            columns = check_columns("positives", self.positives, shape=(n, None), pool=pool)
            if columns.shape[1] == 0:  # none at all
                columns = columns.new_full((n, 1), -1)
            self._set("positive_columns", distinct(columns))
            self._set("has_own_positive", False)
            self._set("positives", self._mean_positives())
            self._set("positives_in_pool", True)
        else:
            check_same_length(anchors=self.anchors, positives=self.positives)
            self._set("positives", as_full_precision(self.positives))
        if self.positives_in_pool is None:
            self._set("positives_in_pool", one_batch)
        if self.anchor_inputs is not None and self.pool_inputs is not None:
            self._set("anchor_inputs", self.anchor_inputs.to(pool.dtype))
            self._set("pool_inputs", self.pool_inputs.to(pool.dtype))
        if self.anchor_weights is not None:
            self._set("anchor_weights", checked_anchor_weights(self.anchor_weights, self.anchors))

        excluded = torch.empty(n, 0, dtype=torch.long, device=device)
        if self.excluded is not None:
            excluded = check_columns("excluded", self.excluded, shape=(n, None), pool=self.pool)
        if self.positive_columns is not None:
            excluded = torch.cat([excluded, self.positive_columns], dim=1)
        excluded = distinct(excluded)
        itself = None
        if self.itself is not None:
            self._set("itself", check_columns("itself", self.itself, shape=(n,), pool=self.pool))
            itself = self.itself[:, None]
        elif one_batch:
            itself = torch.arange(n, device=device)[:, None]
        if itself is not None:
            excluded = torch.cat([excluded.masked_fill(excluded == itself, -1), itself], dim=1)
        self._set("excluded", excluded)
        self._let_gradients_through_the_temperature()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen for everybody else

    def _check_that_logits_fit(self, lengths: dict[str, float]) -> None:
        """A ValueError for rows and a temperature whose logits could overflow; from bounds, if these are low enough."""
        bound, temperature = largest_product(self.pool.dtype), float(self.held_temperature)
        others = [name for name in lengths if name != "anchors"]
        if lengths["anchors"] * max(lengths[name] for name in others) <= bound * temperature:
            return
        of = {name: getattr(self, name).detach().norm(dim=1, dtype=torch.float64).max().item() for name in lengths}
        other = max(others, key=of.__getitem__)
        if of["anchors"] * of[other] > bound * temperature:
            raise ValueError(
                f"temperature: expected similarities over it up to {bound:.0e}, got {temperature!r} with anchors of "
                f"length {of['anchors']:.2g} and {other} of length {of[other]:.2g}"
            )

    def _mean_positives(self) -> Tensor:
        assert self.positive_columns is not None
        count = (self.positive_columns >= 0).sum(dim=1, keepdim=True).clamp(min=1)
        return sum_of_rows(self.pool, self.positive_columns) / count

    def _let_gradients_through_the_temperature(self) -> None:
        """Logits are bilinear in the rows, so that a factor of 1 on these carries the temperature's whole gradient."""
        if not isinstance(self.temperature, Tensor) or not self.temperature.requires_grad:
            return
        one = self.held_temperature / self.temperature
        if self.anchors is self.pool:
            one = one.sqrt()  # on either side
            self._set("pool", self.pool * one)
            self._set("anchors", self.pool)
            self._set("positives", self.positives * one)
        else:
            self._set("anchors", self.anchors * one)

    @property
    def held_temperature(self) -> float | Tensor:
        """The temperature as a constant, which its gradient passes by, through the rows."""
        return self.temperature.detach() if isinstance(self.temperature, Tensor) else self.temperature

    def logits(self, rows: slice, copies: Tensor | None = None) -> Tensor:
        """Similarities over the temperature of a block of r anchors to the whole pool: [r, m].

        With `copies`, the columns of `first_copies(pool)` [m], those of equal candidates are equal to the last digit.
        """
        with full_precision(self.pool):
            logits = self.anchors[rows] @ self.pool.T / self.held_temperature
        return logits if copies is None else logits[:, copies]

    def own_positive_logits(self) -> Tensor:
        """The similarities of `positives` over the temperature [n]."""
        return (self.anchors * self.positives).sum(dim=1) / self.held_temperature

    def positive_logits(self) -> Tensor:
        """The positives' similarities over the temperature [n], the mean of several, 0 for none."""
        own, columns = self.own_positive_logits(), self.positive_columns
        if columns is None or not self.has_own_positive:
            return own
        further = (self.anchors * sum_of_rows(self.pool, columns)).sum(dim=1) / self.held_temperature
        return (own + further) / (1 + (columns >= 0).sum(dim=1))

    def without(self, columns: Tensor | None = None, verdicts: Verdicts | None = None) -> Contrast:
        """The same with fewer negatives.

        Args:
            columns: Those to leave out, for each anchor [n, k], integers, padded with -1.
            verdicts: Further ones, as the class has them.

        Returns:
            Another Contrast of the same tensors.

        Examples:
            >>> contrast = in_batch_negatives(torch.randn(4, 8), torch.randn(4, 8), temperature=0.05)
            >>> contrast.without(torch.tensor([[1], [-1], [-1], [-1]])).count.tolist()
            [2.0, 3.0, 3.0, 3.0]
        """
        new = copy.copy(self)
        if columns is not None:
            assert self.excluded is not None
            columns = check_columns("columns", columns, shape=(len(self.anchors), None), pool=self.pool)
            new._set("excluded", distinct(torch.cat([self.excluded, columns], dim=1)))
        if verdicts is not None:
            new._set("verdicts", verdicts if self.verdicts is None else partial(_either, self.verdicts, verdicts))
        return new

    def with_positives(self, columns: Tensor) -> Contrast:
        """The same with more positives, beside those that anchors have, which are no negatives then.

        Args:
            columns: Negatives of each anchor in the pool [n, k], integers, padded with -1; those that are none are left
                as they are.

        Returns:
            Another Contrast of the same tensors.

        Examples:
            >>> contrast = in_batch_negatives(torch.randn(4, 8), torch.randn(4, 8), temperature=0.05)
            >>> contrast.with_positives(torch.tensor([[1], [-1], [-1], [-1]])).positive_columns.tolist()
            [[1], [-1], [-1], [-1]]
        """
        new, columns = self.without(columns), columns.long()
        if columns.shape[1] == 0:
            return new
        assert self.excluded is not None
        none = (columns[:, :, None] == self.excluded[:, None]).any(dim=2)
        columns = columns.masked_fill(none, -1)
        if self.positive_columns is not None:
            columns = torch.cat([self.positive_columns, columns], dim=1)
        new._set("positive_columns", distinct(columns))
        if not self.has_own_positive:
            new._set("positives", new._mean_positives())
        return new

    def is_negative(self, rows: slice) -> Tensor:
        """Which columns of the pool are negatives for a block of anchors: bool [r, m]."""
        assert self.excluded is not None
        negative = is_not_among(self.excluded[rows], len(self.pool))
        return negative if self.verdicts is None else negative & ~self.marked(rows)

    def marked(self, rows: slice) -> Tensor:
        """The verdicts on a block of anchors, bool [r, m]; a ValueError for marks that are none."""
        assert self.verdicts is not None
        marks = self.verdicts(rows)
        shape = [len(self.anchors[rows]), len(self.pool)]
        if not isinstance(marks, Tensor) or list(marks.shape) != shape or marks.dtype != torch.bool:
            came = f"{marks.dtype} {list(marks.shape)}" if isinstance(marks, Tensor) else type(marks).__name__
            raise ValueError(f"verdicts: expected bool {shape} (anchors of the block, pool), got {came}")
        return marks

    @property
    def is_own_pool(self) -> bool:
        """Whether the anchors are the pool, anchor i its row i."""
        return self.anchors is self.pool and self.itself is None

    @property
    def count(self) -> Tensor:
        """How many negatives each anchor has: [n], in the embeddings' dtype."""
        assert self.excluded is not None
        if self.verdicts is None:
            return (len(self.pool) - (self.excluded >= 0).sum(dim=1)).to(self.pool.dtype)
        step = max(1, MARKED_AT_ONCE // len(self.pool))
        blocks = (slice(start, start + step) for start in range(0, len(self.anchors), step))
        return torch.cat([self.is_negative(rows).sum(dim=1) for rows in blocks]).to(self.pool.dtype)


def holds_all_anchors(contrast: Contrast) -> bool:
    """Whether what the influence needs of other processes is in the contrast, with its pool."""
    everyone = contrast.everyone
    if everyone is None or isinstance(everyone.anchors, Tensor):
        return True
    return everyone.itself is not None and bool((everyone.itself >= 0).all())


def alone(contrast: Contrast) -> Contrast:
    """The same, which asks nothing of other processes, so that they need not call; the influence may raise then."""
    everyone, pool = contrast.everyone, contrast.pool.detach()
    if everyone is None:
        return contrast
    anchors = everyone.anchors
    if not isinstance(anchors, Tensor):
        anchors = pool[everyone.itself] if holds_all_anchors(contrast) else _not_here
    every = torch.arange(len(pool), device=pool.device)
    new = copy.copy(contrast)
    new._set("everyone", Everyone(anchors, everyone.itself, every, lambda rows: rows))
    return new


def _not_here() -> Tensor:
    raise ValueError(
        "contrast: expected all processes' anchors in it, which the influence needs where one process looks alone, got "
        "a pool gathered without them; use UnDiMix(influence=0), or a loss that does not gather"
    )


def in_batch_negatives(anchors: Tensor, positives: Tensor, temperature: float | Tensor, **further: Any) -> Contrast:
    """The contrast of every anchor against all positives, those of the others being its negatives.

    Args:
        anchors: Embeddings [n, d].
        positives: Each anchor's positive [n, d], the pool of all.
        temperature: What similarities are divided by, as `Contrast` has it.
        further: Of `Contrast`: `verdicts`, `anchor_weights`, the last layer's inputs.

    Returns:
        A Contrast of n anchors with a pool of n, which holds no anchor.

    Raises:
        ValueError: As `Contrast` does.

    Examples:
        >>> contrast = in_batch_negatives(torch.randn(4, 8), torch.randn(4, 8), temperature=0.05)
        >>> contrast.pool.shape, contrast.count[0].item()
        (torch.Size([4, 8]), 3.0)
    """
    check_kinds(anchors=anchors, positives=positives)
    own = torch.arange(len(anchors), device=anchors.device)
    return Contrast(anchors, positives, positives, own[:, None], temperature, positives_in_pool=True, **further)


def two_views(
    first: Tensor,
    second: Tensor,
    temperature: float | Tensor,
    *,
    gathered: tuple[Tensor, Tensor] | None = None,
    offset: int = 0,
    **further: Any,
) -> Contrast:
    """The contrast of SimCLR: every view against all views of the other samples.

    Args:
        first: A view of each sample [n, d].
        second: The other view of each sample [n, d].
        temperature: What similarities are divided by, as `Contrast` has it.
        gathered: The two views of all processes' samples, each [N, d]; None for one process.
        offset: The place of this process's first sample among the gathered ones.
        further: Of `Contrast`: `verdicts`, `anchor_weights`, the last layer's inputs.

    Returns:
        A Contrast of 2n anchors (first views, then second) with a pool of 2N (likewise).

    Raises:
        ValueError: As `Contrast` does; for gathered views that differ in length, or an offset outside of them.

    Examples:
        >>> contrast = two_views(torch.randn(4, 8), torch.randn(4, 8), temperature=0.5)
        >>> contrast.pool.shape, contrast.count[0].item()
        (torch.Size([8, 8]), 6.0)
    """
    check_embeddings(first=first, second=second)
    check_same_length(first=first, second=second)
    if gathered is not None:
        check_embeddings(first=first, **{f"gathered[{view}]": rows for view, rows in enumerate(gathered)})
        check_same_length(**{f"gathered[{view}]": rows for view, rows in enumerate(gathered)})
    # In full precision first: autocast has no `cat` of a half precision other than its own.
    first, second = as_full_precision(first), as_full_precision(second)
    pool = views = torch.cat([first, second])
    if gathered is not None:
        pool = torch.cat([as_full_precision(rows) for rows in gathered])
    most = len(pool) // 2 - len(first)
    if not 0 <= offset <= most:
        raise ValueError(f"offset: expected a place from 0 to {most} among the gathered samples, got {offset}")
    own = torch.arange(len(first), device=first.device) + offset
    other = own + len(pool) // 2
    itself = None if gathered is None else torch.cat([own, other])
    if itself is not None and len(pool) == processes() * len(views) > len(views):
        constant, every = pool.detach(), torch.arange(len(pool), device=pool.device)
        further["everyone"] = Everyone(constant, every, itself, partial(gather_parts, parts=2))
    return Contrast(
        views,
        torch.cat([second, first]),
        pool,
        excluded=torch.cat([other, own])[:, None],
        temperature=temperature,
        itself=itself,
        positives_in_pool=True,
        **further,
    )


def _either(one: Verdicts, other: Verdicts, rows: slice) -> Tensor:
    return one(rows) | other(rows)


def same_label(of_anchors: Tensor, of_pool: Tensor) -> Verdicts:
    """Verdicts for a `Contrast`: a candidate with an anchor's label is no negative of it.

    Args:
        of_anchors: A label for each anchor [n]: a class, or a key that a text or an image has alone.
        of_pool: A label for each candidate [m].

    Returns:
        A function from a block of r anchors to marks, bool [r, m].

    Raises:
        ValueError: For labels that are no vectors, or on different devices.

    Examples:
        >>> labels = torch.tensor([0, 1, 0])
        >>> same_label(labels, labels)(slice(0, 1))
        tensor([[ True, False,  True]])
    """
    for name, labels in (("of_anchors", of_anchors), ("of_pool", of_pool)):
        if not isinstance(labels, Tensor) or labels.dim() != 1:
            came = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"{name}: expected a label for each row, of shape [rows], got {came}")
    if of_anchors.device != of_pool.device:
        raise ValueError(f"of_pool: expected device {of_anchors.device}, as of_anchors has, got {of_pool.device}")
    return lambda rows: of_anchors[rows, None] == of_pool


def remembered(verdicts: Verdicts, contrast: Contrast) -> Verdicts:
    """Verdicts that cost much, worked out once where the marks of the whole contrast are few enough to be kept."""
    if len(contrast.anchors) * len(contrast.pool) > MARKED_AT_ONCE:
        return verdicts
    marks = verdicts(slice(0, len(contrast.anchors)))
    return lambda rows: marks[rows]


def as_full_precision(rows: Tensor) -> Tensor:
    """The rows in float32 where they came in half precision, else as they are.

    Normalise after this, not before: in half precision a tiny row's length is 0 or its square underflows.
    """
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


def unit_rows(**embeddings: Tensor) -> list[Tensor]:
    """Embeddings at length 1, in full precision.

    Args:
        embeddings: One or more tensors [rows, width], by the names that errors are to use.

    Returns:
        Each of them [rows, width], as `to_length_one` has it.

    Raises:
        ValueError: For what `check_embeddings` refuses, or tensors of different lengths.

    Examples:
        >>> unit_rows(out0=torch.tensor([[3.0, 4.0]]))
        [tensor([[0.6000, 0.8000]])]
    """
    check_embeddings(**embeddings)
    check_same_length(**embeddings)
    return [to_length_one(rows) for rows in embeddings.values()]


def to_length_one(rows: Tensor) -> Tensor:
    """Rows at length 1, in full precision, as `torch.nn.functional.normalize` has them.

    A row without a direction, of zeros or of a length below 1e-12 or the least normal number of its dtype (6.1e-5 in
    float16), has gradient 0: it would else be divided by next to nothing, and be infinite in half precision.

    Args:
        rows: Embeddings [..., width], floating point.

    Returns:
        The same shape, float32 for half precision; rows of zeros stay.

    Examples:
        >>> rows = torch.zeros(2, 4, dtype=torch.float16, requires_grad=True)
        >>> torch.autograd.grad(to_length_one(rows).sum(), rows)[0].count_nonzero()
        tensor(0)
    """
    # In half precision a row of zeros, or a tiny one, would be divided by 0.
    full = as_full_precision(rows)
    directed = torch.linalg.vector_norm(full.detach(), dim=-1, keepdim=True) >= least_length(rows.dtype)
    return torch.nn.functional.normalize(torch.where(directed, full, full.detach()), dim=-1)


def least_length(dtype: torch.dtype) -> float:
    """The length from which on a row has a direction."""
    return max(float(torch.finfo(dtype).tiny), 1e-12)


def in_backward() -> bool:
    """Whether a backward pass is running, in which activation checkpointing runs a forward again."""
    return int(torch._C._current_graph_task_id()) != -1  # as torch's own checkpointing asks


def full_precision(like: Tensor) -> torch.autocast:
    """A context in which autocast leaves matrix products alone: logits over a small temperature need all digits."""
    return torch.autocast(like.device.type, enabled=False)


def checked_temperature(temperature: Tensor, dtype: torch.dtype) -> Tensor:
    """One number as a scalar, in a dtype's full precision; a ValueError for another, or (on the CPU) not above 0."""
    if temperature.numel() != 1 or temperature.dtype not in FLOATS or temperature.layout != torch.strided:
        layout = "" if temperature.layout == torch.strided else f", {temperature.layout}"
        came = f"{temperature.dtype} {list(temperature.shape)}{layout}"
        raise ValueError(f"temperature: expected one floating-point number, got {came}")
    if temperature.device.type == "meta" and not torch.compiler.is_compiling():
        raise ValueError("temperature: expected a number on a device that holds values, got meta")
    if values_are_free(temperature):
        check_number("temperature", float(temperature.detach()), above=0)
    return temperature.reshape(()).to(torch.promote_types(dtype, torch.float32))


def checked_anchor_weights(weights: Tensor, anchors: Tensor) -> Tensor:
    """Weights [n] in the anchors' dtype; a ValueError for another shape, or (on the CPU) below 0 or not finite."""
    if not isinstance(weights, Tensor) or weights.shape != anchors.shape[:1]:
        came = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"anchor_weights: expected a tensor of shape [{len(anchors)}], got {came}")
    if weights.is_complex() or weights.layout != torch.strided:
        raise ValueError(f"anchor_weights: expected real numbers, got {weights.dtype}, {weights.layout}")
    if weights.device != anchors.device:
        raise ValueError(f"anchor_weights: expected device {anchors.device}, as anchors has, got {weights.device}")
    if values_are_free(weights) and not bool(((weights >= 0) & (weights <= 1e30)).all()):
        raise ValueError(
            f"anchor_weights: expected finite numbers of at least 0 and at most 1e+30, got {weights.min():g} to "
            f"{weights.max():g}"
        )
    return weights.detach().to(anchors.dtype)


def is_not_among(columns: Tensor, width: int) -> Tensor:
    """Which of so many columns a row of `columns` [n, k], padded with -1, does not name: bool [n, width]."""
    # Padding goes to a column of its own, which is cut off again: no mask has to be read.
    columns = torch.where(columns < 0, width, columns)
    marks = torch.ones(len(columns), width + 1, dtype=torch.bool, device=columns.device)
    return marks.scatter(1, columns, False)[:, :width]


def sum_of_rows(rows: Tensor, columns: Tensor) -> Tensor:
    """The sum of `rows[columns]` per row of `columns`; -1 picks nothing (a row of zeros put last)."""
    if columns.shape[1] > WIDE:
        return (~is_not_among(columns, len(rows))).to(rows.dtype) @ rows
    return torch.cat([rows, torch.zeros_like(rows[:1])])[columns].sum(dim=1)


def distinct(columns: Tensor) -> Tensor:
    """A column that stands twice in a row is kept once, so that rows can be summed over `excluded`."""
    if columns.shape[1] < 2:
        return columns
    ordered = columns.sort(dim=1).values
    first = torch.zeros_like(ordered[:, :1], dtype=torch.bool)
    return ordered.masked_fill(torch.cat([first, ordered[:, 1:] == ordered[:, :-1]], dim=1), -1)
