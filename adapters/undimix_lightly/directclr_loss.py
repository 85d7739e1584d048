"""lightly's DirectCLR loss with its negatives weighted. lightly has the loss from 1.5.23 on."""

from __future__ import annotations

from collections.abc import Sequence

from lightly.loss.directclr_loss import DirectCLRLoss as HostDirectCLRLoss
from torch import Tensor

from undimix_lightly.ntx_ent_loss import NTXentLoss
from undimix_plugins.toolkit import Weighting


class DirectCLRLoss(HostDirectCLRLoss, NTXentLoss):
    """lightly's `DirectCLRLoss` with its negatives weighted: `NTXentLoss` on the first values of an encoding.

    Args:
        loss_dim: How many values of an encoding are compared, from the first on.
        temperature: Cosines are divided by it. A finite number above 0.
        memory_bank_size: (entries, width) of the memory bank; 0 for in-batch negatives.
        gather_distributed: Whether to use the negatives of all processes.
        weighting: How negatives are weighted. Default: `UnDiMix()`.

    Raises:
        ValueError: As `NTXentLoss`.
        TypeError: Likewise.

    References:
        Jing et al.: Understanding Dimensional Collapse in Contrastive Self-supervised Learning, arXiv 2110.09348;
        arXiv 2206.01197 (UnDiMix, section 3).

    Examples:
        >>> loss = DirectCLRLoss(loss_dim=16)(torch.randn(8, 32), torch.randn(8, 32))
    """

    no_last_layer = "with DirectCLRLoss, which compares the first values of an encoding"

    def __init__(
        self,
        loss_dim: int = 64,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        weighting: Weighting | None = None,
    ) -> None:
        super().__init__(loss_dim, temperature, memory_bank_size, gather_distributed)
        self.weigh(weighting)

    def forward(self, out0: Tensor, out1: Tensor, labels: Tensor | None = None) -> Tensor:
        """The weighted loss of the first `loss_dim` values of two views' encodings.

        Args:
            out0: Encodings of the first views [batch, ...], floating point.
            out1: Encodings of the second views [batch, ...].
            labels: As in `NTXentLoss.forward`.

        Returns:
            A scalar in the encodings' dtype (float32 for half precision).

        Raises:
            ValueError: As `NTXentLoss.forward`.
        """
        first, second = (out.flatten(start_dim=1)[:, : self.loss_dim] for out in (out0, out1))
        return NTXentLoss.forward(self, first, second, labels)
