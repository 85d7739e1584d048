"""sentence-transformers' losses for late interaction, with their negatives weighted. It has them from 6.0 on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from sentence_transformers.multi_vector_encoder import losses as host
from sentence_transformers.multi_vector_encoder.model import MultiVectorEncoder
from torch import Tensor

from undimix_plugins.toolkit import (
    Contrast,
    Weighting,
    as_full_precision,
    check_equal_batches,
    check_number,
    info_nce,
    processes,
)
from undimix_sentence_transformers.host import get_rank
from undimix_sentence_transformers.multiple_negatives_ranking import Features, RankingLoss, of_every_process

Scorer = Callable[..., Tensor]


class MultiVectorLoss(RankingLoss):
    """What both losses share: from the similarities that the host works out to the weighted loss of them."""

    settings: ClassVar[Mapping[str, Any]] = {}
    no_last_layer = "with late interaction, which compares texts by many vectors each"
    scale: float
    similarity_fct: Scorer

    def weigh(self, weighting: Weighting | None, **options: Any) -> None:
        """Sets the weighting; a ValueError for a scale that is not finite."""
        check_number("scale", self.scale, above=0)
        super().weigh(weighting, **options)

    def _scored(self, run: Callable[[], Any], gradient: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Runs the host, and returns the similarities that it works out [n, m], and the documents' token vectors.

        These are [queries, documents, tokens, d], with their mask [queries, documents, tokens], or None.

        With a `gradient` of these similarities, a backward pass of the host has this one in place of its own.
        """
        scorer = self.similarity_fct
        scored: list[Tensor] = []
        documents: list[tuple[Tensor, Tensor | None]] = []
        given = vars(self).pop("similarity_fct", None)  # None: a module, which is kept elsewhere

        def record(queries: Tensor, stacked: Tensor, **masks: Tensor) -> Tensor:
            scores = scorer(queries, stacked, **masks)
            start = sum(map(len, scored))
            scored.append(scores)
            if not documents:
                documents.append((stacked, masks.get("documents_mask")))
            if gradient is None:
                return scores
            replaced: Tensor = _WithGradient.apply(scores, gradient[start : start + len(scores)])
            return replaced

        vars(self)["similarity_fct"] = record
        try:
            run()
        finally:
            del vars(self)["similarity_fct"]
            if given is not None:
                self.similarity_fct = given
        return torch.cat(scored), *documents[0]

    def _loss_of(self, scores: Tensor, documents: Tensor, mask: Tensor | None) -> Tensor:
        """The weighted loss of this process's queries with all documents, which stand query by query."""
        n, ranks = len(scores), processes() if self.gather_across_devices else 1
        first = get_rank() * n if ranks > 1 else 0
        of_query = scores.shape[1] // (n * ranks)
        positives = (torch.arange(n, device=scores.device)[:, None] + first) * of_query
        own = slice(first, first + n) if ranks > 1 else None
        contrast = Contrast.of_scores(
            of_every_process(scores, first, self.gather_across_devices),
            positives,
            None,
            1 / self.scale,
            vectors=_mean_vectors(documents, mask),
            own=own,
            hard_negative_columns=(
                positives + torch.arange(1, of_query, device=scores.device) if of_query > 1 else None
            ),
        )
        return info_nce(contrast, self.weighting)

    def _checked(self, features: list[Features]) -> list[Features]:
        """The batch; a ValueError on every process if batches to gather differ in size."""
        if self.gather_across_devices:
            check_equal_batches("sentence_features", lambda: features, lambda batch: batch[0]["attention_mask"])
        return features


class _WithGradient(torch.autograd.Function):
    """Values as they are, with a given gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None


def _mean_vectors(documents: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of each document's token vectors [queries * documents, d], without gradient."""
    documents = as_full_precision(documents.detach().flatten(0, 1))
    if mask is None:
        return documents.mean(dim=1)
    tokens = mask.flatten(0, 1)[:, :, None].to(documents.dtype)
    return (documents * tokens).sum(dim=1) / tokens.sum(dim=1).clamp(min=1)


