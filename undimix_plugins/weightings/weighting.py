"""What a weighting is, the plain one, and what weightings share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from undimix_plugins.checks import check_number
from undimix_plugins.contrast import Contrast
from undimix_plugins.settings import constant


class Terms(NamedTuple):
    """What each component of a weighting adds to the weights, for `explain`.

    Attributes:
        parts: By the component's name [r, m]; empty for a weighting without components.
        of_logarithm: Whether the parts add up to `log w`, but for a number of the anchor's own; else to `w`.
    """

    parts: dict[str, Tensor]
    of_logarithm: bool


class Weighting:
    """How much each negative of an anchor counts. A subclass needs `log_weights`; the rest has defaults.

    Attributes:
        citation: BibTeX of the method, for model cards; empty where there is none.
        adds_negatives: Whether `combine` adds further negatives, which are none of the contrast's.
        strength: The name of the attribute that scores are multiplied by, which statistics show as the hardness in
            force; empty where there is none.

    Examples:
        A weighting of one's own, twice the weight on the more similar half of the anchor's negatives:

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

    # Facts that a class states by an attribute or a property of its own.

    @property
    def has_mean_one(self) -> bool:
        """Whether weights average 1 over an anchor's negatives; by default it is not known, so False.

        Debiasing of a weighted sum is defined for such weights alone: `compose` refuses others beside `Debiased`.
        """
        return False

    @property
    def debiases(self) -> bool:
        """Whether the weighting corrects for false negatives by a class's prior probability; by default not."""
        return False

    @property
    def needs_last_layer(self) -> bool:
        """Whether `log_weights` needs the inputs of the last layer, `contrast.last_layer`; by default not."""
        return False

    def __repr__(self) -> str:
        """The class and its settings: what model cards and printed losses say."""
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    def choose(self, contrast: Contrast) -> Contrast:
        """Chooses which candidates are negatives, and which are further positives, before anything is weighted.

        `Contrast.without` and `Contrast.with_positives` make the result. By default the contrast itself.
        """
        return contrast

    def prepare(self, contrast: Contrast) -> Any:
        """What `log_weights` needs of the whole contrast, worked out once; by default the contrast itself."""
        return contrast

    def log_weights(self, prepared: Any, rows: slice) -> Tensor:
        """Log-weights of the whole pool for a block of anchors.

        It may be asked for the same block again, in the backward pass, and has to return the same.

        Args:
            prepared: What `prepare` returned.
            rows: The block of anchors, r of them.

        Returns:
            [r, m] for a pool of m, in the embeddings' dtype. Columns that are no negatives of an anchor are ignored.
            A gradient flows through them unless they are detached.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method log_weights(prepared, rows)")

    def combine(self, contrast: Contrast, positives: Tensor, negatives: Tensor, count: Tensor) -> Tensor:
        """The negatives' part of the denominator, where a method changes more than weights (debiasing).

        Args:
            contrast: What is compared.
            positives: The positives' logits [n].
            negatives: The log of the weighted sum of the negatives' exponentials [n]; finite.
            count: How many negatives each anchor has [n], at least 1.

        Returns:
            What stands for `negatives` [n]; by default itself. Ignored for an anchor without negatives.
        """
        return negatives

    def terms(self, prepared: Any, rows: slice) -> Terms:
        """What each component adds to the weights of a block of anchors, for `explain`; by default nothing is told.

        Args:
            prepared: What `prepare` returned.
            rows: The block of anchors, r of them.
        """
        return Terms({}, of_logarithm=False)

    def softened(self, share: float) -> Weighting:
        """The weighting on its way from the plain loss, at 0, to itself, at 1: what a warm-up goes through.

        By default in between are `w ** share`, as these come, and likewise what `combine` changes: in logarithms, that
        share of it. A negative of weight 0 has none at any share above 0.

        Args:
            share: From 0 to 1.

        Returns:
            `Uniform()` at 0 (or what has its values), the weighting at 1, something in between else.

        Raises:
            ValueError: For a share that is no number from 0 to 1.

        Examples:
            >>> UnDiMix(hardness=2.0).softened(0.25).hardness
            0.5
        """
        share = check_share(share)
        if share == 0:
            return Uniform()
        return self if share == 1 else Softened(self, share)

    # What the core alone asks.

    @property
    def _weighs_alike(self) -> bool:
        """Whether all negatives count the same, whatever else the weighting does."""
        return False

    @property
    def _has_scorer(self) -> bool:
        """Whether the fast path works out the scores by itself, as those of a plain `UnDiMix`."""
        return False

    def _weigher(self) -> Weighting:
        """The weighting whose `log_weights` these are."""
        return self

    def _combines(self) -> bool:
        """Whether `combine` changes anything."""
        return type(self).combine is not Weighting.combine

    def _method(self) -> Weighting:
        """The weighting that this one is on its way to."""
        return self

    def _with_options(self, **options: Any) -> Weighting | None:
        """The same with other options of the `UnDiMix` in it; None where there is none in it."""
        return None

    def _hardness(self) -> float | None:
        """What scores are multiplied by."""
        return float(getattr(self, self.strength)) if self.strength else None

    def _title(self) -> str:
        """The methods' names, without their settings."""
        return type(self).__name__


