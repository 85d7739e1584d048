"""lightly's model-aware contrastive loss with its negatives weighted."""

from __future__ import annotations

import torch
from lightly.loss.macl_loss import MACLLoss as HostMACLLoss
from torch import Tensor

from undimix_plugins.toolkit import WeightedLoss, Weighting, contrast_of_views, mean_loss, unit_rows


class MACLLoss(WeightedLoss, HostMACLLoss):
    """lightly's `MACLLoss` with its negatives weighted.

        loss_i = -V_i log P_i,   P_i = exp(s_i+ / t) / (exp(s_i+ / t) + sum over j of w_ij exp(s_ij / t)),
        V_i = 1 / (1 - P_i),     t = temperature * (1 + alpha * (A - A_0)),

    with cosines s, their mean A over the positive pairs, and weights w. The weights have mean 1 for `UnDiMix`; they are
    all 1 for `Uniform`, which gives lightly's own loss. V and t are constants of a step: no gradient flows through
    them.

    Args:
        temperature: The temperature t where A is A_0, a finite number above 0.
        alpha: How strongly the temperature follows A, in [0, 1].
        A_0: The A at which the temperature is `temperature`, in [0, 1].
        weighting: How negatives are weighted. Default: `UnDiMix()`.

    Raises:
        ValueError: If the temperature is not a finite number above 0, or if lightly's class refuses a setting.
        TypeError: If `weighting` is not a `Weighting`.

    References:
        Huang et al.: Model-Aware Contrastive Learning, ICML 2023, arXiv 2207.07874; arXiv 2206.01197 (UnDiMix,
        section 3).

    Examples:
        >>> loss = MACLLoss(temperature=0.1)(torch.randn(8, 32), torch.randn(8, 32))
    """

    def __init__(
        self, temperature: float = 0.1, alpha: float = 0.5, A_0: float = 0.0, weighting: Weighting | None = None
    ) -> None:
        super().__init__(temperature, alpha, A_0)
        self.weigh(weighting)

    def forward(self, z0: Tensor, z1: Tensor, labels: Tensor | None = None) -> Tensor:
        """The weighted loss of two views.

        Args:
            z0: Projections of the first views [batch, width], floating point.
            z1: Projections of the second views [batch, width].
            labels: The class of each sample [batch], integers. Samples of one class are then no negatives of each
                other.

        Returns:
            A scalar in the projections' dtype (float32 for half precision). It is 0 for a batch of one pair.

        Raises:
            ValueError: If the projections are not matrices, are empty, do not match each other, or (on the CPU) are not
                finite; if the labels do not match; if the positives are so far apart that the temperature would be 0.
                On other devices, the loss is NaN for non-finite projections.
        """
        first, second = unit_rows(z0=z0, z1=z1)
        alignment = (first.detach() * second.detach()).sum(dim=1).mean()
        temperature = self.temperature * (1 + self.alpha * (alignment - self.A_0))
        contrast = contrast_of_views(self, temperature, labels=labels, z0=z0, z1=z1)
        return mean_loss(contrast, self.weighting, self._of_margin, one_positive=True)

    def _of_margin(self, margin: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [r] and their derivatives [r]; 1 - P is the margin's sigmoid."""
        rest = margin.sigmoid()
        value = 1 / (rest.detach() + self.eps)
        return value * torch.logaddexp(margin, torch.zeros_like(margin)), value * rest
