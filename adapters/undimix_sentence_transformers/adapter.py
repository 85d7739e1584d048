"""sentence-transformers' adapter: our class for each of its losses that has negatives to weight, and its wrappers."""

from __future__ import annotations

from copy import copy
from typing import Any

from sentence_transformers.sparse_encoder import losses as sparse
from torch import nn

from undimix_plugins.toolkit import WeightedLoss, Weighting, around, reweight
from undimix_sentence_transformers import gist_embed, multiple_negatives_ranking
from undimix_sentence_transformers.host import RELEASE, CachedLossDecorator
from undimix_sentence_transformers.host import losses as host

CLASSES: dict[type[nn.Module], type[WeightedLoss]] = {
    host.MultipleNegativesRankingLoss: multiple_negatives_ranking.MultipleNegativesRankingLoss,
    host.MultipleNegativesSymmetricRankingLoss: multiple_negatives_ranking.MultipleNegativesSymmetricRankingLoss,
    host.CachedMultipleNegativesRankingLoss: multiple_negatives_ranking.CachedMultipleNegativesRankingLoss,
    host.CachedMultipleNegativesSymmetricRankingLoss: (
        multiple_negatives_ranking.CachedMultipleNegativesSymmetricRankingLoss
    ),
    host.GISTEmbedLoss: gist_embed.GISTEmbedLoss,
    host.CachedGISTEmbedLoss: gist_embed.CachedGISTEmbedLoss,
    sparse.SparseMultipleNegativesRankingLoss: multiple_negatives_ranking.SparseMultipleNegativesRankingLoss,
}
# Each holds the loss that it modifies as `loss`. Matryoshka2dLoss and CachedSpladeLoss are subclasses.
WRAPPERS = (host.MatryoshkaLoss, host.AdaptiveLayerLoss, sparse.SpladeLoss, sparse.CSRLoss)
REFUSED = {
    "sentence_transformers.cross_encoder": (
        "a cross-encoder scores a pair of texts at once: there are no embeddings of negatives to compare"
    ),
}
if RELEASE >= (6, 0):
    from sentence_transformers.multi_vector_encoder import losses as late

    from undimix_sentence_transformers import multi_vector

    CLASSES |= {
        late.MultiVectorMultipleNegativesRankingLoss: multi_vector.MultiVectorMultipleNegativesRankingLoss,
        late.CachedMultiVectorMultipleNegativesRankingLoss: multi_vector.CachedMultiVectorMultipleNegativesRankingLoss,
    }


def weighted(loss: nn.Module, weighting: Weighting | None, **settings: Any) -> nn.Module:
    """sentence-transformers' adapter for `undimix()`; in a loss around another one, the inner loss is weighted."""
    for package, why in REFUSED.items():
        if type(loss).__module__.startswith(package):
            raise TypeError(f"loss: {type(loss).__name__} can't be weighted: {why}")
    if "Triplet" in type(loss).__name__ or isinstance(loss, host.MegaBatchMarginLoss):
        raise TypeError(
            f"loss: {type(loss).__name__} can't be weighted: it compares an anchor with one negative at a time, by a "
            "margin: there is no sum over negatives"
        )
    if isinstance(loss, WRAPPERS):
        return around(loss, weighted(loss.loss, weighting, **settings))
    decorator = vars(loss).get("calculate_loss")
    if not isinstance(decorator, CachedLossDecorator):
        return reweight(loss, weighting, CLASSES, **settings)
    # MatryoshkaLoss has put it on the object, where it would go on to call the host's loss.
    bare = copy(loss)
    del bare.__dict__["calculate_loss"]
    new = reweight(bare, weighting, CLASSES, **settings)
    if new is bare:
        return loss
    new.__dict__["calculate_loss"] = _decorated(new.calculate_loss, decorator)
    return new


def _decorated(calculate_loss: Any, like: CachedLossDecorator) -> CachedLossDecorator:
    """`calculate_loss` under the same decorator, or decorators, one around the other."""
    if isinstance(like.fn, CachedLossDecorator):
        calculate_loss = _decorated(calculate_loss, like.fn)
    return CachedLossDecorator(calculate_loss, like.matryoshka_dims, like.matryoshka_weights, like.n_dims_per_step)
