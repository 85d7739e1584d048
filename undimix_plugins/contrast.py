"""What is compared: anchors, their positives and the pool of negatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from undimix_plugins.blocks import rows_at_once
from undimix_plugins.checks import (
    check_anchor_weights,
    check_columns,
    check_embeddings,
    check_finite,
    check_inputs,
    check_kinds,
    check_lengths,
    check_same_length,
    check_scalar_temperature,
    check_that_logits_fit,
)
from undimix_plugins.columns import distinct, is_not_among, sum_of_rows
from undimix_plugins.distributed import gather_parts, processes
from undimix_plugins.rows import as_full_precision, full_precision

#: From a block of r anchors to the columns of the pool that are no negatives of theirs, bool [r, m].
ExcludedMask = Callable[[slice], Tensor]


@dataclass(frozen=True, eq=False)
class GatheredPool:
    """What makes a contrast with a pool gathered from all processes the same as on one process.

    A candidate's pseudo-labelling task is which anchor it is aligned with, among all processes' anchors. Each process
    works out the tasks of its own candidates, and the results are gathered.

    Attributes:
        anchors: All processes' anchors [N, d], constants; or a function that gathers them, which all processes call.
        own_columns: Those anchors' own columns in the pool [N], -1 where there is none; None for no anchor at all.
        own_rows: This process's own rows of the pool [p]; the contrast's `own_columns` where these are its anchors.
        gather: From numbers for this process's rows [p, k] to those for the whole pool [m, k], without gradient.
    """

    anchors: Tensor | Callable[[], Tensor]
    own_columns: Tensor | None
    own_rows: Tensor
    gather: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LastLayerInputs:
    """The inputs of the last layer, whose outputs are compared; `UnDiMix(gradient="weight")` needs them.

    Attributes:
        anchor_inputs: Inputs behind the anchors [n, h].
        pool_inputs: Inputs behind the pool [m, h].
        normalized: Whether anchors and pool are the layer's outputs brought to length 1, and its inputs divided by
            those outputs' lengths: gradients at its weight then go through the normalisation, too.
    """

    anchor_inputs: Tensor
    pool_inputs: Tensor
    normalized: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Contrast:
    """Anchors, a positive for each, and the pool that their negatives come from.

    `Contrast.of` makes one: it checks what it is given, and a Contrast never changes afterwards.

    The similarity of two rows is their inner product *as they stand here*: pass rows of length 1 for cosines. Rows in
    half precision are converted to float32 (gradients flow back through that).

    Attributes:
        anchors: Embeddings [n, d], floating point, of full precision like all the rest.
        positives: Each anchor's positive [n, d]; of several in the pool their mean, 0 for none.
        pool: The candidates [m, d]: the batch's views, a memory bank, all documents.
        excluded: Columns of the pool that are no negatives for an anchor [n, k], int64, padded with -1, an anchor's own
            among them; each column stands there once.
        temperature: What similarities are divided by, a float or a scalar tensor (whose gradient is in the rows).
        own_columns: The anchors' own columns in the pool [n], -1 where there is none; None for no anchor at all, or
            where `anchors` and `pool` are the same tensor object: then anchor i is row i.
        positives_in_pool: Whether the pool holds the positives, too. A memory bank holds none.
        last_layer: The last layer's inputs; None where they are not known.
        excluded_mask: Further columns that are no negatives: a function from a block of r anchors to a mask, bool
            [r, m]; None for none.
        gathered: What a pool gathered from several processes needs of them; None for this process's own contrast.
        anchor_weights: How much each anchor's loss counts in the mean over all [n]; None for 1 each.
        positive_columns: The positives' columns [n, p], padded with -1, where there may be several in the pool.
        has_own_positive: Whether `positives` is a positive itself, beside those of the columns.

    Examples:
        >>> z = torch.nn.functional.normalize(torch.randn(6, 16), dim=1)
        >>> positive_of = torch.tensor([3, 4, 5, 0, 1, 2])
        >>> contrast = Contrast.of(z, z[positive_of], z, positive_of[:, None], temperature=0.5)
        >>> contrast.count.tolist()
        [4.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    """

    anchors: Tensor
    positives: Tensor
    pool: Tensor
    excluded: Tensor
    temperature: float | Tensor
    own_columns: Tensor | None
    positives_in_pool: bool
    last_layer: LastLayerInputs | None
    excluded_mask: ExcludedMask | None
    gathered: GatheredPool | None
    anchor_weights: Tensor | None
    positive_columns: Tensor | None
    has_own_positive: bool

    @staticmethod
    def of(
        anchors: Tensor,
        positives: Tensor,
        pool: Tensor,
        excluded: Tensor | None,
        temperature: float | Tensor,
        own_columns: Tensor | None = None,
        positives_in_pool: bool | None = None,
        *,
        last_layer: LastLayerInputs | None = None,
        excluded_mask: ExcludedMask | None = None,
        gathered: GatheredPool | None = None,
        anchor_weights: Tensor | None = None,
    ) -> Contrast:
        """Makes a contrast of rows that are compared as they are, after a look at all of them.

        Args:
            anchors: Embeddings [n, d], floating point.
            positives: Each anchor's positive [n, d]; or, where the pool holds them, their columns [n, p], integers
                padded with -1: several, one or none. Then they are no negatives, and all stand in the denominator.
            pool: The candidates [m, d], same dtype. Pass the anchors' own tensor object for one batch of views.
            excluded: Columns of the pool that are no negatives for an anchor [n, k], integers, padded with -1: its
                positive, duplicates, known false negatives. None excludes nothing. A column may stand twice.
            temperature: What similarities are divided by, a finite number above 0, or a tensor of one (a parameter
                that is learned, a number that another device holds), which gets its gradient.
            own_columns: The anchors' own columns in the pool [n], -1 where there is none; None for no anchor at all,
                except where `anchors` and `pool` are the same tensor object: then anchor i is row i. An anchor is never
                its own negative, so these need not stand in `excluded`.
            positives_in_pool: Whether the pool holds the positives too (those then belong in `excluded`). Defaults to
                whether `anchors` and `pool` are the same tensor object.
            last_layer: The inputs of the layer whose outputs anchors and pool are.
            excluded_mask: Further columns that are no negatives, too many or too scattered to be listed (rows of the
                same class, what a guide model finds, duplicates): a function from a block of r anchors to a mask, bool
                [r, m]. It is called for a block several times, and has to return the same. `same_label` makes one.
            gathered: What a pool gathered from several processes needs of them.
            anchor_weights: How much each anchor's loss counts in the mean over all [n], constants of at least 0.

        Returns:
            The contrast.

        Raises:
            ValueError: For tensors that are no matrices, that are empty, or whose widths, lengths, dtypes or devices
                differ; a temperature that is no finite number above 0. On the CPU also for non-finite rows and columns
                out of range. On other devices, where looking would cost a synchronisation, a non-finite row makes the
                loss NaN.

        Examples:
            >>> queries, keys, bank = (torch.nn.functional.normalize(torch.randn(n, 16), dim=1) for n in (4, 4, 64))
            >>> Contrast.of(queries, keys, bank, None, temperature=0.2).count.tolist()
            [64.0, 64.0, 64.0, 64.0]
        """
        listed = isinstance(positives, Tensor) and not positives.is_floating_point()
        rows = {"anchors": anchors, "positives": positives, "pool": pool}
        if listed:
            del rows["positives"]
        lengths = check_finite(**rows)
        inputs = (None, None) if last_layer is None else (last_layer.anchor_inputs, last_layer.pool_inputs)
        check_inputs(anchors, pool, *inputs)
        temperature = check_scalar_temperature(temperature, pool.dtype)
        if lengths:
            check_lengths(rows, lengths)
            check_that_logits_fit(rows, lengths, temperature)

        one_batch, n = anchors is pool, len(anchors)
        pool = as_full_precision(pool)
        anchors = pool if one_batch else as_full_precision(anchors)
        positive_columns = None
        if listed:
            positive_columns = check_columns("positives", positives, shape=(n, None), pool=pool)
            if positive_columns.shape[1] == 0:  # none at all
                positive_columns = positive_columns.new_full((n, 1), -1)
            positive_columns = distinct(positive_columns)
            positives = mean_of_rows(pool, positive_columns)
        else:
            check_same_length(anchors=anchors, positives=positives)
            positives = as_full_precision(positives)
        if last_layer is not None:
            of_anchors, of_pool = (part.to(pool.dtype) for part in inputs if part is not None)
            last_layer = LastLayerInputs(of_anchors, of_pool, last_layer.normalized)
        if anchor_weights is not None:
            anchor_weights = check_anchor_weights(anchor_weights, anchors)
        if own_columns is not None:
            own_columns = check_columns("own_columns", own_columns, shape=(n,), pool=pool)

        left_out = torch.empty(n, 0, dtype=torch.long, device=pool.device)
        if excluded is not None:
            left_out = check_columns("excluded", excluded, shape=(n, None), pool=pool)
        if positive_columns is not None:
            left_out = torch.cat([left_out, positive_columns], dim=1)
        left_out = distinct(left_out)
        own = torch.arange(n, device=pool.device) if one_batch and own_columns is None else own_columns
        if own is not None:
            left_out = torch.cat([left_out.masked_fill(left_out == own[:, None], -1), own[:, None]], dim=1)

        anchors, positives, pool = with_gradient_of(temperature, anchors, positives, pool)
        return Contrast(
            anchors=anchors,
            positives=positives,
            pool=pool,
            excluded=left_out,
            temperature=temperature,
            own_columns=own_columns,
            positives_in_pool=listed or (one_batch if positives_in_pool is None else positives_in_pool),
            last_layer=last_layer,
            excluded_mask=excluded_mask,
            gathered=gathered,
            anchor_weights=anchor_weights,
            positive_columns=positive_columns,
            has_own_positive=not listed,
        )

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

    def without(self, columns: Tensor | None = None, mask: ExcludedMask | None = None) -> Contrast:
        """The same with fewer negatives.

        Args:
            columns: Those to leave out, for each anchor [n, k], integers, padded with -1.
            mask: Further ones, as `excluded_mask` has them.

        Returns:
            Another Contrast of the same tensors.

        Examples:
            >>> contrast = in_batch_negatives(torch.randn(4, 8), torch.randn(4, 8), temperature=0.05)
            >>> contrast.without(torch.tensor([[1], [-1], [-1], [-1]])).count.tolist()
            [2.0, 3.0, 3.0, 3.0]
        """
        excluded, excluded_mask = self.excluded, self.excluded_mask
        if columns is not None:
            columns = check_columns("columns", columns, shape=(len(self.anchors), None), pool=self.pool)
            excluded = distinct(torch.cat([excluded, columns], dim=1))
        if mask is not None:
            excluded_mask = mask if excluded_mask is None else partial(_either, excluded_mask, mask)
        return replace(self, excluded=excluded, excluded_mask=excluded_mask)

    def with_positives(self, columns: Tensor) -> Contrast:
        """The same with more positives, beside those that anchors have; they are no negatives then.

        Args:
            columns: Negatives of each anchor in the pool [n, k], integers, padded with -1; columns that are no
                negatives are ignored.

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
        none = (columns[:, :, None] == self.excluded[:, None]).any(dim=2)
        columns = columns.masked_fill(none, -1)
        if self.positive_columns is not None:
            columns = torch.cat([self.positive_columns, columns], dim=1)
        columns = distinct(columns)
        positives = self.positives if self.has_own_positive else mean_of_rows(self.pool, columns)
        return replace(new, positive_columns=columns, positives=positives)

    def is_negative(self, rows: slice) -> Tensor:
        """Which columns of the pool are negatives for a block of anchors: bool [r, m]."""
        negative = is_not_among(self.excluded[rows], len(self.pool))
        return negative if self.excluded_mask is None else negative & ~self._masked(self.excluded_mask, rows)

    def _masked(self, excluded_mask: ExcludedMask, rows: slice) -> Tensor:
        """The mask of a block of anchors, bool [r, m]; a ValueError for what is none."""
        mask = excluded_mask(rows)
        shape = [len(self.anchors[rows]), len(self.pool)]
        if not isinstance(mask, Tensor) or list(mask.shape) != shape or mask.dtype != torch.bool:
            came = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"excluded_mask: expected bool {shape} (anchors of the block, pool), got {came}")
        return mask

    @property
    def is_own_pool(self) -> bool:
        """Whether the anchors are the pool, anchor i its row i."""
        return self.anchors is self.pool and self.own_columns is None

    @property
    def count(self) -> Tensor:
        """How many negatives each anchor has: [n], in the embeddings' dtype."""
        if self.excluded_mask is None:
            return (len(self.pool) - (self.excluded >= 0).sum(dim=1)).to(self.pool.dtype)
        step = rows_at_once(len(self.pool))
        blocks = (slice(start, start + step) for start in range(0, len(self.anchors), step))
        return torch.cat([self.is_negative(rows).sum(dim=1) for rows in blocks]).to(self.pool.dtype)