@constant
@dataclass(frozen=True)
class Softened(Weighting):
    """A share of a weighting, above 0 and below 1, as `Weighting.softened` has it.

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
        """That of the weighting."""
        return self.weighting.citation

    @property
    def needs_last_layer(self) -> bool:
        """Whether the weighting does."""
        return self.weighting.needs_last_layer

    def choose(self, contrast: Contrast) -> Contrast:
        """What the weighting chooses."""
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
        """What the weighting prepares."""
        return self.weighting.prepare(contrast)

    def log_weights(self, prepared: Any, rows: slice) -> Tensor:
        """The share of the weighting's own [r, m]."""
        return self.share * self.weighting.log_weights(prepared, rows)

    def combine(self, contrast: Contrast, positives: Tensor, negatives: Tensor, count: Tensor) -> Tensor:
        """Between `negatives` and what the weighting makes of them [n]."""
        return torch.lerp(negatives, self.weighting.combine(contrast, positives, negatives, count), self.share)


class EqualWeights(Weighting):
    """What weightings share that weigh all negatives alike, and do something else, or nothing."""

    @property
    def has_mean_one(self) -> bool:
        """Weights are all 1."""
        return self._weighs_alike

    def log_weights(self, prepared: Contrast, rows: slice) -> Tensor:
        """Zeros [r, m]."""
        return torch.zeros_like(prepared.pool[:, :1]).T.expand(len(prepared.anchors[rows]), -1)

    @property
    def _weighs_alike(self) -> bool:
        return type(self).log_weights is EqualWeights.log_weights  # but for a subclass with its own


@constant
@dataclass(frozen=True)
class Uniform(EqualWeights):
    """Every negative counts the same: the host's plain loss.

    Examples:
        >>> Uniform()
        Uniform()
    """

    def softened(self, share: float) -> Uniform:
        """Itself."""
        check_share(share)
        return self


def check_share(share: float) -> float:
    """Returns `share` as a float; a ValueError unless it is a number from 0 to 1."""
    check_number("share", share, at_least=0)
    if share > 1:
        raise ValueError(f"share: expected a number from 0 to 1, got {share!r}")
    return float(share)


def check_compared(contrast: object, weighting: object) -> None:
    """Raises a TypeError unless these are a `Contrast` and an instance of `Weighting`."""
    if not isinstance(contrast, Contrast):
        raise TypeError(f"contrast: expected a Contrast, got {type(contrast).__name__}")
    check_weighting(weighting)


def check_weighting(weighting: object) -> None:
    """Raises a TypeError unless `weighting` is an instance of `Weighting`."""
    if not isinstance(weighting, Weighting):
        came = f"the class {weighting.__name__}" if isinstance(weighting, type) else repr(weighting)
        several = (
            "; several become one by compose(UnDiMix(), Debiased())" if isinstance(weighting, (list, tuple)) else ""
        )
        raise TypeError(f"weighting: expected an instance of Weighting such as UnDiMix(), got {came}{several}")


def checked(weighting: Weighting, log_weights: object, logits: Tensor) -> Tensor:
    """The log-weights of a block in its logits' dtype; a ValueError unless they are floats of its shape."""
    if not isinstance(log_weights, Tensor) or log_weights.shape != logits.shape:
        came = list(log_weights.shape) if isinstance(log_weights, Tensor) else type(log_weights).__name__
        raise ValueError(
            f"log-weights of {type(weighting).__name__}: expected shape {list(logits.shape)} "
            f"(anchors of the block `rows`, pool), got {came}"
        )
    if not log_weights.is_floating_point():
        raise ValueError(f"log-weights of {type(weighting).__name__}: expected floating point, got {log_weights.dtype}")
    return log_weights.to(logits.dtype)


def masked_log_sum_exp(scores: Tensor, mask: Tensor) -> Tensor:
    """The log of the sum of exponentials over the columns that `mask` marks; -inf, with gradient 0, for none.

    Args:
        scores: [r, m].
        mask: bool [r, m].

    Returns:
        [r], same dtype as `scores`.

    Examples:
        >>> masked_log_sum_exp(torch.zeros(1, 4), torch.tensor([[True, True, False, False]])).exp()
        tensor([2.])
    """
    scores = scores.masked_fill(~mask, -torch.inf)
    top = scores.detach().amax(dim=1, keepdim=True)
    top = top.masked_fill(top.isneginf(), 0)
    total = (scores - top).exp().sum(dim=1)
    # log(0) would be right, but its gradient is not a number.
    none = total == 0
    return (total.masked_fill(none, 1).log() + top[:, 0]).masked_fill(none, -torch.inf)


def mean_one(log_weights: Tensor, negative: Tensor) -> Tensor:
    """Brings weights to mean 1 over each anchor's negatives.

    Args:
        log_weights: [r, m].
        negative: Which columns are negatives, bool [r, m].

    Returns:
        `log_weights` less the log of the mean weight over the row's negatives [r, m].

    Examples:
        >>> mean_one(torch.tensor([[1.0, 1.0, 5.0]]), torch.tensor([[True, True, False]]))
        tensor([[0., 0., 4.]])
    """
    # The largest goes first: beside a huge one, the logarithm of the number of negatives would be rounded away.
    top = log_weights.detach().masked_fill(~negative, -torch.inf).amax(dim=1, keepdim=True)
    log_weights = log_weights - top.masked_fill(top.isneginf(), 0)
    log_sum = masked_log_sum_exp(log_weights, negative)
    log_mean = log_sum - negative.sum(dim=1).clamp(min=1).to(log_sum.dtype).log()
    return log_weights - log_mean.masked_fill(log_mean.isneginf(), 0)[:, None]
