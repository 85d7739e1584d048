"""What is compared: anchors, their positives and the pool of negatives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from undimix_plugins.checks import (
    check_embeddings,
    check_number,
    check_same_length,
    values_are_free,
)


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
        itself: The anchors' own columns in the pool [n], -1 where there is none; None for no anchor at all. An
            anchor is never its own negative, so these need not stand in `excluded`. Defaults to `arange(n)` where
            `anchors` and `pool` are the same tensor object.
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
        if self.anchor_inputs is not None and self.pool_inputs is not None:
            check_embeddings(anchor_inputs=self.anchor_inputs, pool_inputs=self.pool_inputs)
            check_same_length(anchors=self.anchors, anchor_inputs=self.anchor_inputs)
            check_same_length(pool=self.pool, pool_inputs=self.pool_inputs)
        elif self.anchor_inputs is not None or self.pool_inputs is not None:
            missing = "pool_inputs" if self.pool_inputs is None else "anchor_inputs"
            raise ValueError(f"{missing}: expected the last layer's inputs for anchors and pool both, got None")

        one_batch = self.anchors is self.pool
        if self.itself is None and one_batch:
            self._set("itself", torch.arange(len(self.anchors), device=self.anchors.device))
        if self.positives_in_pool is None:
            self._set("positives_in_pool", one_batch)
        excluded = self.anchors.new_empty(len(self.anchors), 0, dtype=torch.long)
        if self.excluded is not None:
            excluded = self._columns("excluded", self.excluded, rank=2)
        if self.itself is not None:
            self._set("itself", self._columns("itself", self.itself, rank=1))
            excluded = torch.cat([excluded, self.itself[:, None]], dim=1)
        self._set("excluded", distinct(excluded))

        pool = as_full_precision(self.pool)
        self._set("anchors", pool if one_batch else as_full_precision(self.anchors))
        self._set("positives", as_full_precision(self.positives))
        self._set("pool", pool)
        if self.anchor_inputs is not None and self.pool_inputs is not None:
            self._set("anchor_inputs", self.anchor_inputs.to(pool.dtype))
            self._set("pool_inputs", self.pool_inputs.to(pool.dtype))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen for everybody else

    def _columns(self, name: str, columns: Tensor, rank: int) -> Tensor:
        """Checks columns of the pool, a row of them (`excluded`) or one (`itself`) per anchor."""
        shape = "[anchors, k]" if rank == 2 else "[anchors]"
        if columns.dim() != rank or len(columns) != len(self.anchors):
            raise ValueError(
                f"{name}: expected shape {shape} for {len(self.anchors)} anchors, got {list(columns.shape)}"
            )
        if columns.is_floating_point() or columns.is_complex() or columns.dtype == torch.bool:
            raise ValueError(f"{name}: expected integer columns of the pool, got {columns.dtype}")
        if columns.device != self.anchors.device:
            raise ValueError(f"{name}: expected device {self.anchors.device}, got {columns.device}")
        if values_are_free(columns) and columns.numel():
            least, most = int(columns.min()), int(columns.max())
            if least < -1 or most >= len(self.pool):
                raise ValueError(
                    f"{name}: expected columns from -1 (none) to {len(self.pool) - 1}, got {least} to {most}"
                )
        return columns.long()

    def logits(self, rows: slice) -> Tensor:
        """Similarities over the temperature of a block of anchors [r, d] to the whole pool: [r, m]."""
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
    def count(self) -> Tensor:
        """How many negatives each anchor has: [n], in the embeddings' dtype."""
        assert self.excluded is not None
        return (len(self.pool) - (self.excluded >= 0).sum(dim=1)).to(self.pool.dtype)


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
        ValueError: As `Contrast` does.

    Examples:
        >>> contrast = two_views(torch.randn(4, 8), torch.randn(4, 8), temperature=0.5)
        >>> contrast.pool.shape, contrast.count[0].item()
        (torch.Size([8, 8]), 6.0)
    """
    check_embeddings(first=first, second=second)
    check_same_length(first=first, second=second)
    views = torch.cat([first, second])
    pool = views if gathered is None else torch.cat(gathered)
    own = torch.arange(len(first), device=first.device) + offset
    other = own + len(pool) // 2
    return Contrast(
        views,
        torch.cat([second, first]),
        pool,
        excluded=torch.cat([other, own])[:, None],
        temperature=temperature,
        itself=torch.cat([own, other]),
        positives_in_pool=True,
    )


def as_full_precision(rows: Tensor) -> Tensor:
    """The rows in float32 where they came in half precision, else as they are.

    Normalise after this, not before: in half precision a tiny row's length is 0 or its square underflows.
    """
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


def distinct(columns: Tensor) -> Tensor:
    """A column that stands twice in a row is kept once, so that rows can be summed over `excluded`."""
    ordered = columns.sort(dim=1).values
    repeated = torch.zeros_like(ordered, dtype=torch.bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ordered.masked_fill(repeated, -1)
