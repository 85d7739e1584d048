"""lightly's DetCon losses with their negatives weighted."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightly.loss.detcon_loss import DetConBLoss as HostDetConBLoss
from lightly.loss.detcon_loss import DetConSLoss as HostDetConSLoss
from lightly.utils import dist
from torch import Tensor

from undimix_plugins.toolkit import (
    Contrast,
    GatheredPool,
    LastLayerInputs,
    WeightedLoss,
    Weighting,
    check_embeddings,
    check_equal_batches,
    check_temperature,
    gather_constants,
    gather_parts,
    info_nce,
    to_length_one,
)


class DetConSLoss(WeightedLoss, HostDetConSLoss):
    """lightly's `DetConSLoss` with its negatives weighted.

    An anchor is a region r of an image in one view. Its positives P_r are the regions of the same mask of that image in
    the other view: several, one or none. For each view,

        loss_r = v_r / |P_r| * sum over p in P_r of -log( exp(s_rp / t) / Z_r ),
        Z_r = sum over p in P_r of exp(s_rp / t) + sum over j of w_rj exp(s_rj / t),

    with cosines s and temperature t. v_r is 1 over the number of regions of the anchor's mask in its view, or 0 without
    positives. The negatives are all other regions of all images in both views, except those of the same mask, image and
    view. Weights w have mean 1 for `UnDiMix`; they are all 1 for `Uniform`, which gives lightly's own loss. The loss is
    the mean over all regions of a view, added up over both views.

    Args:
        temperature: Cosines are divided by it. A finite number above 0.
        gather_distributed: Whether to use the negatives of all processes.
        weighting: How negatives are weighted. Default: `UnDiMix()`.

    Raises:
        ValueError: If the temperature is not a finite number above 0, or if lightly's class refuses a setting.
        TypeError: If `weighting` is not a `Weighting`.

    References:
        Henaff et al.: Efficient Visual Pretraining with Contrastive Detection, arXiv 2103.10957, section 3;
        arXiv 2206.01197 (UnDiMix, section 3).

    Examples:
        >>> criterion = DetConSLoss(gather_distributed=False)
        >>> masks = torch.randint(3, (2, 4, 5))
        >>> loss = criterion(torch.randn(4, 5, 16), torch.randn(4, 5, 16), *masks)
    """

    def __init__(
        self, temperature: float = 0.1, gather_distributed: bool = True, weighting: Weighting | None = None
    ) -> None:
        super().__init__(temperature, gather_distributed)
        self.weigh(weighting)

    def weigh(self, weighting: Weighting | None, **options: Any) -> None:
        """Sets the weighting; a ValueError for a temperature that no weighting can work with."""
        check_temperature("temperature", self.detconbloss.temperature)
        super().weigh(weighting, **options)

    def forward(self, view0: Tensor, view1: Tensor, mask_view0: Tensor, mask_view1: Tensor) -> Tensor:
        """The weighted loss of two views of a batch of images, each of a number of regions.

        Args:
            view0: Mask-pooled projections of the first views [batch, regions, width], floating point.
            view1: Mask-pooled projections of the second views [batch, regions, width].
            mask_view0: The mask of each region in the first views [batch, regions], integers.
            mask_view1: The mask of each region in the second views [batch, regions].

        Returns:
            A scalar in the projections' dtype (float32 for half precision).

        Raises:
            ValueError: If projections or masks do not match each other, or (on the CPU) are not finite. On every
                process, if batches to gather differ in size. On other devices, the loss is NaN for non-finite
                projections.
        """
        host: HostDetConBLoss = self.detconbloss
        views, masks = (view0, view1), (mask_view0, mask_view1)
        return _detcon(views, None, masks, host, self)


class DetConBLoss(WeightedLoss, HostDetConBLoss):
    """lightly's `DetConBLoss` with its negatives weighted.

    As `DetConSLoss`, but anchors are BYOL's predictions, and positives and negatives are its targets.

    Args:
        temperature: Cosines are divided by it. A finite number above 0.
        gather_distributed: Whether to use the negatives of all processes.
        weighting: How negatives are weighted. Default: `UnDiMix()`.

    Raises:
        ValueError: If the temperature is not a finite number above 0, or if lightly's class refuses a setting.
        TypeError: If `weighting` is not a `Weighting`.

    References:
        Henaff et al.: Efficient Visual Pretraining with Contrastive Detection, arXiv 2103.10957, section 3;
        arXiv 2206.01197 (UnDiMix, section 3).

    Examples:
        >>> criterion = DetConBLoss(gather_distributed=False)
        >>> predictions, targets = torch.randn(2, 2, 4, 5, 16)
        >>> loss = criterion(*predictions, *targets, *torch.randint(3, (2, 4, 5)))
    """

    no_last_layer = (
        "with DetConBLoss, whose anchors and candidates come from two layers, the predictor's and the target "
        "projector's"
    )

    def __init__(
        self, temperature: float = 0.1, gather_distributed: bool = True, weighting: Weighting | None = None
    ) -> None:
        super().__init__(temperature, gather_distributed)
        self.weigh(weighting)

    def forward(
        self,
        pred_view0: Tensor,
        pred_view1: Tensor,
        target_view0: Tensor,
        target_view1: Tensor,
        mask_view0: Tensor,
        mask_view1: Tensor,
    ) -> Tensor:
        """The weighted loss of two views of a batch of images, each of a number of regions.

        Args:
            pred_view0: Mask-pooled predictions of the first views [batch, regions, width], floating point.
            pred_view1: Mask-pooled predictions of the second views [batch, regions, width].
            target_view0: Mask-pooled targets of the first views [batch, regions, width].
            target_view1: Mask-pooled targets of the second views [batch, regions, width].
            mask_view0: The mask of each region in the first views [batch, regions], integers.
            mask_view1: The mask of each region in the second views [batch, regions].

        Returns:
            A scalar in the projections' dtype (float32 for half precision).

        Raises:
            ValueError: As `DetConSLoss.forward`.
        """
        predictions, targets = (pred_view0, pred_view1), (target_view0, target_view1)
        return _detcon(predictions, targets, (mask_view0, mask_view1), self, self)


Pair = tuple[Tensor, Tensor]


def _detcon(
    predictions: Pair,
    targets: Pair | None,
    masks: Pair,
    host: HostDetConBLoss,
    criterion: DetConSLoss | DetConBLoss,
) -> Tensor:
    """The loss of either view's predictions against both views' targets, which are the predictions for None."""
    one_branch = targets is None
    gather = host.gather_distributed and dist.world_size() > 1

    def checked() -> tuple[Tensor, list[Tensor] | None]:
        _check(predictions, targets, masks)
        return predictions[0], criterion.inputs_of(*(view.flatten(0, 1) for view in predictions))

    name = "view0" if one_branch else "pred_view0"
    _, inputs = check_equal_batches(name, checked, lambda rows: rows[0]) if gather else checked()
    b, m, _ = predictions[0].shape

    def rows(views: Tensor) -> Tensor:
        return to_length_one(views.flatten(0, 1))

    anchors = [rows(view) for view in predictions]
    pools = anchors if targets is None else [rows(view) for view in targets]
    first = 0  # where this process's regions stand in a view's pool
    if gather:
        pools = [torch.cat(dist.gather(view)) for view in pools]
        first = dist.rank() * b * m
    own = torch.arange(first, first + b * m, device=anchors[0].device)
    own_image = own.view(b, 1, m)
    losses = []
    for view, other in ((0, 1), (1, 0)):
        total = len(pools[other])
        same_there = masks[view][:, :, None] == masks[other][:, None, :]
        same_here = masks[view][:, :, None] == masks[view][:, None, :]
        last_layer = gathered = None
        if inputs is not None:
            of_all = inputs if total == b * m else [gather_constants(part) for part in inputs]
            last_layer = LastLayerInputs(inputs[view], torch.cat([of_all[other], of_all[view]]), normalized=True)
        if total > b * m:
            gathered = GatheredPool(
                anchors=partial(gather_constants, anchors[view]),
                own_columns=torch.arange(total, 2 * total, device=own.device) if one_branch else None,
                own_rows=torch.cat([own, total + own]),
                gather=partial(gather_parts, parts=2),
            )
        contrast = Contrast.of(
            anchors[view],
            torch.where(same_there, own_image, -1).flatten(0, 1),
            torch.cat([pools[other], pools[view]]),
            torch.where(same_here, total + own_image, -1).flatten(0, 1),
            host.temperature,
            own_columns=total + own if one_branch else None,
            anchor_weights=same_there.any(dim=2).flatten().to(anchors[0]) / same_here.sum(dim=2).flatten(),
            gathered=gathered,
            last_layer=last_layer,
        )
        losses.append(info_nce(contrast, criterion.weighting))
    return losses[0] + losses[1]


def _check(predictions: Pair, targets: Pair | None, masks: Pair) -> None:
    names = ("view0", "view1") if targets is None else ("pred_view0", "pred_view1")
    named = dict(zip(names, predictions, strict=True))
    if targets is not None:
        named.update(zip(("target_view0", "target_view1"), targets, strict=True))
    shape = list(predictions[0].shape)
    for name, views in named.items():
        if views.dim() != 3 or list(views.shape) != shape:
            expected = f"{shape}, as {names[0]} has" if len(shape) == 3 else "[batch, regions, width]"
            raise ValueError(f"{name}: expected shape {expected}, got {list(views.shape)}")
    check_embeddings(**{name: views.flatten(0, 1) for name, views in named.items()})
    for name, mask in zip(("mask_view0", "mask_view1"), masks, strict=True):
        if list(mask.shape) != shape[:2] or mask.is_floating_point() or mask.is_complex():
            raise ValueError(f"{name}: expected integers of shape {shape[:2]}, got {mask.dtype} {list(mask.shape)}")
