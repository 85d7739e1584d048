"""The base class of weightings, the plain weighting, and functions that weightings share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from undimix_plugins.checks import check_number
from undimix_plugins.contrast import Contrast
from undimix_plugins.settings import constant


class Terms(NamedTuple):
    """The contribution of each component of a weighting to the weights, for `explain`.

    Attributes:
        parts: The contribution of each component by name, each [r, m]. Empty for a weighting without components.
        of_logarithm: True if the parts add up to `log w`, up to a constant for each anchor. False if they add up to
            `w`.

    Examples:
        >>> Terms({"similarity": torch.zeros(1, 4)}, of_logarithm=True).parts["similarity"].shape
        torch.Size([1, 4])
    """

    parts: dict[str, Tensor]
    of_logarithm: bool


class Weighting:
    """Base class of weightings: how much each negative of an anchor counts.

    To write your own weighting, subclass it and define `log_weights`. All other methods have defaults.

    Attributes:
        citation: BibTeX of the method, for model cards. Empty if there is none.
        adds_negatives: Whether `combine` adds negatives that are not in the contrast's pool.
        strength: The name of the attribute that scores are multiplied by. Statistics report its value as `hardness`.
            Empty if there is none.

    Examples:
        This weighting doubles the weights of the more similar half of an anchor's negatives:

        >>> class HarderHalf(Weighting):
        ...     def log_weights(self, contrast, rows):
        ...         similarity = contrast.logits(rows).detach()
        ...         harder = similarity > similarity.median(dim=1, keepdim=True).values
        ...         return (1 + harder.to(similarity.dtype)).log()
        >>> info_nce(two_views(torch.randn(8, 4), torch.randn(8, 4), 0.5), HarderHalf()).dim()
        0
    """

    citation: ClassVar[str] = ""
    adds_negatives: ClassVar[bool] = False
    strength: ClassVar[str] = ""

    # Facts about the weighting: a subclass overrides them by a class attribute or a property.

    @property
    def has_mean_one(self) -> bool:
        """Whether the mean weight of an anchor's negatives is 1. By default only if all weights are.

        Debiasing of a weighted sum is only defined for such weights. `compose` does not combine others with `Debiased`.
        """
        return self._weighs_alike

    @property
    def debiases(self) -> bool:
        """Whether the weighting corrects for false negatives by the prior probability of a class. False by default."""
        return False

    @property
    def needs_last_layer(self) -> bool:
        """Whether `log_weights` needs the inputs of the last layer, `contrast.last_layer`. False by default."""
        return False

    @property
    def positive_factor(self) -> float:
        """The factor on the positive's term in the loss's denominator, above 0. 1 by default, as in InfoNCE.

        `info_nce` multiplies the term by it. Losses that cannot do so raise a ValueError for a factor other than 1.
        """
        return 1.0

    def __repr__(self) -> str:
        """Returns the class and its settings, as model cards and printed losses show them."""
        return described(self)

    def choose(self, contrast: Contrast) -> Contrast:
        """Chooses which candidates are negatives, and which are further positives. It is called before weighting.

        Args:
            contrast: The anchors, positives and candidates.

        Returns:
            A contrast with fewer negatives (`Contrast.without`) or more positives (`Contrast.with_positives`). By
            default `contrast` itself.
        """
        return contrast

    def prepare(self, contrast: Contrast) -> Any:
        """Computes once what `log_weights` needs of the whole contrast.

        Args:
            contrast: What `choose` returned.

        Returns:
            Any object; `log_weights` receives it as `prepared`. By default `contrast` itself.
        """
        return contrast

    def log_weights(self, prepared: Any, rows: slice) -> Tensor:
        """Computes the log-weights of all candidates for a block of anchors.

        It may be called again for the same block in the backward pass, and must then return the same values.

        Args:
            prepared: What `prepare` returned. By default the contrast.
            rows: The block of r anchors.

        Returns:
            Log-weights [r, m] for a pool of m candidates, floating point. Values in columns that are not negatives of
            an anchor are ignored. A gradient flows through the weights unless you detach them.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method log_weights(prepared, rows)")

    def combine(self, contrast: Contrast, positives: Tensor, negatives: Tensor, count: Tensor) -> Tensor:
        """Computes the negatives' part of the denominator, for methods that change more than weights (debiasing).

        Args:
            contrast: What `choose` returned.
            positives: The logits of the positives [n]. For several positives the log of their mean exponential.
            negatives: The log of the weighted sum of the negatives' exponentials [n], finite.
            count: The number of negatives of each anchor [n], at least 1, in the embeddings' dtype.

        Returns:
            The logarithm that replaces `negatives` in the loss [n]. By default `negatives` itself. Values of anchors
            without negatives are ignored.
        """
        return negatives

    def terms(self, prepared: Any, rows: slice) -> Terms:
        """Returns the contribution of each component to the weights of a block of anchors, for `explain`.

        Args:
            prepared: What `prepare` returned.
            rows: The block of r anchors.

        Returns:
            The contributions by name, each [r, m]. By default none.
        """
        return Terms({}, of_logarithm=False)

    def softened(self, share: float) -> Weighting:
        """Returns the weighting at a share of its strength, for a warm-up from the plain loss to the full weighting.

        By default the weights are `w ** share`, not rescaled. The change that `combine` makes to the log-sum is
        multiplied by `share`, too. A negative of weight 0 has weight 0 at every share above 0.

        Args:
            share: The share of the full weighting, from 0 to 1.

        Returns:
            `Uniform()`, or a weighting with the same values, for 0. The weighting itself for 1. Otherwise a weighting
            in between.

        Raises:
            ValueError: If `share` is not a number from 0 to 1.

        Examples:
            >>> UnDiMix(hardness=2.0).softened(0.25).hardness
            0.5
        """
        share = check_share(share)
        if share == 0:
            return Uniform()
        return self if share == 1 else Softened(self, share)

    # Only the core calls these.

    @property
    def _weighs_alike(self) -> bool:
        """Whether all negatives have the same weight. The weighting may still choose negatives or change their sum."""
        return type(self).log_weights is EqualWeights.log_weights

    @property
    def _has_scorer(self) -> bool:
        """Whether the fast path computes the scores itself, as for a plain `UnDiMix`."""
        return False

    def _weigher(self) -> Weighting:
        """Returns the weighting that defines the `log_weights`."""
        return self

    def _combines(self) -> bool:
        """Whether `combine` changes anything."""
        return type(self).combine is not Weighting.combine

    def _method(self) -> Weighting:
        """Returns the full weighting if this is a softened one, otherwise itself."""
        return self

    def _with_options(self, **options: Any) -> Weighting | None:
        """Returns the weighting with changed options of the `UnDiMix` in it, or None if it contains no `UnDiMix`."""
        return None

    def _hardness(self) -> float | None:
        """Returns the number that scores are multiplied by, or None if there is none."""
        return float(getattr(self, self.strength)) if self.strength else None

    def _title(self) -> str:
        """Returns the names of the methods, without their settings."""
        return type(self).__name__


