"""sentence-transformers' MultipleNegativesRankingLoss with its negatives weighted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as host
from sentence_transformers.util import (
    all_gather_with_grad,
    cos_sim,
    dot_score,
    get_rank,
    normalize_embeddings,
)
from torch import Tensor, nn

from undimix_plugins import (
    Contrast,
    Uniform,
    WeightedLoss,
    Weighting,
    as_full_precision,
    check_embeddings,
    info_nce,
    log_sums,
    reweight,
)
from undimix_plugins.checks import check_number, check_same_length

Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]


class MultipleNegativesRankingLoss(WeightedLoss, host.MultipleNegativesRankingLoss):
    """sentence-transformers' `MultipleNegativesRankingLoss` with its in-batch and hard negatives weighted.

        loss_i = -log( exp(s_i+ * scale) / (c * exp(s_i+ * scale) + sum over j of w_ij exp(s_ij * scale)) ),

    the positive counted c times, as often as the host counts it, and the weights w normalised in each direction on
    their own: mean 1 over an anchor's negatives for `UnDiMix`, all 1 for `Uniform`, which is the host's own loss.

    Args:
        model: The SentenceTransformer to train.
        scale: What similarities are multiplied by, `1 / temperature`; a finite number above 0.
        similarity_fct: `cos_sim` or `dot_score` of `sentence_transformers.util`, or the `model.similarity` that
            resolves to one of them: scores must be inner products of (normalised) embeddings.
        gather_across_devices: Whether to use the candidates of all devices.
        directions: As the host has it; one contrast each.
        partition_mode: As the host has it: "joint", one softmax over all directions, or "per_direction".
        hardness_mode: The host's own weighting of negatives (Lan et al. 2025); with `weighting=Uniform()` alone.
        hardness_strength: Of `hardness_mode`.
        weighting: How much each negative counts; defaults to `UnDiMix()`.

    Raises:
        ValueError: For what the host refuses, a scale that is not finite, another `similarity_fct`, or a
            `hardness_mode` beside a weighting: both weight the same negatives.
        TypeError: For a weighting that is no `Weighting`.

    Inputs:
        (anchor, positive) pairs, or tuples with any number of hard negatives; no labels.

    References:
        arXiv 1807.03748 (InfoNCE), 2308.03281 (all directions), 2206.01197 (UnDiMix, section 3).

    Examples:
        >>> from sentence_transformers import SentenceTransformer
        >>> from sentence_transformers.sentence_transformer.modules import BoW
        >>> model = SentenceTransformer(modules=[BoW(vocab=["a", "b"])])
        >>> loss = MultipleNegativesRankingLoss(model, weighting=UnDiMix(hardness=2.0))
        >>> value = loss.compute_loss_from_embeddings([torch.randn(4, 8), torch.randn(4, 8)], None)
    """

    replaces: ClassVar[tuple[str, ...]] = ("forward", "compute_loss_from_embeddings")

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: Literal["joint", "per_direction"] = "joint",
        hardness_mode: Literal["in_batch_negatives", "hard_negatives", "all_negatives"] | None = None,
        hardness_strength: float = 0.0,
        weighting: Weighting | None = None,
    ) -> None:
        super().__init__(
            model,
            scale,
            similarity_fct,
            gather_across_devices,
            directions,
            partition_mode,
            hardness_mode,
            hardness_strength,
        )
        self.weigh(weighting)

    def weigh(self, weighting: Weighting | None) -> None:
        """Sets the weighting; a ValueError for settings that do not go with it."""
        check_number("scale", self.scale, above=0)
        super().weigh(weighting)
        if self.hardness_mode is not None and self.weighting != Uniform():
            raise ValueError(
                f"hardness_mode: expected None beside weighting={self.weighting}, got {self.hardness_mode!r}; both "
                "weight the same negatives. Use hardness_mode=None, or weighting=Uniform() for the host's own"
            )
        self._compares_cosines()

    def _compares_cosines(self) -> bool:
        """Whether similarities are cosines or plain inner products; a ValueError for anything else."""
        function: Any = self.similarity_fct
        owner = getattr(function, "__self__", None)
        if isinstance(owner, SentenceTransformer):
            # `model.similarity` is a bound method that looks up the model's similarity function by name.
            function = {"cosine": cos_sim, "dot": dot_score}.get(str(owner.similarity_fn_name))
        if function is cos_sim or function is dot_score:
            return function is cos_sim
        raise ValueError(
            "similarity_fct: expected cos_sim or dot_score of sentence_transformers.util, or a model.similarity "
            f"that is one of them, got {self.similarity_fct!r}; weights need inner products of embeddings"
        )

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """The weighted loss of a batch of embedded columns.

        Args:
            embeddings: Anchors, positives and any number of columns of hard negatives, each [batch, width].
            labels: Not used, as in the host.

        Returns:
            A scalar in the embeddings' dtype (float32 for half precision).

        Raises:
            ValueError: For fewer than two columns, columns that are no matrices, are empty or do not match each other,
                or (on the CPU) are not finite. On other devices, non-finite embeddings give a loss of NaN.
        """
        if self.hardness_mode is not None:
            return super().compute_loss_from_embeddings(embeddings, labels)  # type: ignore[arg-type]  # unused there
        if len(embeddings) < 2:
            raise ValueError(f"embeddings: expected at least 2 columns, got {len(embeddings)}")
        named = {f"embeddings[{column}]": rows for column, rows in enumerate(embeddings)}
        check_embeddings(**named)
        check_same_length(**named)
        columns = [as_full_precision(column) for column in embeddings]
        if self._compares_cosines():
            columns = [normalize_embeddings(column) for column in columns]

        queries, *docs = columns
        batch_size, offset = len(queries), 0
        local_queries, local_docs = queries, docs[0]
        if self.gather_across_devices:
            # Gradients flow back to the other devices' embeddings: this device compares its own anchors with all.
            queries, *docs = (all_gather_with_grad(column) for column in columns)
            offset = get_rank() * batch_size

        own = torch.arange(offset, offset + batch_size, device=queries.device)
        contrasts = self._contrasts(local_queries, local_docs, queries, docs, own)
        if self.partition_mode != "joint" or (len(contrasts) == 1 and contrasts[0].positives_in_pool):
            return torch.stack([info_nce(contrast, self.weighting) for contrast in contrasts]).mean()
        terms = [log_sums(contrast, self.weighting) for contrast in contrasts]
        positive = terms[0].positives
        # The host's softmax is over all directions: a positive stands in it once for each pool that holds it.
        parts = [negatives for _, negatives in terms]
        parts += [positive for contrast in contrasts if contrast.positives_in_pool]
        log_z = torch.stack(parts).logsumexp(dim=0)
        return (log_z - positive).mean()

    def _contrasts(
        self, local_queries: Tensor, local_docs: Tensor, queries: Tensor, docs: list[Tensor], own: Tensor
    ) -> list[Contrast]:
        """A contrast per direction. `own` [batch] is where this device's rows stand among `queries` and `docs[0]`."""
        all_docs = torch.cat(docs)
        # A query's own documents, a column each of the concatenated ones: its positive, then its hard negatives.
        own_docs = torch.stack([own + column * len(queries) for column in range(len(docs))], dim=1)
        compared: dict[str, tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]] = {
            "query_to_doc": (local_queries, local_docs, all_docs, own[:, None], None),
            "query_to_query": (local_queries, local_docs, queries, None, own),
            "doc_to_query": (local_docs, local_queries, queries, own[:, None], None),
            "doc_to_doc": (local_docs, local_queries, all_docs, own_docs, own),
        }
        # A pool of the anchors' own kind holds the anchors themselves, one of the other kind their positives.
        return [
            Contrast(
                anchors, positives, pool, excluded, 1 / self.scale, itself=itself, positives_in_pool=itself is None
            )
            for direction, (anchors, positives, pool, excluded, itself) in compared.items()
            if direction in self.directions
        ]

    def get_config_dict(self) -> dict[str, Any]:
        """The host's settings and the weighting, for the model card."""
        return {**super().get_config_dict(), "weighting": repr(self.weighting)}

    @property
    def citation(self) -> str:
        """BibTeX of the host's loss and of the weighting, for the model card."""
        return super().citation.rstrip("\n") + "\n" + self.weighting.citation.lstrip("\n")


def weighted(loss: nn.Module, weighting: Weighting | None, **settings: Any) -> nn.Module:
    """sentence-transformers' adapter for `undimix()`."""
    return reweight(loss, weighting, {host.MultipleNegativesRankingLoss: MultipleNegativesRankingLoss}, **settings)
