"""sentence-transformers' MultipleNegativesRankingLoss, and what is made of it, with their negatives weighted."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.sparse_encoder import losses as sparse
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor, nn

from undimix_plugins import Uniform
from undimix_plugins.toolkit import (
    Contrast,
    GatheredPool,
    LastLayer,
    LastLayerInputs,
    WeightedLoss,
    Weighting,
    as_full_precision,
    check_embeddings,
    check_equal_batches,
    check_labels,
    check_number,
    check_same_length,
    check_temperature,
    gather_constants,
    gather_parts,
    info_nce,
    log_sums,
    processes,
    to_length_one,
)
from undimix_sentence_transformers.exclusions import Known, text_keys
from undimix_sentence_transformers.host import (
    Defaults,
    SymmetricDefaults,
    all_gather_with_grad,
    get_rank,
    initialise,
    warn_of_deprecation,
)
from undimix_sentence_transformers.host import losses as host

Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
PartitionMode = Literal["joint", "per_direction"]
HardnessMode = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]
Features = dict[str, Any]


class RankingLoss(WeightedLoss):
    """What the weighted ranking losses share: exclusions, and what a model's card says."""

    settings: ClassVar[Mapping[str, Any]] = {"exclude_duplicates": False, "exclude_same_class": False}
    exclude_duplicates: bool = False
    exclude_same_class: bool = False
    gather_across_devices: bool
    of_batch: Known | None = None  # what is known of the batch whose loss is worked out

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Without the host's warning of a subclass of a deprecated loss, whether or not anybody uses it."""
        with warnings.catch_warnings():
            deprecated = re.escape(getattr(cls, "__deprecated__", "") or "")
            warnings.filterwarnings("ignore", f"{deprecated}$", DeprecationWarning)
            super().__init_subclass__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model" and "model" in self._modules and self.last_layer is not None:
            self._follow(value)
        super().__setattr__(name, value)

    def _follow(self, model: nn.Module) -> None:
        """Goes on with the same layer of another model, as the Trainer sets one where it has a `model_init`."""
        assert self.last_layer is not None
        layer = self.last_layer.layer
        if all(part is not layer for part in model.modules()):
            theirs = dict(_bare(model).named_modules())
            for path, part in _bare(cast(nn.Module, self.model)).named_modules():
                if part is layer:
                    self.last_layer = LastLayer(cast(nn.Linear, theirs.get(path)))

    def set_options(self, **settings: Any) -> None:
        """Sets what the class takes beside the weighting; a ValueError for any beside `hardness_mode`."""
        super().set_options(**settings)
        mode = getattr(self, "hardness_mode", None)
        if mode is not None and any(settings.values()):
            raise ValueError(
                f"hardness_mode: expected None beside {', '.join(settings)}, got {mode!r}, which leaves the loss to "
                "the host"
            )

    def checked_batch(
        self, embeddings: Sequence[Tensor], labels: Tensor | None, cosines: bool
    ) -> tuple[list[Tensor], Known, list[Tensor] | None]:
        """Columns in full precision, of length 1 for cosines, what is known of them, and a last layer's inputs.

        Raises:
            ValueError: For what one of these refuses; on all processes where negatives are gathered.
        """

        def check() -> tuple[list[Tensor], Known, list[Tensor] | None]:
            columns = checked_columns(embeddings)
            return columns, self.known_of(columns[0], labels), self.inputs_of(*embeddings, normalized=cosines)

        gather = self.gather_across_devices
        checked = check_equal_batches("embeddings", check, lambda checked: checked[0][0]) if gather else check()
        columns, known, inputs = checked
        return [to_length_one(column) if cosines else as_full_precision(column) for column in columns], known, inputs

    def known_of(self, anchors: Tensor, labels: Tensor | None) -> Known:
        """What is known of the batch of these anchors [batch, width]; from labels alone where there are no texts."""
        of_batch = self.of_batch
        if of_batch is None:
            if self.exclude_duplicates:
                raise ValueError("exclude_duplicates: expected the loss to be called with texts, got embeddings alone")
            of_batch = self.known([], labels)
        check_labels(of_batch.labels, anchors, of="sample")
        return of_batch

    def known(self, features: Sequence[Features], labels: Tensor | None) -> Known:
        """What the batch says of its texts, as far as the settings ask; before the model changes the features."""
        keys = [text_keys(column) for column in features] if self.exclude_duplicates else []
        if not self.exclude_same_class:
            return Known(keys)
        if labels is None:
            raise ValueError(
                "exclude_same_class: expected a class for each sample, got none; the dataset needs a column 'label'"
            )
        if not isinstance(labels, Tensor) or labels.dim() != 1:
            came = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(
                f"exclude_same_class: expected a class for each sample, from the dataset's column 'label', got {came}"
            )
        return Known(keys, labels)

    def get_config_dict(self) -> dict[str, Any]:
        """The host's settings and the weighting, for the model card."""
        chosen = {name: getattr(self, name) for name in self.settings if getattr(self, name) != self.settings[name]}
        return {**super().get_config_dict(), "weighting": repr(self.weighting), **chosen}  # type: ignore[misc]

    @property
    def citation(self) -> str:
        """BibTeX of the host's loss and of the weighting, for the model card."""
        of_host = str(getattr(super(), "citation", ""))  # CachedGISTEmbedLoss has none
        return of_host.rstrip("\n") + "\n" + self.weighting.citation.lstrip("\n")


