"""sentence-transformers' losses with a guide model. The negatives that the guide leaves are weighted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device, normalize_embeddings
from torch import Tensor

from undimix_plugins.toolkit import (
    Contrast,
    ExcludedMask,
    GatheredPool,
    LastLayerInputs,
    Weighting,
    as_full_precision,
    gather_constants,
    gather_parts,
)
from undimix_sentence_transformers.exclusions import Known
from undimix_sentence_transformers.host import (
    Defaults,
    all_gather_with_grad,
    embed_columns,
    get_rank,
    initialise,
    tokenised,
)
from undimix_sentence_transformers.host import losses as host
from undimix_sentence_transformers.multiple_negatives_ranking import (
    Features,
    RankingLoss,
    joint_loss,
)

MarginStrategy = Literal["absolute", "relative"]


class GuidedLoss(RankingLoss):
    """What both losses with a guide share: from embeddings, the model's and the guide's, to the weighted loss."""

    temperature: float
    margin_strategy: MarginStrategy
    margin: float
    contrast_anchors: bool
    contrast_positives: bool

    def loss_of(self, embeddings: Sequence[Tensor], of_guide: Sequence[Tensor]) -> Tensor:
        """The weighted loss of embedded columns, the model's and the guide's, each [batch, width]."""
        columns, of_batch, inputs = self.checked_batch(embeddings, None, cosines=True)
        guide = [normalize_embeddings(as_full_precision(column)) for column in of_guide]
        return joint_loss(self._contrasts(columns, guide, inputs, of_batch), self.weighting)

    def _contrasts(
        self, columns: list[Tensor], guide: list[Tensor], inputs: list[Tensor] | None, of_batch: Known
    ) -> list[Contrast]:
        anchors, positives = columns[:2]
        everywhere = self.gather_across_devices
        all_docs = [all_gather_with_grad(column) for column in columns[1:]] if everywhere else columns[1:]
        guide_docs = [gather_constants(column) if everywhere else column for column in guide[1:]]
        own = torch.arange(len(anchors), device=anchors.device) + (get_rank() * len(anchors) if everywhere else 0)
        threshold = (guide[0] * guide[1]).sum(dim=1)
        # A text that stands twice is rated as the positive, not above it, however either rating is rounded.
        tie = 32 * torch.finfo(threshold.dtype).eps
        threshold = threshold - self.margin * (threshold.abs() if self.margin_strategy == "relative" else 1)
        behind_docs: list[Tensor] | None = None
        if inputs is not None:
            behind_docs = [gather_constants(part) if everywhere else part for part in inputs[1:]]

        def mask(of_anchors: Tensor, of_pool: Tensor, *, hard: bool, everywhere: bool) -> ExcludedMask:
            known = of_batch.mask(len(of_pool), hard=hard, everywhere=everywhere)

            def is_no_negative(rows: slice) -> Tensor:
                likely = of_anchors[rows] @ of_pool.T > threshold[rows, None] + tie
                return likely if known is None else likely | known(rows)

            return is_no_negative

        def contrast(
            rows: Tensor,
            partners: Tensor,
            pool: Tensor,
            own_columns: Tensor | None,
            excluded_mask: ExcludedMask,
            behind: tuple[Tensor, Tensor] | None,
            hard_negatives: Tensor | None,
        ) -> Contrast:
            excluded = own[:, None] if own_columns is None else None
            gathered = None
            if len(all_docs[0]) > len(own) and pool is not anchors:
                starts = range(0, len(pool), len(all_docs[0]))
                gathered = GatheredPool(
                    anchors=partial(gather_constants, rows),
                    own_columns=None if own_columns is None else torch.arange(len(pool), device=own.device),
                    own_rows=torch.cat([own + start for start in starts]),
                    gather=partial(gather_parts, parts=len(starts)),
                )
            return Contrast.of(
                rows,
                partners,
                pool,
                excluded,
                self.temperature,
                own_columns=own_columns,
                positives_in_pool=own_columns is None,
                last_layer=None if behind is None else LastLayerInputs(*behind, normalized=True),
                excluded_mask=excluded_mask,
                gathered=gathered,
                hard_negative_columns=hard_negatives,
            )

        # An anchor's own hard negatives are in the pool of documents alone. None if the batch has no columns of them.
        hard, none = None, None
        if len(all_docs) > 1:
            hard = torch.stack([own + column * len(all_docs[0]) for column in range(1, len(all_docs))], dim=1)
            none = hard[:, :0]
        pool, of_pool = torch.cat(all_docs), torch.cat(guide_docs)
        behind = None if inputs is None or behind_docs is None else (inputs[0], torch.cat(behind_docs))
        marks = mask(guide[0], of_pool, hard=True, everywhere=everywhere)
        contrasts = [contrast(anchors, positives, pool, None, marks, behind, hard)]
        if self.contrast_anchors:
            # The host compares a device's anchors with those of that device alone.
            here = torch.arange(len(anchors), device=anchors.device)
            behind = None if inputs is None else (inputs[0], inputs[0])
            marks = mask(guide[0], guide[0], hard=False, everywhere=False)
            contrasts.append(contrast(anchors, positives, anchors, here, marks, behind, none))
        if self.contrast_positives:
            behind = None if inputs is None or behind_docs is None else (inputs[1], behind_docs[0])
            marks = mask(guide[1], guide_docs[0], hard=False, everywhere=everywhere)
            contrasts.append(contrast(positives, anchors, all_docs[0], own, marks, behind, none))
        return contrasts


class GISTEmbedLoss(GuidedLoss, host.GISTEmbedLoss, Defaults):
    """sentence-transformers' `GISTEmbedLoss` with the negatives that its guide leaves weighted.

        loss_i = -log( exp(s_i+ / t) / (exp(s_i+ / t) + sum over c of sum over j in N_ic of w_cij exp(s_cij / t)) ),

    with cosines s and temperature t. c runs over the contrasts: anchor to documents, anchor to anchors, positive to
    positives. N_ic are the candidates that the guide does not rate above the anchor's own pair (less the margin),
    without the anchor or positive itself. Weights w are normalised in each contrast by itself: they have mean 1 over
    N_ic for `UnDiMix`, and are all 1 for `Uniform`, which gives the host's own loss.

    There is one difference. A negative margin can raise the threshold to the guide's rating of a text with itself. The
    host then counts an anchor among its own negatives; this loss does not.

    Args:
        model: The SentenceTransformer to train.
        guide: The SentenceTransformer that finds candidates that are no negatives.
        temperature: Cosines are divided by it. A finite number above 0.
        margin_strategy: "absolute" or "relative", as in the host.
        margin: How far the guide's threshold is below the rating of the anchor's own pair.
        contrast_anchors: Whether to contrast anchors with anchors.
        contrast_positives: Whether to contrast positives with positives.
        gather_across_devices: Whether to use the documents of all devices.
        weighting: How negatives are weighted. Default: `UnDiMix()`.

    Raises:
        ValueError: If the temperature is not a finite number above 0, or if the host refuses a setting.
        TypeError: If `weighting` is not a `Weighting`.

    Inputs:
        (anchor, positive) pairs or (anchor, positive, negative) triplets.

    References:
        Solatorio: GISTEmbed, arXiv 2402.16829; arXiv 2206.01197 (UnDiMix, section 3).

    Examples:
        >>> from sentence_transformers import SentenceTransformer
        >>> def guided(model: SentenceTransformer, guide: SentenceTransformer) -> GISTEmbedLoss:
        ...     return GISTEmbedLoss(model, guide, temperature=0.05, weighting=UnDiMix(hardness=2.0))
    """

    def __init__(
        self,
        model: SentenceTransformer,
        guide: SentenceTransformer,
        temperature: float = 0.01,
        margin_strategy: MarginStrategy = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        gather_across_devices: bool = False,
        weighting: Weighting | None = None,
    ) -> None:
        initialise(
            self,
            host.GISTEmbedLoss,
            model,
            guide,
            temperature=temperature,
            margin_strategy=margin_strategy,
            margin=margin,
            contrast_anchors=contrast_anchors,
            contrast_positives=contrast_positives,
            gather_across_devices=gather_across_devices,
        )
        self.weigh(weighting)

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None) -> Tensor:
        """The weighted loss of a batch of tokenised columns.

        Args:
            sentence_features: The model's inputs for each column: anchors, positives, and hard negatives if there are
                any.
            labels: The samples' classes [batch], used only if `exclude_same_class` is set.

        Returns:
            A scalar in the embeddings' dtype (float32 for half precision).

        Raises:
            ValueError: If there are not 2 or 3 columns, or (on the CPU) embeddings are not finite. On every process, if
                batches to gather differ in size. On other devices, the loss is NaN for non-finite embeddings.
        """
        features = list(sentence_features)
        if len(features) not in (2, 3):
            raise ValueError(f"sentence_features: expected 2 or 3 columns, got {len(features)}")
        self.of_batch = self.known(features, labels)
        try:
            for_guide = [dict(column) for column in features]  # before the model writes into them
            embeddings = embed_columns(self.model, features)
            with torch.no_grad():
                of_guide = embed_columns(self.guide, [self._for_guide(column) for column in for_guide])
            return self.loss_of(embeddings, of_guide)
        finally:
            self.of_batch = None

    def _for_guide(self, features: dict[str, Any]) -> dict[str, Any]:
        """A column as the guide is given it: the same tokens, or others of its own."""
        if not self.must_retokenize:
            return features
        tokens = features["input_ids"]
        if "cu_seq_lens_q" in features:
            tokens = list(torch.tensor_split(tokens[0], features["cu_seq_lens_q"][1:-1].cpu()))
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return batch_to_device(tokenised(self.guide, texts), self.guide.device)


class CachedGISTEmbedLoss(GuidedLoss, host.CachedGISTEmbedLoss, Defaults):
    """sentence-transformers' `CachedGISTEmbedLoss` with the negatives that its guide leaves weighted.

    The loss of `GISTEmbedLoss`, with any number of columns of hard negatives, for batches too large for the model at
    once. Embeddings are made twice, in mini-batches, and their gradients are cached in between (GradCache). The loss is
    computed for the whole batch. Its memory grows with the batch, no faster.

    Args:
        model: The SentenceTransformer to train.
        guide: The SentenceTransformer that finds candidates that are no negatives.
        temperature: Cosines are divided by it. A finite number above 0.
        mini_batch_size: How many texts the models embed at once.
        mini_batch_num_tokens: How many tokens at once, in place of `mini_batch_size`; None to use that.
        show_progress_bar: Whether to show a progress bar of the mini-batches.
        margin_strategy: "absolute" or "relative", as in the host.
        margin: How far the guide's threshold is below the rating of the anchor's own pair.
        contrast_anchors: Whether to contrast anchors with anchors.
        contrast_positives: Whether to contrast positives with positives.
        gather_across_devices: Whether to use the documents of all devices.
        weighting: How negatives are weighted. Default: `UnDiMix()`.

    Raises:
        ValueError: If the temperature is not a finite number above 0, or if the host refuses a setting.
        TypeError: If `weighting` is not a `Weighting`.

    References:
        Solatorio: GISTEmbed, arXiv 2402.16829; Gao et al., arXiv 2101.06983 (GradCache); arXiv 2206.01197 (UnDiMix,
        section 3).

    Examples:
        >>> from sentence_transformers import SentenceTransformer
        >>> def guided(model: SentenceTransformer, guide: SentenceTransformer) -> CachedGISTEmbedLoss:
        ...     return CachedGISTEmbedLoss(model, guide, mini_batch_size=64)
    """

    replaces: ClassVar[tuple[str, ...]] = ("forward", "calculate_loss")

    def __init__(
        self,
        model: SentenceTransformer,
        guide: SentenceTransformer,
        temperature: float = 0.01,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        margin_strategy: MarginStrategy = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        gather_across_devices: bool = False,
        weighting: Weighting | None = None,
    ) -> None:
        initialise(
            self,
            host.CachedGISTEmbedLoss,
            model,
            guide,
            temperature=temperature,
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            show_progress_bar=show_progress_bar,
            margin_strategy=margin_strategy,
            margin=margin,
            contrast_anchors=contrast_anchors,
            contrast_positives=contrast_positives,
            gather_across_devices=gather_across_devices,
        )
        self.weigh(weighting)

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None) -> Tensor:
        """The weighted loss of a batch of tokenised columns, whose backward pass embeds them again.

        Args:
            sentence_features: The model's inputs for each column: anchors, positives, hard negatives.
            labels: The samples' classes [batch], used only if `exclude_same_class` is set.

        Returns:
            A scalar in the embeddings' dtype (float32 for half precision).

        Raises:
            ValueError: As `GISTEmbedLoss.forward`, but there may be any number of columns from 2 on.
        """
        features = list(sentence_features)
        self.of_batch = self.known(features, labels)
        try:
            return super().forward(features, labels)  # type: ignore[arg-type]  # labels may be None
        finally:
            self.of_batch = None

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """The weighted loss of the whole batch.

        Args:
            reps: The embeddings of each column, in mini-batches [rows, width].
            reps_guided: The guide's embeddings, in the same form.
            with_backward: Whether to compute gradients now and return the loss without gradient.

        Returns:
            A scalar in the embeddings' dtype (float32 for half precision).

        Raises:
            ValueError: If there are fewer than two columns, or columns do not match each other or (on the CPU) are not
                finite.
        """
        loss = self.loss_of(*([torch.cat(column) for column in columns] for columns in (reps, reps_guided)))
        if with_backward:
            torch.autograd.backward(loss)
        return loss.detach() if with_backward else loss
