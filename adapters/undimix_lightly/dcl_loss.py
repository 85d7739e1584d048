"""lightly's decoupled contrastive losses with their negatives weighted."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from lightly.loss.dcl_loss import DCLLoss as HostDCLLoss
from lightly.loss.dcl_loss import DCLWLoss as HostDCLWLoss
from torch import Tensor

from undimix_lightly.views import contrast_of_views
from undimix_plugins.toolkit import WeightedLoss, Weighting, decoupled, log_sums, unit_rows

WeightFunction = Callable[[Tensor, Tensor], Tensor]


class DCLLoss(WeightedLoss, HostDCLLoss):
    """lightly's `DCLLoss` with its negatives weighted.

        loss_i = -v_i s_i+ / t + log sum over j of w_ij exp(s_ij / t),

    cosines s, temperature t, weights w of mean 1 for `UnDiMix` and all 1 for `Uniform`, which is lightly's own loss;
    v of `weight_fn`, 1 without. The positive is not in the denominator; negatives are the views of all other samples.

    Args:
        temperature: What cosines are divided by, a finite number above 0.
        weight_fn: From two views of length 1, each [batch, width], to a weight of the positive term for each sample
            [batch]; None for 1.
        gather_distributed: Whether to use the negatives of all processes.
        weighting: How much each negative counts; defaults to `UnDiMix()`.

    Raises:
        ValueError: For a temperature that is no finite number above 0, and what lightly's class refuses.
        TypeError: For a weighting that is no `Weighting`.

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

    def forward(self, out0: Tensor, out1: Tensor, labels: Tensor | None = None) -> Tensor:
        """The weighted loss of two views.

        Args:
            out0: Projections of the first views [batch, width], floating point.
            out1: Projections of the second views [batch, width].
            labels: A class for each sample [batch], integers; samples of one class are then no negatives of each
                other.

        Returns:
            A scalar in the projections' dtype (float32 for half precision). 0 for a batch of one pair.

        Raises:
            ValueError: For projections that are no matrices, are empty or do not match each other, or (on the CPU) are
                not finite; for labels that do not match; on every process, for batches to gather that differ in size.
                On other devices, non-finite projections give a loss of NaN.
        """
        contrast = contrast_of_views(self, out0, out1, self.temperature, gather=self.gather_distributed, labels=labels)
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

    With `gather_distributed`, that softmax is over a process's own batch, as in lightly.

    Args:
        temperature: What cosines are divided by, a finite number above 0.
        sigma: What cosines are divided by in the positives' weights.
        gather_distributed: Whether to use the negatives of all processes.
        weighting: How much each negative counts; defaults to `UnDiMix()`.

    Raises:
        ValueError: As `DCLLoss` does.
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
