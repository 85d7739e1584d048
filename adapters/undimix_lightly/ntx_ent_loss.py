"""lightly's NT-Xent loss with its negatives weighted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightly.loss.ntx_ent_loss import NTXentLoss as HostNTXentLoss
from lightly.utils import dist
from torch import Tensor, nn
from torch.nn.functional import normalize

from undimix_plugins import (
    Contrast,
    WeightedLoss,
    Weighting,
    as_full_precision,
    check_embeddings,
    info_nce,
    reweight,
    two_views,
)
from undimix_plugins.checks import check_number, check_same_length


class NTXentLoss(WeightedLoss, HostNTXentLoss):
    """lightly's `NTXentLoss` (SimCLR; MoCo with a memory bank) with its negatives weighted.

        loss_i = -log( exp(s_i+ / t) / (exp(s_i+ / t) + sum over j of w_ij exp(s_ij / t)) ),

    cosines s, temperature t, weights w of mean 1 for `UnDiMix` and all 1 for `Uniform`, which is lightly's own loss.
    An anchor's negatives are the views of all other samples in the batch (of all processes' batches with
    `gather_distributed`), or the memory bank's entries.

    Args:
        temperature: What cosines are divided by, a finite number above 0.
        memory_bank_size: (entries, width) of the memory bank; 0 for in-batch negatives.
        gather_distributed: Whether to use the negatives of all processes.
        weighting: How much each negative counts; defaults to `UnDiMix()`.

    Raises:
        ValueError: For a temperature that is no finite number above 0, and what lightly's class refuses.
        TypeError: For a weighting that is no `Weighting`.

    References:
        arXiv 2002.05709 (SimCLR), 1911.05722 (MoCo), 2206.01197 (UnDiMix, section 3).

    Examples:
        >>> criterion = NTXentLoss(temperature=0.5, weighting=UnDiMix(hardness=2.0))
        >>> loss = criterion(torch.randn(8, 32), torch.randn(8, 32))
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        weighting: Weighting | None = None,
    ) -> None:
        super().__init__(temperature, memory_bank_size, gather_distributed)
        self.weigh(weighting)

    def weigh(self, weighting: Weighting | None) -> None:
        """Sets the weighting; a ValueError for a temperature that no weighting can work with."""
        check_number("temperature", self.temperature, above=0)
        super().weigh(weighting)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The weighted loss of two views.

        Args:
            out0: Projections of the first views [batch, width], floating point.
            out1: Projections of the second views, or of the momentum encoder [batch, width].

        Returns:
            A scalar in the projections' dtype (float32 for half precision). 0 for a batch of one pair.

        Raises:
            ValueError: For projections that are no matrices, are empty or do not match each other or the memory bank,
                or (on the CPU) are not finite; the memory bank is left as it was. On other devices, non-finite
                projections give a loss of NaN.
        """
        check_embeddings(out0=out0, out1=out1)
        check_same_length(out0=out0, out1=out1)
        # In half precision a row of zeros, or a tiny one, would be divided by 0.
        out0, out1 = as_full_precision(out0), as_full_precision(out1)
        bank = self.memory_bank
        width = bank.bank.shape[-1]
        if bank.size[0] and width != out0.shape[1]:
            raise ValueError(f"out0: expected width {width}, as the memory bank has, got shape {list(out0.shape)}")
        out0, out1 = normalize(out0, dim=1), normalize(out1, dim=1)
        out1, negatives = bank.forward(out1, update=out0.requires_grad)
        if negatives is not None:
            contrast = Contrast(out0, out1, negatives.T.to(out0), None, self.temperature)
        elif self.gather_distributed and dist.world_size() > 1:
            gathered = (torch.cat(dist.gather(out0)), torch.cat(dist.gather(out1)))
            offset = dist.rank() * len(out0)
            contrast = two_views(out0, out1, self.temperature, gathered=gathered, offset=offset)
        else:
            contrast = two_views(out0, out1, self.temperature)
        return info_nce(contrast, self.weighting)


def weighted(loss: nn.Module, weighting: Weighting | None, **settings: Any) -> nn.Module:
    """lightly's adapter for `undimix()`."""
    return reweight(loss, weighting, {HostNTXentLoss: NTXentLoss}, **settings)