class MultiVectorMultipleNegativesRankingLoss(MultiVectorLoss, host.MultiVectorMultipleNegativesRankingLoss):
    """sentence-transformers' `MultiVectorMultipleNegativesRankingLoss` (ColBERT) with its negatives weighted.

        loss_i = -log( exp(s_i+ * scale) / (exp(s_i+ * scale) + sum over j of w_ij exp(s_ij * scale)) ),

    with the similarity s of two texts by late interaction (MaxSim by default). Weights w have mean 1 for `UnDiMix`;
    they are all 1 for `Uniform`, which gives the host's own loss. The influence follows from the similarities
    (`Contrast.of_scores`). The diversity compares the means of the documents' token vectors.

    Args:
        model: The MultiVectorEncoder to train.
        scale: Similarities are multiplied by it. A finite number above 0.
        similarity_fct: As in the host. Default: MaxSim.
        mini_batch_size: As in the host.
        score_mini_batch_size: As in the host.
        gather_across_devices: Whether to use the documents of all devices.
        weighting: How negatives are weighted. Default: `UnDiMix()`.

    Raises:
        ValueError: If the scale is not a finite number above 0.
        TypeError: If `weighting` is not a `Weighting`.

    References:
        Khattab and Zaharia: ColBERT, arXiv 2004.12832; arXiv 2206.01197 (UnDiMix, section 3).

    Examples:
        >>> from sentence_transformers import MultiVectorEncoder
        >>> def weighted_loss_of(model: MultiVectorEncoder) -> MultiVectorMultipleNegativesRankingLoss:
        ...     return MultiVectorMultipleNegativesRankingLoss(model, weighting=UnDiMix(hardness=2.0))
    """

    def __init__(
        self,
        model: MultiVectorEncoder,
        *,
        scale: float = 1.0,
        similarity_fct: Scorer | None = None,
        mini_batch_size: int | None = None,
        score_mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
        weighting: Weighting | None = None,
    ) -> None:
        super().__init__(
            model,
            scale=scale,
            similarity_fct=similarity_fct,
            mini_batch_size=mini_batch_size,
            score_mini_batch_size=score_mini_batch_size,
            gather_across_devices=gather_across_devices,
        )
        self.weigh(weighting)

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The weighted loss of a batch of tokenised columns.

        Args:
            sentence_features: The model's inputs for each column: queries, positives, hard negatives.
            labels: Not used, as in the host.

        Returns:
            A scalar in float32. It is 0 for a single pair.

        Raises:
            ValueError: On the CPU, if similarities are not finite. On every process, if batches to gather differ in
                size. On other devices, the loss is NaN for similarities that are not finite.
        """
        features, forward = self._checked(list(sentence_features)), super().forward
        return self._loss_of(*self._scored(lambda: forward(features, labels)))


class CachedMultiVectorMultipleNegativesRankingLoss(
    MultiVectorLoss, host.CachedMultiVectorMultipleNegativesRankingLoss
):
    """sentence-transformers' `CachedMultiVectorMultipleNegativesRankingLoss` with its negatives weighted.

    The loss of `MultiVectorMultipleNegativesRankingLoss` for batches too large for the model at once. Similarities are
    computed twice: once for the loss of the whole batch, once more, in mini-batches, for its gradient.

    Args:
        model: The MultiVectorEncoder to train.
        scale: Similarities are multiplied by it. A finite number above 0.
        similarity_fct: As in the host. Default: MaxSim.
        mini_batch_size: How many texts the model embeds at once.
        mini_batch_num_tokens: How many tokens at once, in place of `mini_batch_size`; None to use that.
        score_mini_batch_size: How many queries are scored at once. Default: `mini_batch_size`.
        gather_across_devices: Whether to use the documents of all devices.
        show_progress_bar: Whether to show a progress bar of the mini-batches.
        weighting: How negatives are weighted. Default: `UnDiMix()`.

    Raises:
        ValueError: As `MultiVectorMultipleNegativesRankingLoss`, or if the host refuses a setting.
        TypeError: Likewise.

    References:
        Gao et al., arXiv 2101.06983; arXiv 2004.12832; arXiv 2206.01197 (UnDiMix, section 3).

    Examples:
        >>> from sentence_transformers import MultiVectorEncoder
        >>> def weighted_loss_of(model: MultiVectorEncoder) -> CachedMultiVectorMultipleNegativesRankingLoss:
        ...     return CachedMultiVectorMultipleNegativesRankingLoss(model, mini_batch_size=16)
    """

    replaces: ClassVar[tuple[str, ...]] = ("forward", "calculate_loss")

    def __init__(
        self,
        model: MultiVectorEncoder,
        *,
        scale: float = 1.0,
        similarity_fct: Scorer | None = None,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        score_mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
        show_progress_bar: bool = False,
        weighting: Weighting | None = None,
    ) -> None:
        super().__init__(
            model,
            scale=scale,
            similarity_fct=similarity_fct,
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            score_mini_batch_size=score_mini_batch_size,
            gather_across_devices=gather_across_devices,
            show_progress_bar=show_progress_bar,
        )
        self.weigh(weighting)

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The weighted loss of a batch of tokenised columns, whose backward pass embeds them again.

        Args:
            sentence_features: The model's inputs for each column: queries, positives, hard negatives.
            labels: Not used, as in the host.

        Returns:
            A scalar in float32.

        Raises:
            ValueError: As `MultiVectorMultipleNegativesRankingLoss.forward`.
        """
        return super().forward(self._checked(list(sentence_features)), labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], masks_chunks: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """The weighted loss of the whole batch.

        Args:
            reps: The token vectors of each column, in mini-batches [rows, tokens, d].
            masks_chunks: Which of these tokens count, in the same mini-batches [rows, tokens].
            with_backward: Whether to compute gradients now and return the loss without gradient.

        Returns:
            A scalar in float32.

        Raises:
            ValueError: As `MultiVectorMultipleNegativesRankingLoss.forward`.
        """
        calculate = super().calculate_loss
        if not with_backward:
            return self._loss_of(*self._scored(lambda: calculate(reps, masks_chunks)))
        with torch.no_grad():
            scores, documents, mask = self._scored(lambda: calculate(reps, masks_chunks))
        with torch.enable_grad():
            loss = self._loss_of(scores.requires_grad_(), documents, mask)
            (gradient,) = torch.autograd.grad(loss, scores)
        self._scored(lambda: calculate(reps, masks_chunks, with_backward=True), gradient)
        return loss.detach()