def _bare(model: nn.Module) -> nn.Module:
    """A model without what `torch.compile` and data parallelism put around it."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model


def joint_loss(contrasts: Sequence[Contrast], weighting: Weighting) -> Tensor:
    """The mean over the anchors of one softmax over all contrasts, whose first holds the positive that counts.

    A positive stands in it once for each pool that holds it, as in the host, and is multiplied by the weighting's
    `positive_factor`.
    """
    if len(contrasts) == 1 and contrasts[0].positives_in_pool:
        return info_nce(contrasts[0], weighting)
    terms = [log_sums(contrast, weighting, applies_factor=True) for contrast in contrasts]
    positive = terms[0].positives
    parts = [negatives for _, negatives in terms]
    parts += [positive + math.log(weighting.positive_factor) for contrast in contrasts if contrast.positives_in_pool]
    return (torch.stack(parts).logsumexp(dim=0) - positive).mean()


def checked_columns(embeddings: Sequence[Tensor]) -> list[Tensor]:
    """Columns of embeddings, dense; a ValueError for fewer than two, or bad ones."""
    if len(embeddings) < 2:
        raise ValueError(f"embeddings: expected at least 2 columns, got {len(embeddings)}")
    columns = [column if column.layout in (torch.strided, torch.jagged) else column.to_dense() for column in embeddings]
    named = {f"embeddings[{column}]": rows for column, rows in enumerate(columns)}
    check_embeddings(**named)
    check_same_length(**named)
    return columns


def of_every_process(scores: Tensor, first: int, gather: bool) -> Tensor:
    """The similarities of the anchors of all processes [N, m]; those of the others have no gradient.

    Args:
        scores: The similarities of this process's anchors [n, m].
        first: The place of the first of them among all.
        gather: Whether there are others; all processes call it then.
    """
    if not gather or processes() == 1:
        return scores
    every = gather_constants(scores)
    return torch.cat([every[:first], scores, every[first + len(scores) :]])


class InBatchLoss(RankingLoss):
    """What the losses without a guide share: from embeddings and the host's settings to the weighted loss."""

    scale: float
    directions: tuple[Direction, ...]
    partition_mode: PartitionMode
    hardness_mode: HardnessMode | None
    similarity_fct: Callable[[Tensor, Tensor], Tensor]

    def weigh(self, weighting: Weighting | None, **options: Any) -> None:
        """Sets the weighting; a ValueError for settings that do not go with it."""
        check_number("scale", self.scale, above=0)
        super().weigh(weighting, **options)
        if self.hardness_mode is not None and self.weighting != Uniform():
            raise ValueError(
                f"hardness_mode: expected None beside weighting={self.weighting}, got {self.hardness_mode!r}; both "
                "weight the same negatives. Use hardness_mode=None, or weighting=Uniform() for the host's own"
            )
        if self._products() == "cosine":  # others may need any scale
            check_temperature("scale", self.scale, inverse=True)

    @property
    def no_last_layer(self) -> str:
        """Similarities that are no inner products rule one out."""
        return "" if self._products() else "with a similarity_fct that is no inner product of embeddings"

    def _products(self) -> Literal["cosine", "dot"] | None:
        """What similarities are: cosines, plain inner products, or None for those of another function."""
        function: Any = self.similarity_fct
        owner = getattr(function, "__self__", None)
        if isinstance(owner, (SentenceTransformer, SparseEncoder)):
            # `model.similarity` is a bound method that looks up the model's similarity function by name.
            function = {"cosine": cos_sim, "dot": dot_score}.get(str(owner.similarity_fn_name))
        if function is cos_sim:
            return "cosine"
        return "dot" if function is dot_score else None

    def loss_of(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """The weighted loss of embedded columns, each [batch, width]."""
        cosines = self._products() == "cosine"
        columns, of_batch, inputs = self.checked_batch(embeddings, labels, cosines)
        contrasts = self._contrasts(columns, inputs, cosines, of_batch)
        if self.partition_mode == "joint":
            return joint_loss(contrasts, self.weighting)
        return torch.stack([info_nce(contrast, self.weighting) for contrast in contrasts]).mean()

    def _contrasts(
        self, columns: list[Tensor], inputs: list[Tensor] | None, cosines: bool, of_batch: Known
    ) -> list[Contrast]:
        """A contrast per direction, of this device's anchors with all devices' candidates where these are gathered."""
        local_queries, local_docs = columns[:2]
        everywhere = self.gather_across_devices
        # Gradients flow back to the other devices' embeddings.
        queries, *docs = (all_gather_with_grad(column) for column in columns) if everywhere else columns
        batch_size = len(local_queries)
        first = get_rank() * batch_size if everywhere else 0
        own = torch.arange(batch_size, device=queries.device) + first
        all_docs = torch.cat(docs)
        # A query's own documents, a column each of the concatenated ones: its positive, then its hard negatives.
        own_docs = torch.stack([own + column * len(queries) for column in range(len(docs))], dim=1)
        no_columns = own_docs[:, :0]  # of a pool without the anchors' hard negatives
        behind: dict[str, tuple[Tensor, Tensor]] = {}
        if inputs is not None:
            of_all = [gather_constants(part) if everywhere else part for part in inputs]
            behind = {"query": (inputs[0], of_all[0]), "doc": (inputs[1], torch.cat(of_all[1:]))}
        compared: dict[str, tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]] = {
            "query_to_doc": (local_queries, local_docs, all_docs, own[:, None], None),
            "query_to_query": (local_queries, local_docs, queries, None, own),
            "doc_to_query": (local_docs, local_queries, queries, own[:, None], None),
            "doc_to_doc": (local_docs, local_queries, all_docs, own_docs, own),
        }
        contrasts = []
        for direction, (anchors, positives, pool, excluded, own_columns) in compared.items():
            if direction not in self.directions:
                continue
            of_anchors, of_pool = direction.split("_to_")
            parts = len(docs) if of_pool == "doc" else 1
            last_layer = gathered = None
            if behind:
                last_layer = LastLayerInputs(behind[of_anchors][0], behind[of_pool][1], normalized=cosines)
            if len(queries) > batch_size:
                gathered = GatheredPool(
                    anchors=(queries if of_anchors == "query" else docs[0]).detach(),
                    own_columns=None if own_columns is None else torch.arange(len(queries), device=own.device),
                    own_rows=own_docs[:, :parts].T.flatten(),
                    gather=partial(gather_parts, parts=parts),
                )
            further: dict[str, Any] = {
                "excluded_mask": of_batch.mask(len(pool), hard=of_pool == "doc", everywhere=everywhere),
                "hard_negative_columns": (
                    (own_docs[:, 1:] if direction == "query_to_doc" else no_columns) if len(docs) > 1 else None
                ),
            }
            if self._products() is None:
                scores = of_every_process(self._similarities(of_anchors, anchors, pool), first, everywhere)
                of_positives = own[:, None]  # columns, or similarities where the pool holds no positives
                if own_columns is not None:
                    every = docs[0] if of_anchors == "query" else queries
                    to_each = self._similarities(of_anchors, anchors, every)
                    of_positives = of_every_process(to_each, first, everywhere)[:, own]
                    own_columns = torch.arange(len(queries), device=own.device)
                contrasts.append(
                    Contrast.of_scores(
                        scores,
                        of_positives,
                        excluded,
                        1 / self.scale,
                        own_columns,
                        vectors=pool,
                        own=slice(first, first + batch_size) if len(queries) > batch_size else None,
                        **further,
                    )
                )
                continue
            contrasts.append(
                Contrast.of(
                    anchors,
                    positives,
                    pool,
                    excluded,
                    1 / self.scale,
                    own_columns=own_columns,
                    # A pool of the anchors' own kind holds them themselves, one of the other kind their positives.
                    positives_in_pool=own_columns is None,
                    last_layer=last_layer,
                    gathered=gathered,
                    **further,
                )
            )
        return contrasts

    def _similarities(self, of_anchors: str, anchors: Tensor, pool: Tensor) -> Tensor:
        """The similarity of each anchor to each candidate, as the host asks for it: of queries to documents."""
        scores = self.similarity_fct(anchors, pool) if of_anchors == "query" else self.similarity_fct(pool, anchors).T
        if list(scores.shape) != [len(anchors), len(pool)]:
            raise ValueError(
                f"similarity_fct: expected a similarity of each row to each, [{len(anchors)}, {len(pool)}], got "
                f"{list(scores.shape)} from {self.similarity_fct!r}"
            )
        return scores


