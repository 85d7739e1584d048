"""open_clip's contrastive losses with their negatives weighted."""

from __future__ import annotations

from typing import Any

from open_clip.loss import ClipLoss as HostClipLoss
from open_clip.loss import CoCaLoss as HostCoCaLoss
from open_clip.loss import gather_features
from torch import Tensor

from undimix_plugins.toolkit import (
    WeightedLoss,
    Weighting,
    as_full_precision,
    check_embeddings,
    check_equal_batches,
    check_number,
    check_same_length,
    info_nce_both_ways,
    values_are_free,
)


class ClipLoss(WeightedLoss, HostClipLoss):
    """open_clip's `ClipLoss` with its negatives weighted.

        loss = mean over both directions of mean over i of
               -log( exp(a s_ii) / (exp(a s_ii) + sum over j != i of w_ij exp(a s_ij)) ),

    with the inner product s_ij of image i and text j (or of text i and image j), whose rows open_clip's models
    normalise, and a = `logit_scale`. The weights w have mean 1 for `UnDiMix`; they are all 1 for `Uniform`, which gives
    open_clip's own loss. A learned `logit_scale` gets its gradient. A `logit_bias` is the same for all pairs, so that
    it cancels, as it does in open_clip.

    With several processes, a batch is gathered as in open_clip. With `local_loss`, each process compares its own pairs
    with all others, and the weights are those of a single process.

    Args:
        local_loss: Whether a process computes the loss of its own pairs alone.
        gather_with_grad: Whether gradients flow back to the other processes.
        cache_labels: Not used: there are no labels to keep.
        rank: This process.
        world_size: The number of processes.
        use_horovod: Not supported.
        weighting: How negatives are weighted. Default: `UnDiMix()`.

    Raises:
        ValueError: For `use_horovod=True`.
        TypeError: If `weighting` is not a `Weighting`.

    References:
        Radford et al.: Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020, figure
        3; arXiv 2206.01197 (UnDiMix, section 3).

    Examples:
        >>> images, texts = (torch.nn.functional.normalize(torch.randn(8, 32), dim=1) for _ in range(2))
        >>> loss = ClipLoss(weighting=UnDiMix(hardness=2.0))(images, texts, torch.tensor(14.3))
    """

    replaces = ("forward", "get_logits", "get_ground_truth")
    no_last_layer = "with a loss of images and texts, which come from a layer each"

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        weighting: Weighting | None = None,
    ) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod
        )
        self.weigh(weighting)

    def weigh(self, weighting: Weighting | None, **options: Any) -> None:
        """Sets the weighting; a ValueError for Horovod."""
        if self.use_horovod:
            raise ValueError("use_horovod: expected False, since weights are gathered by torch.distributed, got True")
        super().weigh(weighting, **options)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Any:
        """The weighted loss of a batch of pairs.

        Args:
            image_features: Embeddings of the images [batch, width], floating point, as the model normalises them.
            text_features: Embeddings of their texts [batch, width], same dtype.
            logit_scale: The factor of the inner products, above 0, such as the model's `logit_scale.exp()`.
            logit_bias: The same number for all pairs, or None.
            output_dict: Whether to return a dictionary.

        Returns:
            A scalar in the features' dtype (float32 for half precision), or a dictionary with it as "contrastive_loss".
            It is 0 for a single pair.

        Raises:
            ValueError: If features are not matrices, are empty, do not match each other, or (on the CPU) are not
                finite, or if `logit_scale` is not above 0. On every process, if batches to gather differ in size. On
                other devices, the loss is NaN for non-finite features.
        """
        loss = self._contrastive(image_features, text_features, logit_scale)
        if isinstance(logit_bias, Tensor):
            if logit_bias.numel() != 1:
                raise ValueError(f"logit_bias: expected one number for all pairs, got shape {list(logit_bias.shape)}")
            loss = loss + 0 * logit_bias.to(loss).sum()  # it cancels, but a model's parameters need a gradient
        return {"contrastive_loss": loss} if output_dict else loss

    def _contrastive(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> Tensor:
        def checked() -> tuple[Tensor, Tensor, Tensor | float]:
            images, texts = as_full_precision(image_features), as_full_precision(text_features)
            check_embeddings(image_features=images, text_features=texts)
            check_same_length(image_features=images, text_features=texts)
            return images, texts, _temperature(logit_scale)

        if self.world_size == 1:
            images, texts, temperature = checked()
            return info_nce_both_ways(images, texts, temperature, self.weighting)
        images, texts, temperature = check_equal_batches("image_features", checked, lambda batch: batch[0])
        every_image, every_text = gather_features(
            image_features,
            text_features,
            local_loss=self.local_loss,
            gather_with_grad=self.gather_with_grad,
            rank=self.rank,
            world_size=self.world_size,
        )
        every_image, every_text = as_full_precision(every_image), as_full_precision(every_text)
        if not self.local_loss:
            return info_nce_both_ways(every_image, every_text, temperature, self.weighting)
        offset = self.rank * len(image_features)
        return info_nce_both_ways(
            images,
            texts,
            temperature,
            self.weighting,
            gathered=(every_image, every_text),
            offset=offset,
        )


def _temperature(logit_scale: Tensor | float) -> Tensor | float:
    """One over the scale; a ValueError unless it is a finite number above 0. On other devices it is not looked at."""
    if not isinstance(logit_scale, Tensor):
        return 1 / check_number("logit_scale", logit_scale, above=0)
    if logit_scale.numel() == 1 and values_are_free(logit_scale):
        check_number("logit_scale", float(logit_scale.detach()), above=0)
    return as_full_precision(logit_scale).reciprocal()


# The host's class comes first: its `forward` calls that of the next class, which is ours.
class CoCaLoss(HostCoCaLoss, ClipLoss):  # type: ignore[misc]  # the host overrides `forward` with another call
    """open_clip's `CoCaLoss` with the negatives of its contrastive part weighted. The captioning part is open_clip's.

    Args:
        caption_loss_weight: The factor of the captioning loss.
        clip_loss_weight: The factor of the contrastive loss. 0 leaves it out.
        pad_id: The token that fills up captions.
        local_loss: As in `ClipLoss`.
        gather_with_grad: As in `ClipLoss`.
        cache_labels: As in `ClipLoss`.
        rank: As in `ClipLoss`.
        world_size: As in `ClipLoss`.
        use_horovod: Not supported.
        weighting: How negatives are weighted. Default: `UnDiMix()`.

    Raises:
        ValueError: As `ClipLoss`.
        TypeError: As `ClipLoss`.

    References:
        Yu et al.: CoCa: Contrastive Captioners are Image-Text Foundation Models, arXiv 2205.01917, equations 2 and 3.

    Examples:
        >>> criterion = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
        >>> features = torch.nn.functional.normalize(torch.randn(2, 4, 8), dim=2)
        >>> logits, labels = torch.randn(4, 5, 11), torch.randint(1, 11, (4, 5))
        >>> contrastive, captioning = criterion(*features, logits, labels, torch.tensor(14.3))
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        weighting: Weighting | None = None,
    ) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            caption_loss_weight,
            clip_loss_weight,
            pad_id,
            local_loss,
            gather_with_grad,
            cache_labels,
            rank,
            world_size,
            use_horovod,
        )
        self.weigh(weighting)
