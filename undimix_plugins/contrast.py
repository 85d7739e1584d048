"""The contrast: anchors, their positives and the pool of candidates that negatives come from."""

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
    values_are_free,
)
from undimix_plugins.columns import distinct, is_not_among, mean_of_rows, sum_of_rows
from undimix_plugins.distributed import gather_constants, gather_parts, processes
from undimix_plugins.rows import as_full_precision, full_precision

LOW = 1000.0  # how far a logit is below the largest if its exponential is 0, also in float64

#: A function from a block of r anchors (a slice) to a mask, bool [r, m]: True where a candidate is not their negative.
ExcludedMask = Callable[[slice], Tensor]


@dataclass(frozen=True, eq=False)
class GatheredPool:
    """Describes a pool that is gathered from all processes, so that the weights are the same as on one process.

    The pseudo-labelling task of a candidate asks which anchor it is aligned with, among the anchors of all processes.
    Each process solves the tasks of its own candidates, and the results are gathered.

    Attributes:
        anchors: The anchors of all processes [N, d], without gradient. Or a function that gathers them, which all
            processes call.
        own_columns: For each of these anchors its own column in the pool [N], integers, -1 if it is not in the pool.
            None if the pool contains no anchors.
        own_rows: The rows of the pool that belong to this process [p], integers. Pass the contrast's `own_columns`
            tensor itself if these rows are its anchors.
        gather: A function from numbers for this process's rows [p, k] to numbers for the whole pool [m, k], without
            gradient. All processes call it.

    Examples:
        A single process holds the whole pool:

        >>> bank = torch.randn(16, 8)
        >>> anchors = torch.randn(4, 8)
        >>> gathered = GatheredPool(anchors, None, torch.arange(16), gather=lambda numbers: numbers)
        >>> contrast = Contrast.of(anchors, torch.randn(4, 8), bank, None, temperature=1.0, gathered=gathered)
    """

    anchors: Tensor | Callable[[], Tensor]
    own_columns: Tensor | None
    own_rows: Tensor
    gather: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LastLayerInputs:
    """The inputs of the last layer, whose outputs are the embeddings. `UnDiMix(gradient="weight")` needs them.

    Attributes:
        anchor_inputs: The inputs that gave the anchors [n, h], floating point.
        pool_inputs: The inputs that gave the pool [m, h], floating point.
        normalized: Whether anchors and pool are the layer's outputs normalised to length 1. The inputs must then be
            divided by the lengths of the outputs, so that gradients at the weight go through the normalisation.

    Examples:
        >>> layer, h = torch.nn.Linear(6, 4), torch.randn(8, 6)
        >>> z = layer(h)
        >>> unit = torch.nn.functional.normalize(z, dim=1)
        >>> inputs = h / z.detach().norm(dim=1, keepdim=True)
        >>> last_layer = LastLayerInputs(inputs, inputs, normalized=True)
        >>> contrast = two_views(unit[:4], unit[4:], temperature=0.5, last_layer=last_layer)
        >>> loss = info_nce(contrast, UnDiMix(gradient="weight"))
    """

    anchor_inputs: Tensor
    pool_inputs: Tensor
    normalized: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Contrast:
    """Anchors, their positives, and the pool of candidates that negatives come from.

    Create one with `Contrast.of`, which checks its arguments. A Contrast never changes afterwards.

    The similarity of two rows is their inner product. The rows are *not* normalised: pass rows of length 1 for cosine
    similarity. Rows in half precision are converted to float32, and gradients flow back through the conversion.

    Attributes:
        anchors: Embeddings [n, d], float32 or float64. All floating-point tensors have the same dtype.
        positives: The positive of each anchor [n, d]. If the pool contains the positives, their mean, or 0 for an
            anchor without any.
        pool: The candidates [m, d]: the views of the batch, a memory bank, or all documents.
        excluded: For each anchor the columns of the pool that are not its negatives [n, k], int64, padded with -1. They
            include the anchor's own column. No column is listed twice for an anchor.
        temperature: The temperature, a float or a scalar tensor. The gradient of a learned temperature flows through
            the rows.
        own_columns: For each anchor its own column in the pool [n], int64, -1 if it is not in the pool. None if the
            pool contains no anchors, or if `anchors` and `pool` are the same tensor object: then anchor i is row i.
        positives_in_pool: Whether the pool contains the positives. A memory bank does not.
        last_layer: The inputs of the last layer, or None.
        excluded_mask: Further columns that are not negatives, as a function from a block of r anchors to a mask, bool
            [r, m]; or None.
        gathered: Describes a pool that is gathered from several processes. None for one process.
        anchor_weights: The weight of each anchor's loss in the mean [n]. None means 1 for each.
        positive_columns: For each anchor the columns of its positives in the pool [n, p], int64, padded with -1. None
            if `positives` holds the only positive of each anchor.
        has_own_positive: Whether row i of `positives` is a positive itself. False if it is only the mean of the rows
            that `positive_columns` lists.
        hard_negative_columns: For each anchor the columns of its explicit hard negatives in the pool [n, k], int64,
            padded with -1: the negatives that a dataset gives for this anchor. None if the loss has no explicit hard
            negatives. Columns that are not negatives of the anchor are ignored.
        scores_given: Whether similarities were given instead of rows (`Contrast.of_scores`). Anchors and pool are then
            no embeddings: they only have these similarities.
        vectors: A vector of each candidate [m, w], for their distances, if similarities were given; or None.

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
    hard_negative_columns: Tensor | None = None
    scores_given: bool = False
    vectors: Tensor | None = None

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
        hard_negative_columns: Tensor | None = None,
    ) -> Contrast:
        """Checks its arguments and returns a contrast of them. Rows are not normalised.

        Args:
            anchors: Embeddings [n, d], floating point.
            positives: The positive of each anchor [n, d], same dtype as `anchors`. If the pool contains the positives,
                you can pass their columns instead [n, p], integers, padded with -1: several, one or none for each
                anchor. They are then no negatives, and all of them are in the denominator.
            pool: The candidates [m, d], same dtype. For one batch of views, pass the tensor object of `anchors` itself.
            excluded: For each anchor the columns of the pool that are not its negatives [n, k], integers, padded with
                -1: its positive, duplicates, known false negatives. A column may be listed twice. None excludes
                nothing.
            temperature: The temperature that similarities are divided by, a finite number above 0. A tensor with one
                element (a learned parameter, or a number on another device) gets its gradient.
            own_columns: For each anchor its own column in the pool [n], integers, -1 if it is not in the pool. None if
                the pool contains no anchors, or if `anchors` and `pool` are the same tensor object: then anchor i is
                row i. An anchor is never its own negative, so you need not list these in `excluded`.
            positives_in_pool: Whether the pool contains the positives. If it does, list them in `excluded`. Defaults to
                True if `anchors` and `pool` are the same tensor object, and to False otherwise. It is always True if
                you pass the columns of the positives.
            last_layer: The inputs of the layer whose outputs are the anchors and the pool.
            excluded_mask: Further columns that are not negatives, if they are too many to be listed: rows of the same
                class, duplicates, or what a guide model finds. A function from a block of r anchors to a mask, bool
                [r, m]. It is called several times for a block and must always return the same mask. `same_label`
                makes one.
            gathered: Describes a pool that is gathered from several processes. None for one process.
            anchor_weights: The weight of each anchor's loss in the mean [n], from 0 to 1e30, without gradient.
            hard_negative_columns: For each anchor the columns of its explicit hard negatives in the pool [n, k],
                integers, padded with -1. Pass a tensor [n, 0] if the loss has explicit hard negatives, but this pool
                does not contain them. None if the loss has none.

        Returns:
            The contrast.

        Raises:
            ValueError: If a tensor is not a matrix or is empty, if widths, lengths, dtypes or devices differ, or if the
                temperature is not a finite number above 0. On the CPU also if a row is not finite, if a column is out
                of range, or if logits could overflow. Values on other devices are not read, since that would cost a
                synchronisation. There, a non-finite row gives a loss of NaN.

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
        if last_layer is not None:
            check_inputs(anchors, pool, last_layer.anchor_inputs, last_layer.pool_inputs)
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
            of_anchors, of_pool = last_layer.anchor_inputs.to(pool.dtype), last_layer.pool_inputs.to(pool.dtype)
            last_layer = LastLayerInputs(of_anchors, of_pool, last_layer.normalized)
        if anchor_weights is not None:
            anchor_weights = check_anchor_weights(anchor_weights, anchors)
        if own_columns is not None:
            own_columns = check_columns("own_columns", own_columns, shape=(n,), pool=pool)
        if hard_negative_columns is not None:
            hard_negative_columns = check_columns(
                "hard_negative_columns", hard_negative_columns, shape=(n, None), pool=pool
            )

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
            hard_negative_columns=hard_negative_columns,
        )

    @staticmethod
    def of_scores(
        scores: Tensor,
        positives: Tensor,
        excluded: Tensor | None,
        temperature: float | Tensor,
        own_columns: Tensor | None = None,
        *,
        vectors: Tensor | None = None,
        own: slice | None = None,
        excluded_mask: ExcludedMask | None = None,
        anchor_weights: Tensor | None = None,
        hard_negative_columns: Tensor | None = None,
    ) -> Contrast:
        """Returns a contrast of similarities that are given, for scorers that are no inner product of two rows.

        Late interaction (MaxSim) is one. Weightings that look at similarities alone work as with embeddings. So does
        the influence of `UnDiMix`. With S the similarities and p - y the gradient of a task's cross-entropy at its
        logits,

            I_ij = (p_i - y_i)^T S^T (p_j - y_j) / t^2,

        where the task of anchor i is among the candidates, and that of candidate j among the anchors. For inner
        products of embeddings it is the inner product of the two gradients at the embeddings, as `influence` computes
        it. For other similarities it is what stands in its place: those of the embeddings of which S would be the inner
        products. The distances of candidates need `vectors`. Time grows with n * n * m.

        Args:
            scores: The similarity of each anchor to each candidate [n, m], floating point.
            positives: The columns of each anchor's positives [n, p], integers, padded with -1, as in `Contrast.of`. Or
                the similarity of each anchor to the positive of each anchor [n, n], same dtype, if the pool does not
                contain the positives. An anchor's own is on the diagonal; the influence needs the others. With `own`,
                that of the anchors of all processes [N, n].
            excluded: As in `Contrast.of`.
            temperature: As in `Contrast.of`.
            own_columns: As in `Contrast.of`; with `own`, for the anchors of all processes [N].
            vectors: A vector of each candidate [m, w], floating point, such as the mean of its tokens' vectors. Their
                distances are the diversity. They get no gradient.
            own: Which rows of `scores` [N, m] are this process's n anchors, a slice. The others are those of other
                processes; only the influence looks at them. None: all rows are.
            excluded_mask: As in `Contrast.of`.
            anchor_weights: As in `Contrast.of`.
            hard_negative_columns: As in `Contrast.of`.

        A candidate whose logit is 1,000 or more below the anchor's largest, or -inf, is no negative: its exponential is
        0. Scorers mark what cannot be compared, such as an empty document, in this way.

        Returns:
            The contrast. Its rows have the given similarities as inner products: anchor i is row i of the identity.

        Raises:
            ValueError: If scores or vectors are not matrices of floats, do not match each other or the positives, or
                (on the CPU) are not finite, or as `Contrast.of` does.

        Examples:
            >>> scores = torch.tensor([[3.0, 1.0], [0.5, 2.0]])
            >>> contrast = Contrast.of_scores(scores, torch.tensor([[0], [1]]), None, temperature=0.5)
            >>> contrast.logits(slice(0, 2))
            tensor([[6., 2.],
                    [1., 4.]])
        """
        check_kinds(scores=scores)
        temperature = check_scalar_temperature(temperature, as_full_precision(scores).dtype)
        rows, low = _without_low(as_full_precision(scores), positives, temperature, own)
        check_embeddings(scores=rows)
        every = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        anchors = every if own is None else every[own]
        if isinstance(positives, Tensor) and positives.is_floating_point():
            check_embeddings(positives=positives)
            if list(positives.shape) != [len(every), len(anchors)] or positives.dtype != scores.dtype:
                raise ValueError(
                    f"positives: expected {scores.dtype} [{len(every)}, {len(anchors)}], the similarity of each anchor "
                    f"to each positive, got {positives.dtype} {list(positives.shape)}"
                )
            positives = as_full_precision(positives).T
        if vectors is not None:
            check_embeddings(vectors=vectors)
            if len(vectors) != scores.shape[1] or vectors.device != scores.device:
                raise ValueError(
                    f"vectors: expected one for each of the {scores.shape[1]} candidates, on {scores.device}, got "
                    f"{list(vectors.shape)} on {vectors.device}"
                )
            vectors = vectors.detach().to(rows.dtype)
        gathered = None
        if own is not None:
            # Each process has all similarities: it solves all tasks alone.
            columns = torch.arange(scores.shape[1], device=scores.device)
            gathered = GatheredPool(every, own_columns, columns, lambda numbers: numbers)
            own_columns = None if own_columns is None else own_columns[own]
        if low is not None:
            mask = low.__getitem__
            excluded_mask = mask if excluded_mask is None else partial(_either, excluded_mask, mask)
        contrast = Contrast.of(
            anchors,
            positives,
            rows.T,
            excluded,
            temperature,
            own_columns,
            excluded_mask=excluded_mask,
            gathered=gathered,
            anchor_weights=anchor_weights,
            hard_negative_columns=hard_negative_columns,
        )
        return replace(contrast, scores_given=True, vectors=vectors)

    def check_has_rows(self, what: str) -> None:
        """Raises a ValueError if similarities were given, for a method that needs the embeddings themselves.

        Args:
            what: Who needs them and what for, such as "MoCHi mixes them".

        Examples:
            >>> contrast = Contrast.of_scores(torch.eye(2), torch.tensor([[0], [1]]), None, temperature=0.5)
            >>> contrast.check_has_rows("MoCHi mixes them")
            Traceback (most recent call last):
            ValueError: weighting: expected one that does without embeddings, which this loss lacks; MoCHi mixes them
        """
        if self.scores_given:
            raise ValueError(f"weighting: expected one that does without embeddings, which this loss lacks; {what}")

    @property
    def held_temperature(self) -> float | Tensor:
        """The temperature without gradient. The gradient of a learned temperature flows through the rows."""
        return self.temperature.detach() if isinstance(self.temperature, Tensor) else self.temperature

    def logits(self, rows: slice, copies: Tensor | None = None) -> Tensor:
        """Returns the similarities of a block of anchors to the whole pool, divided by the temperature.

        Args:
            rows: A block of r anchors.
            copies: For each candidate the first candidate that equals it [m], from `first_copies(pool)`. The logits of
                equal candidates are then exactly equal.

        Returns:
            Logits [r, m], in the dtype of the rows, also under autocast.

        Examples:
            >>> contrast = in_batch_negatives(torch.eye(3), torch.eye(3), temperature=0.5)
            >>> contrast.logits(slice(0, 1))
            tensor([[2., 0., 0.]])
        """
        with full_precision(self.pool):
            logits = self.anchors[rows] @ self.pool.T / self.held_temperature
        return logits if copies is None else logits[:, copies]

    def own_positive_logits(self) -> Tensor:
        """Returns the similarity of each anchor to its row of `positives`, divided by the temperature [n].

        If `has_own_positive` is False, this is the mean over the positives in the pool.

        Examples:
            >>> in_batch_negatives(torch.eye(3), torch.eye(3), temperature=0.5).own_positive_logits()
            tensor([2., 2., 2.])
        """
        return (self.anchors * self.positives).sum(dim=1) / self.held_temperature

    def positive_logits(self) -> Tensor:
        """Returns the logit of each anchor's positive [n]: the mean for several positives, 0 for none.

        Examples:
            >>> contrast = in_batch_negatives(torch.eye(3), torch.eye(3), temperature=0.5)
            >>> contrast.with_positives(torch.tensor([[1], [-1], [-1]])).positive_logits()
            tensor([1., 2., 2.])
        """
        own, columns = self.own_positive_logits(), self.positive_columns
        if columns is None or not self.has_own_positive:
            return own
        further = (self.anchors * sum_of_rows(self.pool, columns)).sum(dim=1) / self.held_temperature
        return (own + further) / (1 + (columns >= 0).sum(dim=1))

    def without(self, columns: Tensor | None = None, mask: ExcludedMask | None = None) -> Contrast:
        """Returns a contrast with fewer negatives.

        Args:
            columns: For each anchor the columns of the pool to exclude [n, k], integers, padded with -1.
            mask: Further columns to exclude: a function from a block of r anchors to a mask, bool [r, m].

        Returns:
            A new Contrast of the same tensors.

        Raises:
            ValueError: If `columns` is not an integer tensor [n, k] on the pool's device or, on the CPU, if a column is
                out of range.

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
        """Returns a contrast in which some negatives are further positives.

        Args:
            columns: For each anchor the negatives that become positives [n, k], integers, padded with -1. Columns that
                `excluded` lists for the anchor are ignored.

        Returns:
            A new Contrast of the same tensors. Anchors keep the positives that they have.

        Raises:
            ValueError: If `columns` is not an integer tensor [n, k] on the pool's device or, on the CPU, if a column is
                out of range.

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
        """Returns which columns of the pool are negatives for a block of r anchors, bool [r, m].

        Args:
            rows: A block of r anchors.

        Raises:
            ValueError: If `excluded_mask` does not return a bool tensor [r, m].

        Examples:
            >>> contrast = in_batch_negatives(torch.randn(3, 8), torch.randn(3, 8), temperature=0.05)
            >>> contrast.is_negative(slice(0, 2))
            tensor([[False,  True,  True],
                    [ True, False,  True]])
        """
        negative = is_not_among(self.excluded[rows], len(self.pool))
        return negative if self.excluded_mask is None else negative & ~self._masked(self.excluded_mask, rows)

    def is_hard_negative(self, rows: slice) -> Tensor:
        """Returns which columns `hard_negative_columns` lists for a block of r anchors, bool [r, m].

        Args:
            rows: A block of r anchors.

        Returns:
            The mask. It is False everywhere if the contrast has no explicit hard negatives.

        Examples:
            >>> anchors, positives, pool = torch.randn(2, 8), torch.randn(2, 8), torch.randn(3, 8)
            >>> hard = torch.tensor([[2], [-1]])
            >>> contrast = Contrast.of(anchors, positives, pool, None, 0.05, hard_negative_columns=hard)
            >>> contrast.is_hard_negative(slice(0, 2))
            tensor([[False, False,  True],
                    [False, False, False]])
        """
        columns = self.hard_negative_columns
        if columns is None:
            return torch.zeros(len(self.anchors[rows]), len(self.pool), dtype=torch.bool, device=self.pool.device)
        return ~is_not_among(columns[rows], len(self.pool))

    def _masked(self, excluded_mask: ExcludedMask, rows: slice) -> Tensor:
        """Returns the mask of a block of anchors, bool [r, m]. Raises a ValueError for any other result."""
        mask = excluded_mask(rows)
        shape = [len(self.anchors[rows]), len(self.pool)]
        if not isinstance(mask, Tensor) or list(mask.shape) != shape or mask.dtype != torch.bool:
            came = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"excluded_mask: expected bool {shape} (anchors of the block, pool), got {came}")
        return mask

    @property
    def is_own_pool(self) -> bool:
        """Whether anchors and pool are the same rows: anchor i is row i of the pool.

        Examples:
            >>> two_views(torch.randn(4, 8), torch.randn(4, 8), temperature=0.5).is_own_pool
            True
        """
        return self.anchors is self.pool and self.own_columns is None

    @property
    def count(self) -> Tensor:
        """The number of negatives of each anchor [n], in the dtype of the rows.

        Examples:
            >>> in_batch_negatives(torch.randn(3, 8), torch.randn(3, 8), temperature=0.05).count
            tensor([2., 2., 2.])
        """
        if self.excluded_mask is None:
            return (len(self.pool) - (self.excluded >= 0).sum(dim=1)).to(self.pool.dtype)
        step = rows_at_once(len(self.pool))
        blocks = (slice(start, start + step) for start in range(0, len(self.anchors), step))
        return torch.cat([self.is_negative(rows).sum(dim=1) for rows in blocks]).to(self.pool.dtype)