def mean_of_rows(rows: Tensor, columns: Tensor) -> Tensor:
    """The mean of `rows[columns]` per row of `columns`, padded with -1; 0 for none."""
    return sum_of_rows(rows, columns) / (columns >= 0).sum(dim=1, keepdim=True).clamp(min=1)


def with_gradient_of(temperature: float | Tensor, anchors: Tensor, positives: Tensor, pool: Tensor) -> list[Tensor]:
    """Anchors, positives and pool that carry the gradient of a temperature that is learned.

    Logits are bilinear in the rows, so that a factor of 1 on these carries the temperature's whole gradient.
    """
    if not isinstance(temperature, Tensor) or not temperature.requires_grad:
        return [anchors, positives, pool]
    one = temperature.detach() / temperature
    if anchors is not pool:
        return [anchors * one, positives, pool]
    one = one.sqrt()  # on either side
    pool = pool * one
    return [pool, positives * one, pool]


def holds_all_anchors(contrast: Contrast) -> bool:
    """Whether what the influence needs of other processes is in the contrast, with its pool."""
    gathered = contrast.gathered
    if gathered is None or isinstance(gathered.anchors, Tensor):
        return True
    return gathered.own_columns is not None and bool((gathered.own_columns >= 0).all())


def alone(contrast: Contrast) -> Contrast:
    """The same, which asks nothing of other processes, so that they need not call; the influence may raise then."""
    gathered, pool = contrast.gathered, contrast.pool.detach()
    if gathered is None:
        return contrast
    anchors = gathered.anchors
    if not isinstance(anchors, Tensor):
        anchors = pool[gathered.own_columns] if holds_all_anchors(contrast) else _not_here
    every = torch.arange(len(pool), device=pool.device)
    return replace(contrast, gathered=GatheredPool(anchors, gathered.own_columns, every, lambda rows: rows))