@constant
@dataclass(frozen=True)
class Softened(Weighting):
    """A weighting at a share of its strength, as `Weighting.softened` returns it.

    Attributes:
        weighting: The full weighting.
        share: The share of it, above 0 and below 1.

    Examples:
        >>> HCL(beta=2.0, tau_plus=0.0).softened(0.5) == HCL(beta=1.0, tau_plus=0.0)
        True
        >>> Softened(HCL(beta=2.0, tau_plus=0.0), 0.5)
        Softened(weighting=HCL(beta=2.0, tau_plus=0.0), share=0.5)
    """

    weighting: Weighting
    share: float

    strength: ClassVar[str] = "share"

    @property
    def citation(self) -> str:  # type: ignore[override]
        """The citation of the full weighting."""
        return self.weighting.citation

    @property
    def adds_negatives(self) -> bool:  # type: ignore[override]
        """Whether the full weighting adds negatives."""
        return self.weighting.adds_negatives

    @property
    def debiases(self) -> bool:
        """Whether the full weighting debiases."""
        return self.weighting.debiases

    @property
    def needs_last_layer(self) -> bool:
        """Whether the full weighting needs the inputs of the last layer."""
        return self.weighting.needs_last_layer

    @property
    def positive_factor(self) -> float:
        """The factor of the full weighting, to the power `share`."""
        return float(self.weighting.positive_factor**self.share)

    def choose(self, contrast: Contrast) -> Contrast:
        """Returns what the full weighting chooses."""
        return self.weighting.choose(contrast)

    def _weigher(self) -> Weighting:
        return Uniform() if self.weighting._weigher()._weighs_alike else self

    def _combines(self) -> bool:
        return self.weighting._combines()

    def _method(self) -> Weighting:
        return self.weighting._method()

    def _title(self) -> str:
        return f"{self.share:.2g} of {self.weighting._title()}"

    def prepare(self, contrast: Contrast) -> Any:
        """Returns what the full weighting prepares."""
        return self.weighting.prepare(contrast)

    def log_weights(self, prepared: Any, rows: slice) -> Tensor:
        """Returns the log-weights of the full weighting, multiplied by `share` [r, m]."""
        return self.share * self.weighting.log_weights(prepared, rows)

    def combine(self, contrast: Contrast, positives: Tensor, negatives: Tensor, count: Tensor) -> Tensor:
        """Interpolates between `negatives` and the result of the full weighting [n]."""
        return torch.lerp(negatives, self.weighting.combine(contrast, positives, negatives, count), self.share)