class MultipleNegativesRankingLoss(InBatchLoss, host.MultipleNegativesRankingLoss, Defaults):
    """sentence-transformers' `MultipleNegativesRankingLoss` with its in-batch and hard negatives weighted.

        loss_i = -log( exp(s_i+ * scale) / (c * exp(s_i+ * scale) + sum over j of w_ij exp(s_ij * scale)) ),

    with cosines or inner products s. The positive counts c times, as often as in the host. The weights w are normalised
    in each direction by itself: they have mean 1 over an anchor's negatives for `UnDiMix`, and are all 1 for `Uniform`,
    which gives the host's own loss.

    `undimix(loss, exclude_duplicates=True)` leaves out candidates that the batch itself shows to be no negatives: the
    anchor's or its positive's text again, or a text that is paired with it. `exclude_same_class=True` leaves out
    queries and positives of samples with the anchor's label; the dataset needs a column "label".

    Args:
        model: The SentenceTransformer to train.
        scale: Similarities are multiplied by it: `1 / temperature`. A finite number above 0.
        similarity_fct: As in the host: `cos_sim`, `dot_score`, `model.similarity`, or another function of two tensors
            of embeddings. `MoCHi`, the false-negative methods and a last layer need inner products.
        gather_across_devices: Whether to use the candidates of all devices.
        directions: As in the host. Each direction is one contrast.
        partition_mode: As in the host: "joint", one softmax over all directions, or "per_direction".
        hardness_mode: The host's own weighting of negatives (Lan et al. 2025); only with `weighting=Uniform()`.
        hardness_strength: The strength of `hardness_mode`.
        weighting: How negatives are weighted. Default: `UnDiMix()`.

    Raises:
        ValueError: If the host refuses a setting, the scale is not finite, or a `hardness_mode` is set with a
            weighting: both would weight the same negatives.
        TypeError: If `weighting` is not a `Weighting`.

    Inputs:
        (anchor, positive) pairs, or tuples with any number of hard negatives. Labels are used only for
        `exclude_same_class`.

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
        partition_mode: PartitionMode = "joint",
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
        weighting: Weighting | None = None,
    ) -> None:
        initialise(
            self,
            host.MultipleNegativesRankingLoss,
            model,
            scale=scale,
            similarity_fct=similarity_fct,
            gather_across_devices=gather_across_devices,
            directions=directions,
            partition_mode=partition_mode,
            hardness_mode=hardness_mode,
            hardness_strength=hardness_strength,
        )
        self.weigh(weighting)

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None) -> Tensor:
        """The weighted loss of a batch of tokenised columns.

        Args:
            sentence_features: The model's inputs for each column: anchors, positives, hard negatives.
            labels: The samples' classes [batch], used only if `exclude_same_class` is set.

        Returns:
            A scalar in the embeddings' dtype (float32 for half precision).

        Raises:
            ValueError: As `compute_loss_from_embeddings`; if a setting needs labels or texts that the batch does not
                have.
        """
        features = list(sentence_features)
        with_known = self.known(features, labels)
        self.of_batch = with_known
        try:
            return super().forward(features, labels)  # type: ignore[arg-type]  # labels may be None
        finally:
            self.of_batch = None

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """The weighted loss of a batch of embedded columns.

        Args:
            embeddings: Anchors, positives and any number of columns of hard negatives, each [batch, width].
            labels: The samples' classes [batch], used only if `exclude_same_class` is set.

        Returns:
            A scalar in the embeddings' dtype (float32 for half precision).

        Raises:
            ValueError: If there are fewer than two columns; if columns are not matrices, are empty, do not match each
                other, or (on the CPU) are not finite. On every process, if batches to gather differ in size. On other
                devices, the loss is NaN for non-finite embeddings.
        """
        if self.hardness_mode is not None:
            return super().compute_loss_from_embeddings(embeddings, labels)  # type: ignore[arg-type]  # unused there
        return self.loss_of(embeddings, labels)


class MultipleNegativesSymmetricRankingLoss(
    MultipleNegativesRankingLoss, host.MultipleNegativesSymmetricRankingLoss, SymmetricDefaults
):
    """sentence-transformers' `MultipleNegativesSymmetricRankingLoss` with its negatives weighted.

    The host's name for `MultipleNegativesRankingLoss` with `directions=("query_to_doc", "doc_to_query")` and
    `partition_mode="per_direction"`.

    Args:
        model: The SentenceTransformer to train.
        scale: Similarities are multiplied by it: `1 / temperature`. A finite number above 0.
        similarity_fct: As in `MultipleNegativesRankingLoss`.
        gather_across_devices: Whether to use the candidates of all devices.
        weighting: How negatives are weighted. Default: `UnDiMix()`.

    Raises:
        ValueError: As `MultipleNegativesRankingLoss`.
        TypeError: Likewise.

    Examples:
        >>> from sentence_transformers import SentenceTransformer
        >>> from sentence_transformers.sentence_transformer.modules import BoW
        >>> loss = MultipleNegativesSymmetricRankingLoss(SentenceTransformer(modules=[BoW(vocab=["a", "b"])]))
        >>> value = loss.compute_loss_from_embeddings([torch.randn(4, 8), torch.randn(4, 8)], None)
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        gather_across_devices: bool = False,
        weighting: Weighting | None = None,
    ) -> None:
        cls = host.MultipleNegativesSymmetricRankingLoss
        warn_of_deprecation(cls)
        initialise(
            self,
            cls,
            model,
            scale=scale,
            similarity_fct=similarity_fct,
            gather_across_devices=gather_across_devices,
        )
        self.weigh(weighting)


