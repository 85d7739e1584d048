"""What the losses of this package share: from the host's pairs to a contrast, and to a loss for each pair or anchor."""

from __future__ import annotations

import math
from typing import Any

import torch
from pytorch_metric_learning.distances.dot_product_similarity import DotProductSimilarity
from pytorch_metric_learning.utils import common_functions
from torch import Tensor
from torch.nn.functional import normalize

from undimix_plugins.toolkit import (
    Contrast,
    LastLayerInputs,
    WeightedLoss,
    Weighting,
    as_full_precision,
    check_embeddings,
    full_precision,
    log_sums,
    to_length_one,
    values_are_free,
)
from undimix_pytorch_metric_learning.pairs import Pairs, pairs_by_indices, pairs_by_labels, positive_columns


class PairLoss(WeightedLoss):
    """Base class: computes the host's loss from the log-sums of the weighted negatives, one for each anchor.

    The host's own `forward` calls it: reducers, regularisers and statistics stay the host's.
    """

    distance: Any
    loss_method: Any
    temperature: float
    counts_repeats = True  # whether a pair counts as often as it is listed, as in the host
    replaces = ("forward", "compute_loss", "mat_based_loss", "pair_based_loss", "_compute_loss")

    def weigh(self, weighting: Weighting | None, **options: Any) -> None:
        """Sets the weighting; a ValueError for a distance that is no inner product."""
        self._check_distance()
        self.loss_method = getattr(self, self.loss_method.__name__)  # else it would be that of the host's object
        super().weigh(weighting, **options)

    def _check_distance(self) -> None:
        kind, host = type(self.distance), DotProductSimilarity
        own = [
            name for name in ("forward", "compute_mat", "normalize") if getattr(kind, name) is not getattr(host, name)
        ]
        if not isinstance(self.distance, host) or own or self.distance.power != 1:
            power = getattr(self.distance, "power", 1)
            raise ValueError(
                "distance: expected CosineSimilarity or DotProductSimilarity, whose similarities are inner products, "
                f"got {kind.__name__}{f' to the power of {power}' if power != 1 else ''}"
            )

    # How many pairs there are depends on the labels: the loss runs outside of a compiled graph, by the fast path.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Any,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> dict[str, Any]:
        """The weighted losses, as the host's `forward` gives them to the reducer.

        Args:
            embeddings: The anchors [n, width], floating point.
            labels: The label of each anchor [n], or None with an `indices_tuple`.
            indices_tuple: The pairs or triplets that are compared, as a miner returns them. None: all pairs by labels.
            ref_emb: What the anchors are compared with [m, width]. The host passes `embeddings` if there is none.
            ref_labels: Its labels [m].

        Returns:
            The host's dictionary of losses.

        Raises:
            ValueError: If there are neither labels nor indices, if embeddings are no matrices of one width, dtype and
                device, if indices do not fit, or (on the CPU) if embeddings are not finite. On other devices, the loss
                is NaN for non-finite embeddings.
        """
        common_functions.labels_or_indices_tuple_required(labels, indices_tuple)
        self._check_distance()  # which may have been set since
        # In full precision: a reference may be in another precision than what autocast leaves.
        check_embeddings(embeddings=as_full_precision(embeddings), ref_emb=as_full_precision(ref_emb))
        n, m = len(embeddings), len(ref_emb)
        if indices_tuple is not None:
            pairs = pairs_by_indices(indices_tuple, n, m, embeddings.device, repeats=self.counts_repeats)
        else:
            if ref_labels is None:
                raise ValueError("ref_labels: expected a label for each row of ref_emb, or an indices_tuple, got None")
            assert labels is not None
            pairs = pairs_by_labels(labels, ref_labels)
        look = pairs.listed is not None and ref_emb is embeddings and values_are_free(pairs.listed)
        if look and bool(pairs.listed.diagonal().any()):  # type: ignore[union-attr]
            raise ValueError("indices_tuple: expected no anchor as its own negative, got one")
        # The host takes one pair of each kind for none at all.
        counts = pairs.positive_count, pairs.negative_count
        if not min(counts) or max(counts) == 1:
            return self.zero_losses()  # type: ignore[no-any-return,operator]
        contrast = self._contrast(embeddings, ref_emb, pairs, same_labels=ref_labels is labels)
        negatives = log_sums(contrast, self.weighting, applies_factor=True).negatives
        losses, indices, kind = self._losses(_logits(contrast, pairs), negatives, pairs)
        return {"loss": {"losses": losses, "indices": indices, "reduction_type": kind}}

    def _losses(self, positives: Tensor, negatives: Tensor, pairs: Pairs) -> tuple[Tensor, Any, str]:
        """Returns the losses from the logits of the positive pairs [p] and the negatives' log-sums [n].

        Beside them their indices and the host's name for the kind of their reduction.
        """
        raise NotImplementedError

    def _surprise(self, margins: Tensor) -> Tensor:
        """Returns `log(factor + exp(margin))`: the negative log-probability of a positive. 0 without negatives."""
        factor = torch.full_like(margins, math.log(self.weighting.positive_factor))
        return torch.logaddexp(margins, factor).masked_fill(margins.isneginf(), 0)

    def _contrast(self, embeddings: Tensor, ref_emb: Tensor, pairs: Pairs, same_labels: bool) -> Contrast:
        """Returns every anchor with its positives and its negatives among the rows of the reference."""
        # With labels of its own, a reference may have an anchor's own row as its positive or negative.
        one_batch, unit = ref_emb is embeddings and same_labels, bool(self.distance.normalize_embeddings)
        self.distance.reset_stats()
        pool = self._compared(ref_emb)
        anchors = pool if one_batch else self._compared(embeddings)
        self.distance.set_default_stats(embeddings, ref_emb, anchors, pool)
        own = torch.arange(len(anchors), device=anchors.device)
        further: dict[str, Any] = {"excluded": own[:, None] if same_labels else None}
        inputs = self.inputs_of(*([embeddings] if one_batch else [embeddings, ref_emb]), normalized=unit)
        of_pool = inputs[-1] if inputs else None
        if pairs.listed is not None:
            columns, negative = _as_often_as_listed(pairs.listed)
            left_out = ~negative
            further = {"excluded": None, "excluded_mask": left_out.__getitem__}
            if columns is not None:
                pool, of_pool = pool[columns], None if of_pool is None else of_pool[columns]
        if inputs and of_pool is not None:
            further["last_layer"] = LastLayerInputs(inputs[0], of_pool, unit)
        if one_batch and anchors is not pool:
            further["own_columns"] = own
        return Contrast.of(
            anchors, positive_columns(pairs, len(anchors)), pool, temperature=self.temperature, **further
        )

    def _compared(self, rows: Tensor) -> Tensor:
        """Returns the rows as the distance compares them, in full precision."""
        if not self.distance.normalize_embeddings:
            return as_full_precision(rows)
        if self.distance.p == 2:
            return to_length_one(rows)
        return normalize(as_full_precision(rows), p=self.distance.p, dim=1)


