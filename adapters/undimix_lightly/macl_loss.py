"""lightly's model-aware contrastive loss with its negatives weighted."""

from __future__ import annotations

import torch
from lightly.loss.macl_loss import MACLLoss as HostMACLLoss
from torch import Tensor

from undimix_lightly.views import contrast_of_views
from undimix_plugins.toolkit import WeightedLoss, Weighting, mean_loss, unit_rows


class MACLLoss(WeightedLoss, HostMACLLoss):
    """lightly's `MACLLoss` with its negatives weighted.

        loss_i = -V_i log P_i,   P_i = exp(s_i+ / t) / (exp(s_i+ / t) + sum over j of w_ij exp(s_ij / t)),
        V_i = 1 / (1 - P_i),     t = temperature * (1 + alpha * (A - A_0)),

    cosines s, their mean A over the positive pairs, weights w of mean 1 for `UnDiMix` and all 1 for `Uniform`, which is
    lightly's own loss. V and t are constants of a step: no gradient flows through them.

    Args:
        temperature: What cosines are divided by while A is A_0, a finite number above 0.
        alpha: How much the temperature follows A, in [0, 1].
        A_0: The A at which the temperature is `temperature`, in [0, 1].
        weighting: How much each negative counts; defaults to `UnDiMix()`.

    Raises:
        ValueError: For a temperature that is no finite number above 0, and what lightly's class refuses.
        TypeError: For a weighting that is no `Weighting`.

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
            labels: A class for each sample [batch], integers; samples of one class are then no negatives of each
                other.

        Returns:
            A scalar in the projections' dtype (float32 for half precision). 0 for a batch of one pair.

        Raises:
            ValueError: For projections that are no matrices, are empty or do not match each other, or (on the CPU) are
                not finite; for labels that do not match; for positives so far apart that the temperature would be 0.
                On other devices, non-finite projections give a loss of NaN.
        """
        first, second = unit_rows(z0=z0, z1=z1)
        alignment = (first.detach() * second.detach()).sum(dim=1).mean()
        temperature = self.temperature * (1 + self.alpha * (alignment - self.A_0))
        contrast = contrast_of_views(self, z0, z1, temperature, labels=labels)
        return mean_loss(contrast, self.weighting, self._of_margin, one_positive=True)

    def _of_margin(self, margin: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [r] and their derivatives [r]; 1 - P is the margin's sigmoid."""
        rest = margin.sigmoid()
        value = 1 / (rest.detach() + self.eps)
        return value * torch.logaddexp(margin, torch.zeros_like(margin)), value * rest
