"""Adds synthetic negatives, mixed from the hardest negatives and the anchor (Kalantidis et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from undimix_plugins.blocks import blocks
from undimix_plugins.checks import check_whole
from undimix_plugins.contrast import Contrast
from undimix_plugins.settings import constant
from undimix_plugins.weightings.weighting import EqualWeights


@constant
@dataclass(frozen=True)
class MoCHi(EqualWeights):
    """Mixing of contrastive hard negatives (MoCHi): adds synthetic negatives to the denominator, each with weight 1.

    The N negatives most similar to an anchor q are its hardest negatives. Random pairs n_i, n_j of them are mixed to s
    synthetic negatives. Random single ones n_j are mixed with the anchor to s' more, which are even harder:

        h_k  = alpha_k n_i + (1 - alpha_k) n_j,  alpha_k in (0, 1)
        h'_k = beta_k q + (1 - beta_k) n_j,      beta_k in (0, .5)

    All are normalised to length 1. They are drawn again in each call and have no gradient, like the entries of a memory
    bank: gradients only flow to the anchor. An anchor with fewer than N negatives uses all of them. An anchor without
    negatives gets no synthetic ones. The method assumes cosine similarity.

    The n * (s + s_prime) synthetic rows are made in blocks of anchors, and again in the backward pass, so that only
    those of one block are in memory.

    Attributes:
        N: The number of hardest negatives that are mixed, at least 1.
        s: The number of synthetic negatives from pairs, at least 0.
        s_prime: The number of synthetic negatives from the anchor and a negative, at least 0.

    Raises:
        ValueError: If a number is not whole or out of its range, or if `s` and `s_prime` are both 0.

    References:
        Kalantidis, Sariyildiz, Pion, Weinzaepfel, Larlus: Hard Negative Mixing for Contrastive Learning, NeurIPS 2020,
        arXiv 2010.01028, section 3. The defaults are one of its settings for ImageNet.

    Examples:
        >>> contrast = two_views(torch.randn(8, 4), torch.randn(8, 4), temperature=0.5)
        >>> loss = info_nce(contrast, MoCHi(N=6, s=4, s_prime=2))
    """

    N: int = 1024
    s: int = 1024
    s_prime: int = 128

    citation: ClassVar[str] = """
@inproceedings{kalantidis2020hard,
    title={Hard Negative Mixing for Contrastive Learning},
    author={Yannis Kalantidis and Mert Bulent Sariyildiz and Noe Pion and Philippe Weinzaepfel and Diane Larlus},
    booktitle={Advances in Neural Information Processing Systems},
    year={2020},
    url={https://arxiv.org/abs/2010.01028},
}
"""

    adds_negatives: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, least in (("N", 1), ("s", 0), ("s_prime", 0)):
            check_whole(name, getattr(self, name), at_least=least)
        if not self.s and not self.s_prime:
            raise ValueError("s, s_prime: expected at least one above 0, got 0 for both")

    def combine(self, contrast: Contrast, positives: Tensor, negatives: Tensor, count: Tensor) -> Tensor:
        """Returns the log-sum of the negatives and the synthetic negatives [n]."""
        contrast.check_has_rows("MoCHi mixes them")
        size = contrast.pool.shape[1] * int(self.s + self.s_prime) + len(contrast.pool)  # synthetic rows, and logits
        synthetic = [
            checkpoint(self._log_sum, contrast.anchors[rows], contrast, rows, use_reentrant=False)
            for rows in blocks(len(contrast.anchors), size * contrast.pool.element_size(), kept=False)
        ]
        return torch.logaddexp(negatives, torch.cat(synthetic))

    def _log_sum(self, anchors: Tensor, contrast: Contrast, rows: slice) -> Tensor:
        """Returns the log-sum-exp of the logits of a block's synthetic negatives [r]."""
        logits = torch.bmm(self.synthesised(contrast, rows), anchors[:, :, None])[:, :, 0] / contrast.held_temperature
        if isinstance(contrast.temperature, Tensor) and contrast.anchors is contrast.pool:
            # Half of its gradient flows through the anchors, half through the pool, which has no gradient here.
            logits = logits * (contrast.held_temperature / contrast.temperature).sqrt()
        return logits.logsumexp(dim=1)

    @torch.no_grad()
    def synthesised(self, contrast: Contrast, rows: slice) -> Tensor:
        """Returns the synthetic negatives of r anchors [r, s + s_prime, d], of length 1, without gradient."""
        negative, anchors = contrast.is_negative(rows), contrast.anchors[rows]
        logits = contrast.logits(rows).masked_fill(~negative, -torch.inf)
        hardest = logits.topk(min(int(self.N), logits.shape[1]), dim=1).indices
        number = negative.sum(dim=1, keepdim=True).clamp(min=1, max=hardest.shape[1])

        def drawn(count: int) -> Tensor:
            place = (torch.rand(len(anchors), count, device=anchors.device) * number).long()
            return contrast.pool[hardest.gather(1, torch.minimum(place, number - 1))]

        s, s_prime = int(self.s), int(self.s_prime)
        alpha = torch.rand(len(anchors), s, 1, device=anchors.device, dtype=anchors.dtype)
        beta = torch.rand(len(anchors), s_prime, 1, device=anchors.device, dtype=anchors.dtype) / 2
        of_pairs = alpha * drawn(s) + (1 - alpha) * drawn(s)
        of_anchor = beta * anchors[:, None] + (1 - beta) * drawn(s_prime)
        return normalize(torch.cat([of_pairs, of_anchor], dim=1), dim=2)