def with_gradient_of(temperature: float | Tensor, anchors: Tensor, positives: Tensor, pool: Tensor) -> list[Tensor]:
    """Returns anchors, positives and pool with the gradient of a learned temperature.

    Logits are bilinear in the rows. So the rows, multiplied by a factor of value 1 that depends on the temperature,
    carry its whole gradient.

    Args:
        temperature: The temperature, a number or a scalar tensor.
        anchors: Embeddings [n, d].
        positives: The positive of each anchor [n, d].
        pool: The candidates [m, d]. It may be the same tensor object as `anchors`.

    Returns:
        The three tensors. They are the arguments themselves if the temperature has no gradient.

    Examples:
        >>> z, t = torch.eye(2), torch.tensor(0.5, requires_grad=True)
        >>> anchors, positives, pool = with_gradient_of(t, z, z, z)
        >>> torch.autograd.grad((anchors @ pool.T / t.detach()).sum(), t)[0]  # of 2 / t
        tensor(-8.)
    """
    if not isinstance(temperature, Tensor) or not temperature.requires_grad:
        return [anchors, positives, pool]
    one = temperature.detach() / temperature
    if anchors is not pool:
        return [anchors * one, positives, pool]
    one = one.sqrt()  # it is a factor of both sides
    pool = pool * one
    return [pool, positives * one, pool]


