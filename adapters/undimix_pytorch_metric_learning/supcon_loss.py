"""pytorch-metric-learning's supervised contrastive loss with its negatives weighted."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning.losses.supcon_loss import SupConLoss as HostSupConLoss
from torch import Tensor

from undimix_plugins.toolkit import Weighting
from undimix_pytorch_metric_learning.pair_loss import PairLoss
from undimix_pytorch_metric_learning.pairs import Pairs


class SupConLoss(PairLoss, HostSupConLoss):
    """pytorch-metric-learning's `SupConLoss` (supervised contrastive learning) with its negatives weighted.

    The loss of an anchor i with the positives P_i is

        loss_i = 1 / |P_i| * sum over p in P_i of -log( exp(s_ip / t) / Z_i ),
        Z_i = sum over p in P_i of exp(s_ip / t) + sum over j of w_ij exp(s_ij / t),

    with similarities s, temperature t and weights w. The negatives are the rows of other labels, or those that a miner
    lists. All of an anchor's positives are in the denominator. The weights have mean 1 for `UnDiMix`; they are all 1
    for `Uniform`, which gives the host's own loss. Negatives of other classes that are weighted by their similarity,
    `SupConLoss(weighting=HCL(beta=0.5, tau_plus=0))`, are known as H-SCL.

    Args:
        temperature: Similarities are divided by it. A finite number above 0.
        weighting: How negatives are weighted. Default: `UnDiMix()`.
        settings: The host's further arguments: `distance`, `reducer`, `embedding_regularizer`, `embedding_reg_weight`
            and `collect_stats`. The distance has to be `CosineSimilarity` (the default) or `DotProductSimilarity`.

    Raises:
        ValueError: If the temperature is not a finite number above 0, or if the distance is no inner product.
        TypeError: If `weighting` is not a `Weighting`, or if the host does not have an argument.

    References:
        Khosla et al.: Supervised Contrastive Learning, arXiv 2004.11362, equation 2; Jiang et al.: Supervised
        Contrastive Learning with Hard Negative Samples, arXiv 2209.00078 (H-SCL); arXiv 2206.01197 (UnDiMix, section
        3).

    Examples:
        >>> criterion = SupConLoss(temperature=0.1, weighting=UnDiMix(hardness=2.0))
        >>> loss = criterion(torch.randn(8, 32), torch.arange(8) % 2)
    """

    counts_repeats = False

    def __init__(self, temperature: float = 0.1, *, weighting: Weighting | None = None, **settings: Any) -> None:
        super().__init__(temperature, **settings)  # type: ignore[no-untyped-call]
        self.weigh(weighting)

    def _losses(self, positives: Tensor, negatives: Tensor, pairs: Pairs) -> tuple[Tensor, Any, str]:
        anchors, zeros = pairs.anchors, torch.zeros_like(negatives)
        most = torch.full_like(negatives, -torch.inf).scatter_reduce(0, anchors, positives.detach(), "amax")
        exponentials = (positives - most[anchors]).exp()
        count = torch.zeros_like(negatives).index_add(0, anchors, torch.ones_like(positives))
        none = count == 0
        log_sum = zeros.index_add(0, anchors, exponentials).masked_fill(none, 1).log() + most.masked_fill(none, 0)
        mean = zeros.index_add(0, anchors, positives) / count.masked_fill(none, 1)
        # The difference first: a tiny loss added to a large log-sum would be rounded off.
        losses = (self._surprise(negatives - log_sum) + (log_sum - mean)).masked_fill(none, 0)
        return losses, torch.arange(len(losses), device=losses.device), "element"