def _as_often_as_listed(listed: Tensor) -> tuple[Tensor | None, Tensor]:
    """Returns the rows of a pool in which a negative that is listed k times is k candidates, and who has which.

    Args:
        listed: How often each pair is listed as a negative [n, m].

    Returns:
        The rows [q], where q >= m and the first m are all rows in order, or None if no pair is listed twice; and
        whether each is an anchor's negative, bool [n, q] or [n, m].
    """
    negative, most = [listed > 0], int(listed.max())
    if most == 1:
        return None, negative[0]
    columns = [torch.arange(listed.shape[1], device=listed.device)]
    for times in range(2, most + 1):
        again = listed >= times
        columns.append(again.any(dim=0).nonzero()[:, 0])
        negative.append(again[:, columns[-1]])
    return torch.cat(columns), torch.cat(negative, dim=1)


def _logits(contrast: Contrast, pairs: Pairs) -> Tensor:
    """Returns the similarities of the positive pairs, divided by the temperature [p]."""
    anchors, pool, temperature = contrast.anchors, contrast.pool, contrast.held_temperature
    with full_precision(pool):
        if len(pairs.anchors) * pool.shape[1] > len(anchors) * len(pool):  # what is smaller of the two
            return (anchors @ pool.T / temperature)[pairs.anchors, pairs.positives]
        return (anchors[pairs.anchors] * pool[pairs.positives]).sum(dim=1) / temperature
