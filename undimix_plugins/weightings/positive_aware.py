"""Leaves out negatives that are too similar, compared with the positive (Zhang et al. 2025, Moreira et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undimix_plugins.checks import LARGEST, check_choice, check_number
from undimix_plugins.components import first_copies
from undimix_plugins.contrast import Contrast, kept_mask
from undimix_plugins.settings import constant
from undimix_plugins.weightings.scope import SCOPES, check_in_scope, in_scope
from undimix_plugins.weightings.weighting import EqualWeights, Uniform, Weighting, check_share


@constant
@dataclass(frozen=True)
class PositiveAware(EqualWeights):
    """Leaves out negatives that are too similar to the anchor, compared with its positive: likely false negatives.

    With similarity s+ of the positive, a candidate of similarity s is no negative if

        s > s+ - margin           margin_strategy="absolute"
        s > s+ - margin * |s+|    margin_strategy="relative"

    All other negatives have weight 1. Names and signs are those of sentence-transformers' `GISTEmbedLoss`: a *negative*
    margin puts the limit above the positive. There a guide model gives the similarities, here the model that is trained
    does.

    The default is Qwen3-Embedding's: it leaves out negatives of `s > s+ + 0.1`. NV-Retriever mines hard negatives of at
    most 95 % of the positive's similarity: `PositiveAware(margin=0.05, margin_strategy="relative")`, there with the
    similarities of a teacher model. A limit below the positive leaves out hard true negatives, too, and an untrained
    model may put many candidates above it.

    `scope` chooses the negatives that may be left out. Qwen3-Embedding filters all of them. "in_batch_negatives" spares
    the explicit hard negatives, which have been curated; "hard_negatives" filters these alone.

    With several positives, s+ is their mean similarity. An anchor without positives keeps all its negatives.

    Attributes:
        margin: How far the limit is below the positive's similarity, from -1e30 to 1e30; negative for above.
        margin_strategy: "absolute" or "relative".
        scope: "all_negatives", "in_batch_negatives" or "hard_negatives". Another sample's hard negatives are in-batch
            negatives. If the loss has no explicit hard negatives, all negatives are in-batch negatives.

    Raises:
        ValueError: If `margin` is out of its range, or `margin_strategy` or `scope` is unknown. In a loss, if `scope`
            is "hard_negatives" and the loss has no explicit hard negatives.

    References:
        Zhang et al.: Qwen3 Embedding: Advancing Text Embedding and Reranking Through Foundation Models, arXiv
        2506.05176, training objective; Moreira et al.: NV-Retriever: Improving text embedding models with effective
        hard-negative mining, arXiv 2407.15831 (TopK-MarginPos, TopK-PercPos).

    Examples:
        >>> contrast = in_batch_negatives(torch.eye(3), torch.eye(3).roll(1, 0), temperature=0.05)
        >>> importance_weights(contrast, PositiveAware())  # of each anchor, the copy is 1 above the positive
        tensor([[0., 0., 1.],
                [1., 0., 0.],
                [0., 1., 0.]])
    """

    margin: float = -0.1
    margin_strategy: str = "absolute"
    scope: str = "all_negatives"

    citation: ClassVar[str] = """
@article{zhang2025qwen3embedding,
    title={Qwen3 Embedding: Advancing Text Embedding and Reranking Through Foundation Models},
    author={Yanzhao Zhang and Mingxin Li and Dingkun Long and Xin Zhang and Huan Lin and Baosong Yang and Pengjun Xie
            and An Yang and Dayiheng Liu and Junyang Lin and Fei Huang and Jingren Zhou},
    journal={arXiv preprint arXiv:2506.05176},
    year={2025},
    url={https://arxiv.org/abs/2506.05176},
}
@article{moreira2024nvretriever,
    title={NV-Retriever: Improving text embedding models with effective hard-negative mining},
    author={Gabriel de Souza P. Moreira and Radek Osmulski and Mengyao Xu and Ronay Ak and Benedikt Schifferer and
            Even Oldridge},
    journal={arXiv preprint arXiv:2407.15831},
    year={2024},
    url={https://arxiv.org/abs/2407.15831},
}
"""

    def __post_init__(self) -> None:
        if abs(check_number("margin", self.margin)) > LARGEST:
            raise ValueError(f"margin: expected a number from {-LARGEST:g} to {LARGEST:g}, got {self.margin!r}")
        check_choice("margin_strategy", self.margin_strategy, ("absolute", "relative"))
        check_choice("scope", self.scope, SCOPES)

    def softened(self, share: float) -> Weighting:
        """Returns `Uniform()` for a share of 0, otherwise the weighting itself: its decisions are not gradual."""
        return self if check_share(share) else Uniform()

    def choose(self, contrast: Contrast) -> Contrast:
        """Returns the contrast without the negatives above the limit."""
        check_in_scope(contrast, self.scope)
        copies, limit = first_copies(contrast.pool), self._limit(contrast)
        return contrast.without(mask=kept_mask(lambda rows: self._above(contrast, copies, limit, rows), contrast))

    @torch.no_grad()
    def _limit(self, contrast: Contrast) -> Tensor:
        """Returns the logit above which a candidate is no negative, for each anchor [n]."""
        positive = contrast.positive_logits()
        scale: Tensor | float = 1 / contrast.held_temperature
        if self.margin_strategy == "relative":
            scale = positive.abs()
        # The positive's own text can be in the pool twice. Its logit may be rounded to just above the positive's.
        lengths = contrast.anchors.norm(dim=1) * contrast.positives.norm(dim=1) / contrast.held_temperature
        limit: Tensor = positive - self.margin * scale + 32 * torch.finfo(positive.dtype).eps * lengths
        if contrast.has_own_positive or contrast.positive_columns is None:
            return limit
        return limit.masked_fill(~(contrast.positive_columns >= 0).any(dim=1), torch.inf)

    @torch.no_grad()
    def _above(self, contrast: Contrast, copies: Tensor | None, limit: Tensor, rows: slice) -> Tensor:
        """Returns which candidates in the scope are above the limit of each anchor of a block, bool [r, m]."""
        above = contrast.logits(rows, copies) > limit[rows, None]
        inside = in_scope(contrast, self.scope, rows)
        return above if inside is None else above & inside