class SparseMultipleNegativesRankingLoss(MultipleNegativesRankingLoss, sparse.SparseMultipleNegativesRankingLoss):
    """sentence-transformers' `SparseMultipleNegativesRankingLoss` with its negatives weighted.

    Use it inside `SpladeLoss` or `CSRLoss`, as the host's loss. Otherwise it is as `MultipleNegativesRankingLoss`. The
    outer loss passes embeddings without texts, so `exclude_duplicates` is not possible.

    Args:
        model: The SparseEncoder to train.
        scale: Similarities are multiplied by it: `1 / temperature`. A finite number above 0.
        similarity_fct: As in `MultipleNegativesRankingLoss`.
        gather_across_devices: Whether to use the candidates of all devices.
        directions: As in the host. Each direction is one contrast.
        partition_mode: As in the host.
        hardness_mode: The host's own weighting of negatives; only with `weighting=Uniform()`.
        hardness_strength: The strength of `hardness_mode`.
        weighting: How negatives are weighted. Default: `UnDiMix()`.

    Raises:
        ValueError: As `MultipleNegativesRankingLoss`.
        TypeError: Likewise.

    Examples:
        >>> from sentence_transformers import SparseEncoder
        >>> from sentence_transformers.sparse_encoder.losses import SpladeLoss
        >>> def spladed(model: SparseEncoder) -> SpladeLoss:
        ...     return SpladeLoss(model, SparseMultipleNegativesRankingLoss(model), document_regularizer_weight=3e-5)
    """

    settings: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        model: SparseEncoder,
        scale: float = 1.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = dot_score,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: PartitionMode = "joint",
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
        weighting: Weighting | None = None,
    ) -> None:
        super().__init__(
            model,  # type: ignore[arg-type]  # as the host's own does
            scale,
            similarity_fct,
            gather_across_devices,
            directions,
            partition_mode,
            hardness_mode,
            hardness_strength,
            weighting,
        )

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None) -> Tensor:
        """Raises an AttributeError that names `SpladeLoss` and `CSRLoss`, as the host does."""
        return sparse.SparseMultipleNegativesRankingLoss.forward(self, sentence_features, labels)  # type: ignore[arg-type]


