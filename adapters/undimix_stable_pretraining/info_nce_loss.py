"""stable-pretraining's InfoNCE losses with their negatives weighted."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from stable_pretraining.losses.joint_embedding import InfoNCELoss as HostInfoNCELoss
from stable_pretraining.losses.joint_embedding import NTXEntLoss as HostNTXEntLoss
from stable_pretraining.losses.multimodal import CLIPLoss as HostCLIPLoss
from stable_pretraining.utils import all_gather, get_rank
from torch import Tensor

from undimix_plugins.toolkit import (
    Contrast,
    WeightedLoss,
    Weighting,
    check_columns,
    check_embeddings,
    check_equal_batches,
    check_temperature,
    contrast_of_views,
    info_nce,
    info_nce_both_ways,
    processes,
    to_length_one,
    unit_rows,
    values_are_free,
)


class InfoNCELoss(WeightedLoss, HostInfoNCELoss):
    """stable-pretraining's `InfoNCELoss` (in `losses.joint_embedding`) with its negatives weighted.

        loss_i = -log( exp(s_i+ / t) / (exp(s_i+ / t) + sum over j of w_ij exp(s_ij / t)) ),

    with cosines s, temperature t and weights w. The weights have mean 1 for `UnDiMix`; they are all 1 for `Uniform`,
    which gives stable-pretraining's own loss. An anchor's negatives are all candidates but its target and those that
    `mask` excludes.

    The influence compares all anchors with all candidates of a call. It does not know which candidates are anchors
    themselves, nor the anchors of other processes. For two views, use `NTXEntLoss`, which knows both.

    A call takes `anchors` [n, width], `candidates` [m, width], `targets` [n], `mask` and `logit_scale`. `targets` are
    the indices of the positives among the candidates. `mask` is bool [n, m], True where a candidate is left out, or
    None. `logit_scale` is the temperature of the call, or None. The result is a scalar, in float32 for half precision.
    A call raises a ValueError if these do not match each other, if the mask leaves out a target, or (on the CPU) if an
    embedding is not finite.

    Args:
        temperature: Cosines are divided by it. A finite number above 0.
        weighting: How negatives are weighted. Default: `UnDiMix()`.

    Raises:
        ValueError: If the temperature is not a finite number above 0.
        TypeError: If `weighting` is not a `Weighting`.

    References:
        van den Oord et al., arXiv 1807.03748, equation 4; arXiv 2206.01197 (UnDiMix, section 3).

    Examples:
        >>> anchors, candidates = torch.randn(4, 16), torch.randn(9, 16)
        >>> loss = InfoNCELoss(temperature=0.2)(anchors, candidates, targets=torch.arange(4))
    """

    replaces: ClassVar[tuple[str, ...]] = ("_compute",)  # which its forward calls, and that of a user's subclass
    no_last_layer = "with candidates that may come from elsewhere"

    def __init__(self, temperature: float = 0.07, weighting: Weighting | None = None) -> None:
        HostInfoNCELoss.__init__(self, temperature)
        self.weigh(weighting)

    def _compute(
        self,
        anchors: Tensor,
        candidates: Tensor,
        targets: Tensor,
        mask: Tensor | None = None,
        logit_scale: Tensor | float | None = None,
    ) -> Tensor:
        """Computes the weighted loss of a call, as the class describes it. The host's `forward` calls it."""
        anchors, candidates = _in_one_dtype(anchors, candidates)
        check_embeddings(anchors=anchors, candidates=candidates)
        _check_targets(targets, candidates)
        targets = check_columns("targets", targets, shape=(len(anchors),), pool=candidates)
        if mask is not None:
            _check_mask(mask, targets, candidates)
        contrast = Contrast.of(
            to_length_one(anchors),
            targets[:, None],
            to_length_one(candidates),
            None,
            _temperature(self.temperature, logit_scale),
            excluded_mask=None if mask is None else mask.__getitem__,
        )
        return info_nce(contrast, self.weighting)


class NTXEntLoss(InfoNCELoss, HostNTXEntLoss):
    """stable-pretraining's `NTXEntLoss` (SimCLR, NNCLR) with its negatives weighted.

        loss_i = -log( exp(s_i+ / t) / (exp(s_i+ / t) + sum over j of w_ij exp(s_ij / t)) ),

    with cosines s, temperature t and weights w. The weights have mean 1 for `UnDiMix`; they are all 1 for `Uniform`,
    which gives stable-pretraining's own loss. An anchor's negatives are the views of all other samples in the batch.
    With several processes the batch is that of all of them, as in stable-pretraining.

    Args:
        temperature: Cosines are divided by it. A finite number above 0.
        weighting: How negatives are weighted. Default: `UnDiMix()`.

    Raises:
        ValueError: If the temperature is not a finite number above 0.
        TypeError: If `weighting` is not a `Weighting`.

    References:
        Chen et al., arXiv 2002.05709 (SimCLR), equation 1; arXiv 2206.01197 (UnDiMix, section 3).

    Examples:
        >>> loss = NTXEntLoss(temperature=0.5)(torch.randn(8, 32), torch.randn(8, 32))
    """

    replaces = ("forward", "_compute")
    no_last_layer = ""

    def __init__(self, temperature: float = 0.5, weighting: Weighting | None = None) -> None:
        super().__init__(temperature, weighting)

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:  # type: ignore[override]  # as the host does
        """Computes the weighted loss of two views.

        Args:
            z_i: Projections of the first views [batch, width], floating point.
            z_j: Projections of the second views [batch, width].

        Returns:
            A scalar in the projections' dtype (float32 for half precision). It is 0 for a batch of one pair.

        Raises:
            ValueError: If the projections are not matrices, are empty, do not match each other, or (on the CPU) are not
                finite. On every process, if batches differ in size. On other devices, the loss is NaN for non-finite
                projections.
        """
        z_i, z_j = _in_one_dtype(z_i, z_j)
        contrast = contrast_of_views(self, self.temperature, gather=all_gather, z_i=z_i, z_j=z_j)
        return info_nce(contrast, self.weighting)