class EqualWeights(Weighting):
    """Base class of weightings that give all negatives the same weight.

    Subclasses choose negatives (`Ring`) or change their sum (`Debiased`).

    Examples:
        This weighting leaves out the first candidate:

        >>> class WithoutFirst(EqualWeights):
        ...     def choose(self, contrast):
        ...         first = torch.zeros(len(contrast.anchors), 1, dtype=torch.long)
        ...         return contrast.without(first)
        >>> loss = info_nce(two_views(torch.randn(8, 4), torch.randn(8, 4), 0.5), WithoutFirst())
    """

    def log_weights(self, prepared: Contrast, rows: slice) -> Tensor:
        """Returns zeros [r, m]."""
        return torch.zeros_like(prepared.pool[:, :1]).T.expand(len(prepared.anchors[rows]), -1)


@constant
@dataclass(frozen=True)
class Uniform(EqualWeights):
    """Gives every negative the weight 1: the plain loss.

    Examples:
        >>> Uniform()
        Uniform()
        >>> loss = info_nce(two_views(torch.randn(8, 4), torch.randn(8, 4), 0.5), Uniform())
    """

    def softened(self, share: float) -> Uniform:
        """Returns the weighting itself: the plain loss has no warm-up."""
        check_share(share)
        return self


def described(weighting: Weighting, **hidden: object) -> str:
    """Returns the class of a weighting and its settings.

    Args:
        weighting: The weighting.
        hidden: Settings that are not shown while they have these values.

    Examples:
        >>> described(HCL(), alpha=1.0, tau_plus=0.1)
        'HCL(beta=1.0)'
    """
    shown = {name: value for name, value in vars(weighting).items() if name not in hidden or value != hidden[name]}
    return f"{type(weighting).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def check_share(share: float) -> float:
    """Returns `share` as a float. Raises a ValueError if it is not a number from 0 to 1.

    Examples:
        >>> check_share(1)
        1.0
    """
    check_number("share", share, at_least=0)
    if share > 1:
        raise ValueError(f"share: expected a number from 0 to 1, got {share!r}")
    return float(share)


def check_compared(contrast: object, weighting: object) -> None:
    """Raises a TypeError if `contrast` is not a `Contrast` or `weighting` is not an instance of `Weighting`."""
    if not isinstance(contrast, Contrast):
        raise TypeError(f"contrast: expected a Contrast, got {type(contrast).__name__}")
    check_weighting(weighting)


def check_weighting(weighting: object) -> None:
    """Raises a TypeError if `weighting` is not an instance of `Weighting`.

    Examples:
        >>> check_weighting(UnDiMix)
        Traceback (most recent call last):
        TypeError: weighting: expected an instance of Weighting such as UnDiMix(), got the class UnDiMix
    """
    if not isinstance(weighting, Weighting):
        came = f"the class {weighting.__name__}" if isinstance(weighting, type) else repr(weighting)
        several = (
            "; several become one by compose(UnDiMix(), Debiased())" if isinstance(weighting, (list, tuple)) else ""
        )
        raise TypeError(f"weighting: expected an instance of Weighting such as UnDiMix(), got {came}{several}")


def checked(weighting: Weighting, log_weights: object, logits: Tensor) -> Tensor:
    """Returns the log-weights of a block in the dtype of its logits.

    Raises a ValueError if they are not a floating-point tensor with the shape of the logits.
    """
    if not isinstance(log_weights, Tensor) or log_weights.shape != logits.shape:
        came = list(log_weights.shape) if isinstance(log_weights, Tensor) else type(log_weights).__name__
        raise ValueError(
            f"log-weights of {type(weighting).__name__}: expected shape {list(logits.shape)} "
            f"(anchors of the block `rows`, pool), got {came}"
        )
    if not log_weights.is_floating_point():
        raise ValueError(f"log-weights of {type(weighting).__name__}: expected floating point, got {log_weights.dtype}")
    return log_weights.to(logits.dtype)