def holds_all_anchors(contrast: Contrast) -> bool:
    """Whether the contrast contains the anchors of all processes, which the influence needs.

    Examples:
        >>> holds_all_anchors(two_views(torch.randn(4, 8), torch.randn(4, 8), temperature=0.5))
        True
    """
    gathered = contrast.gathered
    if gathered is None or isinstance(gathered.anchors, Tensor):
        return True
    return gathered.own_columns is not None and bool((gathered.own_columns >= 0).all())


def alone(contrast: Contrast) -> Contrast:
    """Returns the contrast without collectives, so that one process can work on it alone.

    The influence raises a ValueError if the contrast does not contain the anchors of all processes.

    Args:
        contrast: The anchors, positives and candidates.

    Returns:
        The contrast itself if its pool is not gathered, otherwise a new one of the same tensors.

    Examples:
        >>> contrast = two_views(torch.randn(4, 8), torch.randn(4, 8), temperature=0.5)
        >>> alone(contrast) is contrast
        True
    """
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


def in_batch_negatives(
    anchors: Tensor,
    positives: Tensor,
    temperature: float | Tensor,
    *,
    gathered: tuple[Tensor, Tensor] | None = None,
    offset: int = 0,
    **further: Any,
) -> Contrast:
    """Returns the contrast with in-batch negatives: the positives of the other anchors are an anchor's negatives.

    The rows are compared by inner products and are *not* normalised. Pass `unit_rows(...)` for cosine similarity.

    Args:
        anchors: Embeddings [n, d], floating point.
        positives: The positive of each anchor [n, d], same dtype. They are the pool of all anchors.
        temperature: The temperature that similarities are divided by, a finite number above 0 or a tensor with one
            element.
        gathered: The anchors and the positives of all processes, each [N, d]. The positives are then the pool. None for
            one process.
        offset: The index of this process's first anchor among the gathered anchors.
        further: Further arguments of `Contrast.of`: `excluded_mask`, `anchor_weights`, `last_layer`.

    Returns:
        A Contrast of n anchors with a pool of N positives, N = n for one process.

    Raises:
        ValueError: If the gathered rows differ in length, if `offset` is out of range, or as `Contrast.of` does.

    Examples:
        >>> contrast = in_batch_negatives(torch.randn(4, 8), torch.randn(4, 8), temperature=0.05)
        >>> contrast.pool.shape, contrast.count[0].item()
        (torch.Size([4, 8]), 3.0)
    """
    check_kinds(anchors=anchors, positives=positives)
    own, pool = torch.arange(len(anchors), device=anchors.device), positives
    if gathered is not None:
        all_anchors, pool = _checked_gathered(gathered, first=anchors)
        check_offset(offset, len(pool) - len(anchors))
        own = own + offset
        if len(pool) == processes() * len(anchors) > len(anchors):
            # Contrast.of converts the pool, too.
            constant = as_full_precision(all_anchors.detach())
            further["gathered"] = GatheredPool(constant, None, own, gather_constants)
    return Contrast.of(anchors, positives, pool, own[:, None], temperature, positives_in_pool=True, **further)


