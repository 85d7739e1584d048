"""pytorch-metric-learning's adapter: our class for each loss that has negatives to weight, and the losses around it."""

from __future__ import annotations

from typing import Any

from pytorch_metric_learning.losses.cross_batch_memory import CrossBatchMemory
from pytorch_metric_learning.losses.multiple_losses import MultipleLosses
from pytorch_metric_learning.losses.ntxent_loss import NTXentLoss as HostNTXentLoss
from pytorch_metric_learning.losses.self_supervised_loss import SelfSupervisedLoss
from pytorch_metric_learning.losses.supcon_loss import SupConLoss as HostSupConLoss
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import nn

from undimix_plugins.toolkit import WeightedLoss, Weighting, around, reweight, with_parts
from undimix_pytorch_metric_learning.ntxent_loss import NTXentLoss
from undimix_pytorch_metric_learning.supcon_loss import SupConLoss

CLASSES: dict[type[nn.Module], type[WeightedLoss]] = {HostNTXentLoss: NTXentLoss, HostSupConLoss: SupConLoss}
# Each holds the loss that it calls as `loss`.
WRAPPERS = (CrossBatchMemory, SelfSupervisedLoss, DistributedLossWrapper)


def weighted(loss: nn.Module, weighting: Weighting | None, **settings: Any) -> nn.Module:
    """pytorch-metric-learning's adapter for `undimix()`; in a loss around others, those inside are weighted."""
    if isinstance(loss, WRAPPERS):
        return around(loss, weighted(loss.loss, weighting, **settings))
    if isinstance(loss, MultipleLosses):
        inside: nn.ModuleList | nn.ModuleDict = loss.losses
        names = list(inside._modules)
        can_be = [name for name in names if isinstance(inside._modules[name], (*CLASSES, *WRAPPERS))]
        if can_be:
            new = {name: weighted(inside._modules[name], weighting, **settings) for name in can_be}
            if all(new[name] is inside._modules[name] for name in can_be):
                return loss
            return with_parts(loss, losses=with_parts(inside, **new))
        raise TypeError(
            "loss: expected a MultipleLosses with a loss that can be weighted, directly in it, got "
            f"{', '.join(type(part).__name__ for part in inside._modules.values())}"
        )
    if "exclude_same_class" in settings and isinstance(loss, tuple(CLASSES)):
        raise TypeError(
            f"exclude_same_class: expected none for {type(loss).__name__}, whose negatives already have other labels "
            f"than their anchor, got {settings['exclude_same_class']!r}"
        )
    return reweight(loss, weighting, CLASSES, **settings)