def _not_here() -> Tensor:
    raise ValueError(
        "contrast: expected all processes' anchors in it, which the influence needs where one process looks alone, got "
        "a pool gathered without them; use UnDiMix(influence=0), or a loss that does not gather"
    )


def in_batch_negatives(anchors: Tensor, positives: Tensor, temperature: float | Tensor, **further: Any) -> Contrast:
    """The contrast of every anchor against all positives, those of the others being its negatives.

    The rows are compared as they are, by inner products, and not normalised: pass `unit_rows(...)` for cosines.

    Args:
        anchors: Embeddings [n, d].
        positives: Each anchor's positive [n, d], the pool of all.
        temperature: What similarities are divided by, as `Contrast.of` has it.
        further: Of `Contrast.of`: `excluded_mask`, `anchor_weights`, `last_layer`.

    Returns:
        A Contrast of n anchors with a pool of n, which holds no anchor.

    Raises:
        ValueError: As `Contrast.of` does.

    Examples:
        >>> contrast = in_batch_negatives(torch.randn(4, 8), torch.randn(4, 8), temperature=0.05)
        >>> contrast.pool.shape, contrast.count[0].item()
        (torch.Size([4, 8]), 3.0)
    """
    check_kinds(anchors=anchors, positives=positives)
    own = torch.arange(len(anchors), device=anchors.device)
    return Contrast.of(anchors, positives, positives, own[:, None], temperature, positives_in_pool=True, **further)


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

    The rows are compared as they are, by inner products, and not normalised: pass `unit_rows(...)` for cosines.

    Args:
        first: A view of each sample [n, d].
        second: The other view of each sample [n, d].
        temperature: What similarities are divided by, as `Contrast.of` has it.
        gathered: The two views of all processes' samples, each [N, d]; None for one process.
        offset: The place of this process's first sample among the gathered ones.
        further: Of `Contrast.of`: `excluded_mask`, `anchor_weights`, `last_layer`.

    Returns:
        A Contrast of 2n anchors (first views, then second) with a pool of 2N (likewise).

    Raises:
        ValueError: As `Contrast.of` does; for gathered views that differ in length, or an offset outside of them.

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
    own_columns = None if gathered is None else torch.cat([own, other])
    if own_columns is not None and len(pool) == processes() * len(views) > len(views):
        constant, every = pool.detach(), torch.arange(len(pool), device=pool.device)
        further["gathered"] = GatheredPool(constant, every, own_columns, partial(gather_parts, parts=2))
    return Contrast.of(
        views,
        torch.cat([second, first]),
        pool,
        excluded=torch.cat([other, own])[:, None],
        temperature=temperature,
        own_columns=own_columns,
        positives_in_pool=True,
        **further,
    )


def _either(one: ExcludedMask, other: ExcludedMask, rows: slice) -> Tensor:
    return one(rows) | other(rows)


def same_label(of_anchors: Tensor, of_pool: Tensor) -> ExcludedMask:
    """An `excluded_mask` for a `Contrast`: a candidate with an anchor's label is no negative of it.

    Args:
        of_anchors: A label for each anchor [n]: a class, or a key that a text or an image has alone.
        of_pool: A label for each candidate [m].

    Returns:
        A function from a block of r anchors to a mask, bool [r, m].

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


def kept_mask(mask: ExcludedMask, contrast: Contrast) -> ExcludedMask:
    """A mask that costs much, worked out once where that of the whole contrast is small enough to be kept."""
    if len(contrast.anchors) > rows_at_once(len(contrast.pool), least=0):
        return mask
    of_all = mask(slice(0, len(contrast.anchors)))
    return lambda rows: of_all[rows]