class CLIPLoss(InfoNCELoss, HostCLIPLoss):
    """stable-pretraining's `CLIPLoss` with its negatives weighted.

        loss = mean over both directions of mean over i of
               -log( exp(s_ii / t) / (exp(s_ii / t) + sum over j != i of w_ij exp(s_ij / t)) ),

    with the cosine s_ij of features i of one kind and j of the other, temperature t and weights w. The weights have
    mean 1 for `UnDiMix`; they are all 1 for `Uniform`, which gives stable-pretraining's own loss. With several
    processes, pairs of all of them are compared, as in stable-pretraining.

    Args:
        temperature: Cosines are divided by it, unless a call has a `logit_scale`. A finite number above 0.
        weighting: How negatives are weighted. Default: `UnDiMix()`.

    Raises:
        ValueError: If the temperature is not a finite number above 0.
        TypeError: If `weighting` is not a `Weighting`.

    References:
        Radford et al., arXiv 2103.00020 (CLIP), figure 3; arXiv 2206.01197 (UnDiMix, section 3).

    Examples:
        >>> loss = CLIPLoss(temperature=0.07)(torch.randn(8, 32), torch.randn(8, 32))
    """

    replaces = ("forward", "_compute")
    no_last_layer = "with a loss of two kinds of features, which come from a layer each"

    def forward(  # type: ignore[override]  # as the host does
        self, feats_i: Tensor, feats_j: Tensor, logit_scale: Tensor | float | None = None
    ) -> Tensor:
        """Computes the weighted loss of a batch of pairs.

        Args:
            feats_i: Features of one kind [batch, width], such as of images, floating point.
            feats_j: Features of the other kind [batch, width].
            logit_scale: The temperature of this call, instead of the loss's own: a number, or a tensor with one
                element, which gets its gradient. As in stable-pretraining, cosines are *divided* by it.

        Returns:
            A scalar in the features' dtype (float32 for half precision). It is 0 for a single pair.

        Raises:
            ValueError: If features are not matrices, are empty, do not match each other, or (on the CPU) are not
                finite, or if `logit_scale` is not above 0. On every process, if batches differ in size. On other
                devices, the loss is NaN for non-finite features.
        """

        def checked() -> tuple[Tensor, Tensor, Tensor | float]:
            of_i, of_j = _in_one_dtype(feats_i, feats_j)
            first, second = unit_rows(feats_i=of_i, feats_j=of_j)
            return first, second, _temperature(self.temperature, logit_scale)

        first, second, temperature = check_equal_batches("feats_i", checked, lambda batch: batch[0])
        if processes() == 1:
            return info_nce_both_ways(first, second, temperature, self.weighting)
        every_first, every_second = (torch.cat(all_gather(rows)) for rows in (first, second))
        return info_nce_both_ways(
            first,
            second,
            temperature,
            self.weighting,
            gathered=(every_first, every_second),
            offset=get_rank() * len(first),
        )


def _temperature(of_loss: float, of_call: Tensor | float | None) -> Tensor | float:
    """Returns the temperature of a call. Raises a ValueError unless it is a finite number above 0."""
    if of_call is None:
        return of_loss
    if not isinstance(of_call, Tensor):
        return check_temperature("logit_scale", of_call)
    if of_call.numel() != 1:
        raise ValueError(f"logit_scale: expected one number, got shape {list(of_call.shape)}")
    if values_are_free(of_call):
        check_temperature("logit_scale", of_call.item())
    return of_call if of_call.is_floating_point() else of_call.float()


def _in_one_dtype(first: Any, second: Any) -> tuple[Any, Any]:
    """Returns both in the larger dtype: mixed precision makes one of them in half precision, and not the other."""
    if not isinstance(first, Tensor) or not isinstance(second, Tensor) or first.dtype == second.dtype:
        return first, second
    dtype = torch.promote_types(first.dtype, second.dtype)
    return first.to(dtype), second.to(dtype)


def _check_targets(targets: object, candidates: Tensor) -> None:
    """Raises a ValueError if an index is no candidate's, as -100, which `cross_entropy` would ignore."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or not values_are_free(targets):
        return  # another check tells of it, or the values are not looked at
    low, high = (int(end) for end in targets.aminmax()) if targets.numel() else (0, 0)
    if low < 0 or high >= len(candidates):
        most = len(candidates) - 1
        raise ValueError(
            f"targets: expected the index of a candidate for each anchor, 0 to {most}, got {low} to {high}"
        )


def _check_mask(mask: object, targets: Tensor, candidates: Tensor) -> None:
    """Raises a ValueError unless the mask is one of candidates that leaves each anchor's target in."""
    shape = [len(targets), len(candidates)]
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or list(mask.shape) != shape:
        came = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask: expected bool {shape} (anchors, candidates), got {came}")
    if mask.device != targets.device:
        raise ValueError(f"mask: expected device {targets.device}, as the candidates have, got {mask.device}")
    if values_are_free(mask) and bool(mask.gather(1, targets[:, None]).any()):
        raise ValueError("mask: expected each anchor's target left in, got one that is excluded")
