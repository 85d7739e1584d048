"""What is compared: anchors, their positives and the pool of negatives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from undimix_plugins.checks import check_columns, check_embeddings, check_inputs, check_number, check_same_length


@dataclass(frozen=True, eq=False)
class Contrast:
    """Anchors, a positive for each, and the pool that their negatives come from.

    The similarity of two rows is their inner product *as they stand here*: an adapter whose host compares by cosine
    passes rows of length 1. Rows in half precision are converted to float32 (gradients flow back through that).

    Attributes:
        anchors: Embeddings [n, d], floating point.
        positives: Each anchor's positive [n, d].
        pool: The candidates [m, d]: the batch's views, a memory bank, all documents.
        excluded: Columns of the pool that are no negatives for an anchor [n, k], integers, padded with -1: itself,
            its positive, duplicates, known false negatives. None excludes nothing. A column may stand twice.
        temperature: What similarities are divided by, a finite number above 0.
        itself: The anchors' own columns in the pool [n], -1 where there is none; None for no anchor at all, except
            where `anchors` and `pool` are the same tensor object: then anchor i is row i. An anchor is never its own
            negative, so these need not stand in `excluded`.
        positives_in_pool: Whether the pool holds the positives too (those then belong in `excluded`). Defaults to
            whether `anchors` and `pool` are the same tensor object. A memory bank holds none.
        anchor_inputs: Inputs of the last layer [n, h], whose outputs the anchors are; `gradient="weight"` needs them.
        pool_inputs: Likewise for the pool [m, h].

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
    temperature: float
    itself: Tensor | None = None
    positives_in_pool: bool | None = None
    anchor_inputs: Tensor | None = None
    pool_inputs: Tensor | None = None

    def __post_init__(self) -> None:
        check_embeddings(anchors=self.anchors, positives=self.positives, pool=self.pool)
        check_same_length(anchors=self.anchors, positives=self.positives)
        self._set("temperature", check_number("temperature", self.temperature, above=0))
        check_inputs(self.anchors, self.pool, self.anchor_inputs, self.pool_inputs)

        one_batch = self.anchors is self.pool
        if self.positives_in_pool is None:
            self._set("positives_in_pool", one_batch)
        n, device = len(self.anchors), self.anchors.device
        excluded = torch.empty(n, 0, dtype=torch.long, device=device)
        if self.excluded is not None:
            check_columns("excluded", self.excluded, shape=(n, None), pool=self.pool)
            excluded = distinct(self.excluded.long())
        itself = None
        if self.itself is not None:
            check_columns("itself", self.itself, shape=(n,), pool=self.pool)
            itself = self.itself.long()[:, None]
        elif one_batch:
            itself = torch.arange(n, device=device)[:, None]
        if itself is not None:
            excluded = torch.cat([excluded.masked_fill(excluded == itself, -1), itself], dim=1)
        self._set("excluded", excluded)

        pool = as_full_precision(self.pool)
        self._set("anchors", pool if one_batch else as_full_precision(self.anchors))
        self._set("positives", as_full_precision(self.positives))
        self._set("pool", pool)
        if self.anchor_inputs is not None and self.pool_inputs is not None:
            self._set("anchor_inputs", self.anchor_inputs.to(pool.dtype))
            self._set("pool_inputs", self.pool_inputs.to(pool.dtype))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen for everybody else

    def logits(self, rows: slice) -> Tensor:
        """Similarities over the temperature of a block of r anchors to the whole pool: [r, m]."""
        with full_precision(self.pool):
            return self.anchors[rows] @ self.pool.T / self.temperature

    def is_negative(self, rows: slice) -> Tensor:
        """Which columns of the pool are negatives for a block of anchors: bool [r, m]."""
        assert self.excluded is not None
        m = len(self.pool)
        excluded = self.excluded[rows]
        # Padding goes to a column of its own, which is cut off again: no mask has to be read.
        columns = torch.where(excluded < 0, m, excluded)
        marks = torch.ones(len(columns), m + 1, dtype=torch.bool, device=columns.device)
        return marks.scatter(1, columns, False)[:, :m]

    @property
    def is_own_pool(self) -> bool:
        """Whether the anchors are the pool, anchor i its row i."""
        return self.anchors is self.pool and self.itself is None

    @property
    def count(self) -> Tensor:
        """How many negatives each anchor has: [n], in the embeddings' dtype."""
        assert self.excluded is not None
        return (len(self.pool) - (self.excluded >= 0).sum(dim=1)).to(self.pool.dtype)


def in_batch_negatives(anchors: Tensor, positives: Tensor, temperature: float) -> Contrast:
    """The contrast of every anchor against all positives, those of the others being its negatives.

    Args:
        anchors: Embeddings [n, d].
        positives: Each anchor's positive [n, d], the pool of all.
        temperature: What similarities are divided by, a finite number above 0.

    Returns:
        A Contrast of n anchors with a pool of n, which holds no anchor.

    Raises:
        ValueError: As `Contrast` does.

    Examples:
        >>> contrast = in_batch_negatives(torch.randn(4, 8), torch.randn(4, 8), temperature=0.05)
        >>> contrast.pool.shape, contrast.count[0].item()
        (torch.Size([4, 8]), 3.0)
    """
    own = torch.arange(len(anchors), device=anchors.device)
    return Contrast(anchors, positives, positives, own[:, None], temperature, positives_in_pool=True)


def two_views(
    first: Tensor,
    second: Tensor,
    temperature: float,
    *,
    gathered: tuple[Tensor, Tensor] | None = None,
    offset: int = 0,
) -> Contrast:
    """The contrast of SimCLR: every view against all views of the other samples.

    Args:
        first: A view of each sample [n, d].
        second: The other view of each sample [n, d].
        temperature: What similarities are divided by, a finite number above 0.
        gathered: The two views of all processes' samples, each [N, d]; None for one process.
        offset: The place of this process's first sample among the gathered ones.

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
    views = torch.cat([first, second])
    pool = views
    if gathered is not None:
        check_embeddings(first=first, **{f"gathered[{view}]": rows for view, rows in enumerate(gathered)})
        check_same_length(**{f"gathered[{view}]": rows for view, rows in enumerate(gathered)})
        pool = torch.cat(gathered)
    most = len(pool) // 2 - len(first)
    if not 0 <= offset <= most:
        raise ValueError(f"offset: expected a place from 0 to {most} among the gathered samples, got {offset}")
    own = torch.arange(len(first), device=first.device) + offset
    other = own + len(pool) // 2
    return Contrast(
        views,
        torch.cat([second, first]),
        pool,
        excluded=torch.cat([other, own])[:, None],
        temperature=temperature,
        itself=None if gathered is None else torch.cat([own, other]),
        positives_in_pool=True,
    )


def as_full_precision(rows: Tensor) -> Tensor:
    """The rows in float32 where they came in half precision, else as they are.

    Normalise after this, not before: in half precision a tiny row's length is 0 or its square underflows.
    """
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


def full_precision(like: Tensor) -> torch.autocast:
    """A context in which autocast leaves matrix products alone: logits over a small temperature need all digits."""
    return torch.autocast(like.device.type, enabled=False)


def distinct(columns: Tensor) -> Tensor:
    """A column that stands twice in a row is kept once, so that rows can be summed over `excluded`."""
    if columns.shape[1] < 2:
        return columns
    ordered = columns.sort(dim=1).values
    repeated = torch.zeros_like(ordered, dtype=torch.bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ordered.masked_fill(repeated, -1)
