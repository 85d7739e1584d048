"""lightly's NT-Xent loss with its negatives weighted."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from lightly.loss.ntx_ent_loss import NTXentLoss as HostNTXentLoss
from lightly.models.modules.memory_bank import MemoryBankModule
from lightly.utils import dist
from torch import Tensor

from undimix_plugins.toolkit import (
    Contrast,
    GatheredPool,
    WeightedLoss,
    Weighting,
    check_equal_batches,
    contrast_of_views,
    gather_constants,
    info_nce,
    unit_rows,
)


class NTXentLoss(WeightedLoss, HostNTXentLoss):
    """lightly's `NTXentLoss` (SimCLR; MoCo with a memory bank) with its negatives weighted.

        loss_i = -log( exp(s_i+ / t) / (exp(s_i+ / t) + sum over j of w_ij exp(s_ij / t)) ),

    with cosines s, temperature t and weights w. The weights have mean 1 for `UnDiMix`; they are all 1 for `Uniform`,
    which gives lightly's own loss. An anchor's negatives are the views of all other samples in the batch, or the
    entries of the memory bank. With `gather_distributed` the batch is that of all processes.

    Args:
        temperature: Cosines are divided by it. A finite number above 0.
        memory_bank_size: (entries, width) of the memory bank; 0 for in-batch negatives.
        gather_distributed: Whether to use the negatives of all processes.
        weighting: How negatives are weighted. Default: `UnDiMix()`.

    Raises:
        ValueError: If the temperature is not a finite number above 0, or if lightly's class refuses a setting.
        TypeError: If `weighting` is not a `Weighting`.

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

    def weigh(self, weighting: Weighting | None, **options: Any) -> None:
        """Sets the weighting; a ValueError for a memory bank without a width, which lightly takes before 1.6."""
        size = self.memory_bank.size
        if size[0] and len(size) == 1:
            raise ValueError(f"memory_bank_size: expected 0 or (entries, width), got {size[0]}, without a width")
        super().weigh(weighting, **options)

    @property
    def no_last_layer(self) -> str:
        """A memory bank rules one out."""
        beside = "beside a memory bank, which keeps embeddings and no inputs of a layer"
        return beside if self.memory_bank.size[0] else ""

    def forward(self, out0: Tensor, out1: Tensor, labels: Tensor | None = None) -> Tensor:
        """The weighted loss of two views.

        Args:
            out0: Projections of the first views [batch, width], floating point.
            out1: Projections of the second views, or of the momentum encoder [batch, width].
            labels: The class of each sample [batch], integers. Samples of one class are then no negatives of each
                other. Not with a memory bank, which keeps no labels.

        Returns:
            A scalar in the projections' dtype (float32 for half precision). It is 0 for a batch of one pair.

        Raises:
            ValueError: If the projections are not matrices, are empty, do not match each other or the memory bank, or
                (on the CPU) are not finite; if the labels do not match, or there is a memory bank. On every process, if
                batches to gather differ in size. On other devices, the loss is NaN for non-finite projections. A call
                that raises any error leaves the memory bank as it was.
        """
        bank = self.memory_bank
        if not bank.size[0]:
            of_all = dist.gather if self.gather_distributed else None
            contrast = contrast_of_views(self, self.temperature, gather=of_all, labels=labels, out0=out0, out1=out1)
            return info_nce(contrast, self.weighting)
        if labels is not None:
            raise ValueError("labels: expected none beside a memory bank, whose entries have none, got some")

        def checked() -> list[Tensor]:
            rows, width = unit_rows(out0=out0, out1=out1), bank.bank.shape[-1]
            if width != rows[0].shape[1]:
                raise ValueError(f"out0: expected width {width}, as the memory bank has, got shape {list(out0.shape)}")
            return rows

        gathered, gather = None, self.gather_distributed and dist.world_size() > 1
        first, second = check_equal_batches("out0", checked, lambda rows: rows[0]) if gather else checked()
        if gather:
            gathered = _of_bank(first.detach(), bank.size[0])
        keys = second
        if first.requires_grad and bank.gather_distributed and dist.world_size() > 1:
            keys = gather_constants(second)  # before the loss, which may raise on one process while the others wait
        pool = _entries(bank, second).to(first)
        loss = info_nce(Contrast.of(first, second, pool, None, self.temperature, gathered=gathered), self.weighting)
        if first.requires_grad:
            _enqueue(bank, keys)  # once the loss is there: a step that raises leaves the bank as it was
        return loss


# Outside of a compiled graph: it would keep the bank for its backward pass, not the copy, and find it written to.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _entries(bank: MemoryBankModule, keys: Tensor) -> Tensor:
    """A copy of the bank's entries [entries, width]."""
    _, negatives = bank.forward(keys)
    assert negatives is not None
    return negatives.T


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _enqueue(bank: MemoryBankModule, keys: Tensor) -> None:
    """Puts keys, all processes' where these are gathered, in the place of the bank's oldest."""
    gathered = copy(bank)  # of the same entries
    gathered.gather_distributed = False
    gathered.forward(keys, update=True)


def _of_bank(anchors: Tensor, entries: int) -> GatheredPool:
    """What a bank that all processes have needs of them: their anchors, and from each a share of the entries' tasks."""
    share = -(-entries // dist.world_size())
    own = torch.arange(share, device=anchors.device) + dist.rank() * share

    def gather(rows: Tensor) -> Tensor:
        return gather_constants(rows)[:entries]

    return GatheredPool(partial(gather_constants, anchors), None, own.clamp(max=entries - 1), gather)