def _checked_gathered(gathered: tuple[Tensor, Tensor], **of_process: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the rows of all processes. Raises a ValueError if they do not go with each other or with a process's."""
    check_embeddings(**of_process, **{f"gathered[{part}]": rows for part, rows in enumerate(gathered)})
    check_same_length(**{f"gathered[{part}]": rows for part, rows in enumerate(gathered)})
    return gathered


def check_offset(offset: int, most: int) -> None:
    """Raises a ValueError unless it is an index of a process's first row among the gathered ones.

    Args:
        offset: The index.
        most: The largest that leaves room for the process's rows.

    Examples:
        >>> check_offset(4, most=4)
    """
    if not 0 <= offset <= most:
        raise ValueError(f"offset: expected a place from 0 to {most} among the gathered samples, got {offset}")


def two_views(
    first: Tensor,
    second: Tensor,
    temperature: float | Tensor,
    *,
    gathered: tuple[Tensor, Tensor] | None = None,
    offset: int = 0,
    **further: Any,
) -> Contrast:
    """Returns the contrast of SimCLR: the negatives of a view are all views of the other samples.

    The rows are compared by inner products and are *not* normalised. Pass `unit_rows(...)` for cosine similarity.

    Args:
        first: The first view of each sample [n, d], floating point.
        second: The second view of each sample [n, d], same dtype.
        temperature: The temperature that similarities are divided by, a finite number above 0 or a tensor with one
            element.
        gathered: The first and second views of the samples of all processes, each [N, d]. None for one process.
        offset: The index of this process's first sample among the gathered samples.
        further: Further arguments of `Contrast.of`: `excluded_mask`, `anchor_weights`, `last_layer`.

    Returns:
        A Contrast of 2n anchors with a pool of 2N candidates, N = n for one process. Both hold the first views, then
        the second views.

    Raises:
        ValueError: If the gathered views differ in length, if `offset` is out of range, or as `Contrast.of` does.

    Examples:
        >>> contrast = two_views(torch.randn(4, 8), torch.randn(4, 8), temperature=0.5)
        >>> contrast.pool.shape, contrast.count[0].item()
        (torch.Size([8, 8]), 6.0)
    """
    check_embeddings(first=first, second=second)
    check_same_length(first=first, second=second)
    if gathered is not None:
        _checked_gathered(gathered, first=first)
    # In full precision first: autocast has no `cat` of a half precision other than its own.
    first, second = as_full_precision(first), as_full_precision(second)
    pool = views = torch.cat([first, second])
    if gathered is not None:
        pool = torch.cat([as_full_precision(rows) for rows in gathered])
    check_offset(offset, len(pool) // 2 - len(first))
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


def _without_low(
    scores: Tensor, positives: Tensor, temperature: float | Tensor, own: slice | None
) -> tuple[Tensor, Tensor | None]:
    """Returns similarities [N, m] of which none is so low that others would lose their digits beside it.

    Beside them which of the own anchors' candidates were so low [n, m], or None if none was. A positive stays.
    """
    held = temperature.detach() if isinstance(temperature, Tensor) else temperature
    limit = scores.detach().amax(dim=1, keepdim=True) - LOW * held
    low = scores.detach() < limit
    of_own = slice(None) if own is None else own
    listed = isinstance(positives, Tensor) and not positives.is_floating_point() and positives.dim() == 2
    if listed and len(positives) == len(low[of_own]):
        low[of_own] &= is_not_among(positives.long().clamp(-1, scores.shape[1] - 1), scores.shape[1])
    if values_are_free(low) and not bool(low.any()):
        return scores, None
    return torch.where(low, limit, scores), low[of_own]


def _either(one: ExcludedMask, other: ExcludedMask, rows: slice) -> Tensor:
    return one(rows) | other(rows)


def same_label(of_anchors: Tensor, of_pool: Tensor) -> ExcludedMask:
    """Returns an `excluded_mask` that excludes candidates with the label of the anchor.

    Args:
        of_anchors: A label for each anchor [n], of any dtype: a class, or an identifier of a text or an image.
        of_pool: A label for each candidate [m].

    Returns:
        A function from a block of r anchors to a mask, bool [r, m], as `Contrast.of` takes it.

    Raises:
        ValueError: If the labels are not vectors, or are on different devices.

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
    """Returns a mask that is computed once, if the mask of all anchors is small enough to be kept.

    Use it for a mask that is expensive to compute.

    Args:
        mask: A function from a block of r anchors to a mask, bool [r, m].
        contrast: The contrast with these anchors.

    Returns:
        A function from a block of r anchors to the same mask. `mask` itself for a large contrast.

    Examples:
        >>> contrast = in_batch_negatives(torch.randn(3, 8), torch.randn(3, 8), temperature=0.05)
        >>> mask = kept_mask(same_label(torch.tensor([0, 1, 0]), torch.tensor([0, 1, 0])), contrast)
        >>> mask(slice(0, 1))
        tensor([[ True, False,  True]])
    """
    if len(contrast.anchors) > rows_at_once(len(contrast.pool), least=0):
        return mask
    of_all = mask(slice(0, len(contrast.anchors)))
    return lambda rows: of_all[rows]