class CachedMultipleNegativesRankingLoss(InBatchLoss, host.CachedMultipleNegativesRankingLoss, Defaults):
    """sentence-transformers' `CachedMultipleNegativesRankingLoss` with its negatives weighted.

    The loss of `MultipleNegativesRankingLoss` for batches too large for the model at once. Embeddings are made twice,
    in mini-batches, and their gradients are cached in between (GradCache). The loss is computed for the whole batch,
    because weights are normalised over all of an anchor's negatives. Its memory grows with the batch, no faster.

    Args:
        model: The SentenceTransformer to train.
        scale: Similarities are multiplied by it: `1 / temperature`. A finite number above 0.
        similarity_fct: As in `MultipleNegativesRankingLoss`.
        mini_batch_size: How many texts the model embeds at once.
        mini_batch_num_tokens: How many tokens at once, in place of `mini_batch_size`; None to use that.
        gather_across_devices: Whether to use the candidates of all devices.
        directions: As in the host. Each direction is one contrast.
        partition_mode: As in the host.
        show_progress_bar: Whether to show a progress bar of the mini-batches.
        hardness_mode: The host's own weighting of negatives; only with `weighting=Uniform()`.
        hardness_strength: The strength of `hardness_mode`.
        weighting: How negatives are weighted. Default: `UnDiMix()`.

    Raises:
        ValueError: As `MultipleNegativesRankingLoss`, or if the host refuses a setting.
        TypeError: Likewise.

    References:
        Gao et al.: Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, arXiv 2101.06983;
        arXiv 2206.01197 (UnDiMix, section 3).

    Examples:
        >>> from sentence_transformers import SentenceTransformer
        >>> from sentence_transformers.sentence_transformer.modules import BoW
        >>> loss = CachedMultipleNegativesRankingLoss(SentenceTransformer(modules=[BoW(vocab=["a", "b"])]))
        >>> value = loss.calculate_loss([[torch.randn(2, 8), torch.randn(2, 8)], [torch.randn(4, 8)]])
    """

    replaces: ClassVar[tuple[str, ...]] = ("forward", "calculate_loss", "forward_cached")

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: PartitionMode = "joint",
        show_progress_bar: bool = False,
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
        weighting: Weighting | None = None,
    ) -> None:
        initialise(
            self,
            host.CachedMultipleNegativesRankingLoss,
            model,
            scale=scale,
            similarity_fct=similarity_fct,
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            gather_across_devices=gather_across_devices,
            directions=directions,
            partition_mode=partition_mode,
            show_progress_bar=show_progress_bar,
            hardness_mode=hardness_mode,
            hardness_strength=hardness_strength,
        )
        self.weigh(weighting)

    def weigh(self, weighting: Weighting | None, **options: Any) -> None:
        """Sets the weighting; a ValueError for settings that do not go with it."""
        # From 5.7 on the host's plain loss inside has the scale and so on: a copy, so that new ones are not the host's.
        if "loss" in self._modules:
            self.loss = copy(self.loss)
            self.loss.__dict__["_modules"] = self.loss._modules.copy()
        super().weigh(weighting, **options)

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None) -> Tensor:
        """The weighted loss of a batch of tokenised columns, whose backward pass embeds them again.

        Args:
            sentence_features: The model's inputs for each column: anchors, positives, hard negatives.
            labels: The samples' classes [batch], used only if `exclude_same_class` is set.

        Returns:
            A scalar in the embeddings' dtype (float32 for half precision).

        Raises:
            ValueError: As `MultipleNegativesRankingLoss.forward`.
        """
        features = list(sentence_features)
        self.of_batch = self.known(features, labels)
        try:
            return super().forward(features, labels)  # type: ignore[arg-type]  # labels may be None
        finally:
            self.of_batch = None

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The weighted loss of the whole batch.

        Args:
            reps: The embeddings of each column, in mini-batches [rows, width].
            labels: Not used, as in the host.
            with_backward: Whether to compute gradients now and return the loss without gradient.

        Returns:
            A scalar in the embeddings' dtype (float32 for half precision).

        Raises:
            ValueError: As `MultipleNegativesRankingLoss.compute_loss_from_embeddings`.
        """
        if self.hardness_mode is not None:
            return super().calculate_loss(reps, with_backward=with_backward)  # without labels, which are new and unused
        loss = self.loss_of([torch.cat(column) for column in reps], labels)
        if with_backward:
            torch.autograd.backward(loss)
        return loss.detach() if with_backward else loss


class CachedMultipleNegativesSymmetricRankingLoss(
    CachedMultipleNegativesRankingLoss, host.CachedMultipleNegativesSymmetricRankingLoss, SymmetricDefaults
):
    """sentence-transformers' `CachedMultipleNegativesSymmetricRankingLoss` with its negatives weighted.

    The host's name for `CachedMultipleNegativesRankingLoss` with `directions=("query_to_doc", "doc_to_query")` and
    `partition_mode="per_direction"`.

    Args:
        model: The SentenceTransformer to train.
        scale: Similarities are multiplied by it: `1 / temperature`. A finite number above 0.
        similarity_fct: As in `MultipleNegativesRankingLoss`.
        mini_batch_size: How many texts the model embeds at once.
        mini_batch_num_tokens: How many tokens at once, in place of `mini_batch_size`; None to use that.
        gather_across_devices: Whether to use the candidates of all devices.
        show_progress_bar: Whether to show a progress bar of the mini-batches.
        weighting: How negatives are weighted. Default: `UnDiMix()`.

    Raises:
        ValueError: As `CachedMultipleNegativesRankingLoss`.
        TypeError: Likewise.

    Examples:
        >>> from sentence_transformers import SentenceTransformer
        >>> from sentence_transformers.sentence_transformer.modules import BoW
        >>> loss = CachedMultipleNegativesSymmetricRankingLoss(SentenceTransformer(modules=[BoW(vocab=["a", "b"])]))
        >>> value = loss.calculate_loss([[torch.randn(4, 8)], [torch.randn(4, 8)]])
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        show_progress_bar: bool = False,
        weighting: Weighting | None = None,
    ) -> None:
        cls = host.CachedMultipleNegativesSymmetricRankingLoss
        warn_of_deprecation(cls)
        initialise(
            self,
            cls,
            model,
            scale=scale,
            similarity_fct=similarity_fct,
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            gather_across_devices=gather_across_devices,
            show_progress_bar=show_progress_bar,
        )
        self.weigh(weighting)

    def weigh(self, weighting: Weighting | None, **options: Any) -> None:
        """Sets the weighting; a TypeError if sentence-transformers is older than 5.3, whose loss is another."""
        cls = host.CachedMultipleNegativesSymmetricRankingLoss
        if not issubclass(cls, host.CachedMultipleNegativesRankingLoss):
            raise TypeError(
                f"loss: expected {cls.__name__} of sentence-transformers 5.3 or newer, got an older one's, which "
                "compares a positive with its mini-batch alone; use MultipleNegativesSymmetricRankingLoss"
            )
        super().weigh(weighting, **options)
