"""pytorch-metric-learning's NT-Xent loss with its negatives weighted."""

from __future__ import annotations

from typing import Any

from pytorch_metric_learning.losses.ntxent_loss import NTXentLoss as HostNTXentLoss
from torch import Tensor

from undimix_plugins.toolkit import Weighting
from undimix_pytorch_metric_learning.pair_loss import PairLoss
from undimix_pytorch_metric_learning.pairs import Pairs


class NTXentLoss(PairLoss, HostNTXentLoss):
    """pytorch-metric-learning's `NTXentLoss` (InfoNCE) with its negatives weighted.

    The loss of a positive pair of anchor i and row p is

        loss_ip = -log( exp(s_ip / t) / (exp(s_ip / t) + sum over j of w_ij exp(s_ij / t)) ),

    with similarities s, temperature t and weights w. The negatives are the rows of other labels, or those that a miner
    lists. The anchor's other positives are not in the denominator. The weights have mean 1 for `UnDiMix`; they are all
    1 for `Uniform`, which gives the host's own loss. A negative that is listed k times for an anchor, as in triplets,
    counts as k negatives.

    The memory does not grow with positive pairs times negative pairs, as in the host's loss. A matrix of anchors times
    rows is kept only while it is small. In float32, the host's loss of a pair ends at 87, without a gradient. Ours goes
    on.

    Args:
        temperature: Similarities are divided by it. A finite number above 0.
        weighting: How negatives are weighted. Default: `UnDiMix()`.
        settings: The host's further arguments: `distance`, `reducer`, `embedding_regularizer`, `embedding_reg_weight`
            and `collect_stats`. The distance has to be `CosineSimilarity` (the default) or `DotProductSimilarity`.

    Raises:
        ValueError: If the temperature is not a finite number above 0, or if the distance is no inner product.
        TypeError: If `weighting` is not a `Weighting`, or if the host does not have an argument.

    References:
        arXiv 1807.03748, equation 4; arXiv 2002.05709, equation 1; arXiv 2206.01197 (UnDiMix, section 3).

    Examples:
        >>> criterion = NTXentLoss(temperature=0.07, weighting=UnDiMix(hardness=2.0))
        >>> loss = criterion(torch.randn(8, 32), torch.arange(8) % 4)
    """

    def __init__(self, temperature: float = 0.07, *, weighting: Weighting | None = None, **settings: Any) -> None:
        super().__init__(temperature, **settings)  # type: ignore[no-untyped-call]
        self.weigh(weighting)

    def _losses(self, positives: Tensor, negatives: Tensor, pairs: Pairs) -> tuple[Tensor, Any, str]:
        losses = self._surprise(negatives[pairs.anchors] - positives)
        return losses, (pairs.anchors, pairs.positives), "pos_pair"
