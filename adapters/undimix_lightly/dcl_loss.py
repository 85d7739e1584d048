"""lightly's decoupled contrastive losses with their negatives weighted."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from lightly.loss.dcl_loss import DCLLoss as HostDCLLoss
from lightly.loss.dcl_loss import DCLWLoss as HostDCLWLoss
from lightly.utils import dist
from torch import Tensor

from undimix_plugins.toolkit import WeightedLoss, Weighting, contrast_of_views, decoupled, log_sums, release, unit_rows

WeightFunction = Callable[[Tensor, Tensor], Tensor]


class DCLLoss(WeightedLoss, HostDCLLoss):
    """lightly's `DCLLoss` with its negatives weighted.

        loss_i = -v_i s_i+ / t + log sum over j of w_ij exp(s_ij / t),

    with cosines s, temperature t and weights w. The weights have mean 1 for `UnDiMix`; they are all 1 for `Uniform`,
    which gives lightly's own loss. v comes from `weight_fn`; without one it is 1. The positive is not in the
    denominator. Negatives are the views of all other samples.

    Args:
        temperature: Cosines are divided by it. A finite number above 0.
        weight_fn: A function from two views of length 1, each [batch, width], to the weight of each sample's positive
            term [batch]; None for 1.
        gather_distributed: Whether to use the negatives of all processes.
        weighting: How negatives are weighted. Default: `UnDiMix()`.

    Raises:
        ValueError: If the temperature is not a finite number above 0, or if lightly's class refuses a setting.
        TypeError: If `weighting` is not a `Weighting`.

    References:
        Yeh et al.: Decoupled Contrastive Learning, arXiv 2110.06848, equation 6; arXiv 2206.01197 (UnDiMix, section 3).

    Examples:
        >>> criterion = DCLLoss(temperature=0.1, weighting=UnDiMix(hardness=2.0))
        >>> loss = criterion(torch.randn(8, 32), torch.randn(8, 32))
    """

    replaces: ClassVar[tuple[str, ...]] = ("forward", "_loss")

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: WeightFunction | None = None,
        gather_distributed: bool = False,
        weighting: Weighting | None = None,
    ) -> None:
        super().__init__(temperature, weight_fn, gather_distributed)
        self.weigh(weighting)

    def weigh(self, weighting: Weighting | None, **options: Any) -> None:
        """Sets the weighting; a TypeError if lightly is older than 1.5.21, whose losses are others."""
        installed = version("lightly")
        if release(installed) < (1, 5, 21):
            raise TypeError(
                f"loss: expected {type(self).__name__} of lightly 1.5.21 or newer, got {installed}'s, which has a "
                "denominator for each view in place of one for both"
            )
        super().weigh(weighting, **options)

    def forward(self, out0: Tensor, out1: Tensor, labels: Tensor | None = None) -> Tensor:
        """The weighted loss of two views.

        Args:
            out0: Projections of the first views [batch, width], floating point.
            out1: Projections of the second views [batch, width].
            labels: The class of each sample [batch], integers. Samples of one class are then no negatives of each
                other.

        Returns:
            A scalar in the projections' dtype (float32 for half precision). It is 0 for a batch of one pair.

        Raises:
            ValueError: If the projections are not matrices, are empty, do not match each other, or (on the CPU) are not
                finite; if the labels do not match. On every process, if batches to gather differ in size. On other
                devices, the loss is NaN for non-finite projections.
        """
        gather = dist.gather if self.gather_distributed else None
        contrast = contrast_of_views(self, self.temperature, gather=gather, labels=labels, out0=out0, out1=out1)
        if self.weight_fn is None:
            return decoupled(contrast, self.weighting)
        first, second = unit_rows(out0=out0, out1=out1)
        weights = self.weight_fn(first, second), self.weight_fn(second, first)
        positives, negatives = log_sums(contrast, self.weighting)
        of_positives = [weight * part for weight, part in zip(weights, positives.chunk(2), strict=True)]
        return (negatives - torch.cat(of_positives)).masked_fill(negatives.isneginf(), 0).mean()


class DCLWLoss(DCLLoss, HostDCLWLoss):
    """lightly's `DCLWLoss` with its negatives weighted: `DCLLoss` with negative von Mises-Fisher weights of positives.

        v_i = 2 - batch * softmax over the batch of (s_i+ / sigma)

    With `gather_distributed`, this softmax is over the process's own batch, as in lightly.

    Args:
        temperature: Cosines are divided by it. A finite number above 0.
        sigma: Cosines are divided by it in the positives' weights.
        gather_distributed: Whether to use the negatives of all processes.
        weighting: How negatives are weighted. Default: `UnDiMix()`.

    Raises:
        ValueError: As `DCLLoss`.
        TypeError: Likewise.

    References:
        Yeh et al.: Decoupled Contrastive Learning, arXiv 2110.06848, section 3.3; arXiv 2206.01197 (UnDiMix,
        section 3).

    Examples:
        >>> loss = DCLWLoss(temperature=0.1)(torch.randn(8, 32), torch.randn(8, 32))
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sigma: float = 0.5,
        gather_distributed: bool = False,
        weighting: Weighting | None = None,
    ) -> None:
        HostDCLWLoss.__init__(self, temperature, sigma, gather_distributed)
        self.weigh(weighting)
