"""The loss of CLIP-type models for `transformers.Trainer`, with its in-batch negatives weighted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import Trainer

from undimix_plugins.toolkit import (
    WeightedLoss,
    Weighting,
    as_full_precision,
    check_embeddings,
    check_same_length,
    info_nce_both_ways,
    to_length_one,
)
from undimix_transformers.trainer import calling_trainer, check_release, of_same_class, refuse_uncalled_class, trains


class ImageTextLoss(WeightedLoss):
    """CLIP's loss as the Trainer's `compute_loss_func`, with its in-batch negatives weighted.

        loss = mean over both directions of mean over i of
               -log( exp(s_ii / t) / (exp(s_ii / t) + sum over j != i of w_ij exp(s_ij / t)) ),

    s_ij is the cosine of text i and image j (or of image i and text j), and t = exp(-logit_scale). The model's own,
    learned `logit_scale` gets its gradient. With `Uniform()` this is the loss that the model returns for
    `return_loss=True`. You need not set that.

    `undimix(ImageTextLoss(model), exclude_same_class=True)` leaves out pairs with the anchor's label. Batches then need
    "labels", one for each pair.

    Args:
        model: A model that has a `logit_scale` and returns `text_embeds` and `image_embeds`, such as `CLIPModel`,
            `AltCLIPModel`, `ChineseCLIPModel` or `VisionTextDualEncoderModel`, or a PEFT model around one. In a Trainer
            with a `model_init`, the `logit_scale` of the new model is used.
        weighting: How negatives are weighted. Default: `UnDiMix()`. `Uniform()` is the model's own loss.
        options: Options of `UnDiMix`, in place of a weighting: `ImageTextLoss(model, hardness=2.0)`.

    Raises:
        TypeError: If the model has no `logit_scale`, or has a `logit_bias` (SigLIP scores each pair by itself, so there
            is no sum over negatives); if `weighting` is not a `Weighting`; if options are given with a weighting, or
            `UnDiMix` does not have them; if a Trainer is given the class in place of a loss.

    References:
        Radford et al.: Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020,
        figure 3; arXiv 2206.01197 (UnDiMix, section 3).

    Examples:
        >>> from transformers import CLIPModel
        >>> def weighted_loss_of(model: CLIPModel) -> ImageTextLoss:
        ...     return ImageTextLoss(model, UnDiMix(hardness=2.0))  # for Trainer(compute_loss_func=...)
    """

    settings: ClassVar[Mapping[str, Any]] = {"exclude_same_class": False}
    exclude_same_class: bool = False
    model: nn.Module

    no_last_layer = "with ImageTextLoss, whose texts and images come from a layer each"

    def __init__(self, model: nn.Module, weighting: Weighting | None = None, **options: Any) -> None:
        super().__init__()
        refuse_uncalled_class(type(self), options)
        check_release(type(self).__name__)
        name = type(model).__name__
        if getattr(model, "logit_bias", None) is not None:
            raise TypeError(
                f"model: {name} has a logit_bias, as SigLIP, whose loss is a sigmoid for each pair on its own: there "
                "is no sum over an anchor's negatives to weight"
            )
        if not isinstance(getattr(model, "logit_scale", None), Tensor):
            own = [parameter for parameter, _ in model.named_parameters(recurse=False)]
            raise TypeError(
                f"model: expected a CLIP-type model, whose own parameter is one logit_scale for both directions, got "
                f"{name}, whose own are {own or 'none'}"
            )
        # Not a part of this module, whose state is not the model's.
        self.__dict__["model"] = model
        self.weigh(weighting, **options)

    def forward(
        self, outputs: Any, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The weighted loss of a micro-batch.

        Args:
            outputs: The model's outputs, with `text_embeds` and `image_embeds` [pairs, width].
            labels: The pairs' classes [pairs], used only if `exclude_same_class` is set.
            num_items_in_batch: The Trainer's count of labels; not used.

        Returns:
            A scalar in the embeddings' dtype (float32 for half precision). It is 0 for a single pair.

        Raises:
            ValueError: If the outputs lack these, texts and images differ in number, or (on the CPU) embeddings are not
                finite. On other devices, the loss is NaN for non-finite embeddings. If `model_init` makes a model
                without such a `logit_scale`.
        """
        embeddings = {}
        for name in ("text_embeds", "image_embeds"):
            rows = outputs.get(name) if isinstance(outputs, Mapping) else None
            if rows is None:
                came = list(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
                raise ValueError(f"outputs: expected {name}, got {came}")
            embeddings[name] = rows
        check_embeddings(**embeddings)
        check_same_length(**embeddings)
        texts, images = (to_length_one(rows) for rows in embeddings.values())
        # exp(-x), not 1 / exp(x): in half precision the latter's digits would be lost twice.
        trainer, share = calling_trainer()
        scale: Tensor = self._trained_by(trainer).logit_scale  # type: ignore[assignment]
        temperature = (-as_full_precision(scale)).exp().to(texts.device)
        mask = of_same_class(labels, len(texts)) if self.exclude_same_class else None
        return info_nce_both_ways(texts, images, temperature, self.weighting, excluded_mask=mask) / share

    def _trained_by(self, trainer: Trainer | None) -> nn.Module:
        """The model, or the one that the Trainer, by its `model_init`, has put in its place."""
        if trainer is None or trainer.model is None or trains(trainer, self.model):
            return self.model
        if isinstance(getattr(trainer.model, "logit_scale", None), Tensor):
            return trainer.model
        if trainer.model_init is None:
            return self.model
        found = [part for part in trainer.model.modules() if "logit_scale" in part._parameters]
        if len(found) != 1:
            raise ValueError(
                f"model: expected a part of the Trainer's model, got a {type(self.model).__name__} of its own, not "
                f"trained, and {len(found)} parts of what model_init has made, a {type(trainer.model).__name__}, "
                "have a logit_scale"
            )
        return found[0]
