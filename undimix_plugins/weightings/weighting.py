"""What a weighting is, the plain one, and what weightings share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from undimix_plugins.checks import check_number
from undimix_plugins.contrast import Contrast, alone, full_precision, holds_all_anchors
from undimix_plugins.settings import constant


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

    def __repr__(self) -> str:
        """The class and its settings: what model cards and printed losses say."""
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    def compared(self, contrast: Contrast) -> Contrast:
        """What is compared instead, before anything is weighted: fewer negatives, or some of them as positives.

        `Contrast.without` and `Contrast.with_positives` make it. By default the contrast itself.
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

    def weigher(self) -> Weighting:
        """Which weighting's `log_weights` these are: by default its own."""
        return self

    def combines(self) -> bool:
        """Whether `combine` changes anything."""
        return type(self).combine is not Weighting.combine

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

    def compared(self, contrast: Contrast) -> Contrast:
        """What the weighting compares."""
        return self.weighting.compared(contrast)

    def weigher(self) -> Weighting:
        """Itself, or what has equal weights where the weighting's are."""
        return Uniform() if weighs_alike(self.weighting.weigher()) else self

    def combines(self) -> bool:
        """Whether the weighting's does."""
        return self.weighting.combines()

    def prepare(self, contrast: Contrast) -> Any:
        """What the weighting prepares."""
        return self.weighting.prepare(contrast)

    def log_weights(self, prepared: Any, rows: slice) -> Tensor:
        """The share of the weighting's own [r, m]."""
        return self.share * self.weighting.log_weights(prepared, rows)

    def combine(self, contrast: Contrast, positives: Tensor, negatives: Tensor, count: Tensor) -> Tensor:
        """Between `negatives` and what the weighting makes of them [n]."""
        return torch.lerp(negatives, self.weighting.combine(contrast, positives, negatives, count), self.share)


@constant
@dataclass(frozen=True)
class Uniform(Weighting):
    """Every negative counts the same: the host's plain loss.

    Examples:
        >>> Uniform()
        Uniform()
    """

    def log_weights(self, prepared: Contrast, rows: slice) -> Tensor:
        """Zeros [r, m]."""
        return torch.zeros_like(prepared.pool[:, :1]).T.expand(len(prepared.anchors[rows]), -1)

    def softened(self, share: float) -> Uniform:
        """Itself."""
        check_share(share)
        return self


def weighs_alike(weighting: Weighting) -> bool:
    """Whether all negatives count the same, whatever else the weighting does."""
    return type(weighting).log_weights is Uniform.log_weights


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


def importance_weights(contrast: Contrast, weighting: Weighting) -> Tensor:
    """The weights themselves, to look at: what each negative of each anchor counts.

    Of a pool gathered from all processes without their anchors (a memory bank's), each process has to call it.

    Args:
        contrast: What is compared, n anchors and a pool of m.
        weighting: How.

    Returns:
        Weights [n, m] without gradient, 0 in the columns that are no negatives of an anchor.

    Raises:
        TypeError: For something else than a Contrast and a Weighting.

    Examples:
        >>> contrast = two_views(torch.randn(4, 8), torch.randn(4, 8), temperature=0.5)
        >>> importance_weights(contrast, Uniform())[0]
        tensor([0., 1., 1., 1., 0., 1., 1., 1.])
    """
    check_compared(contrast, weighting)
    rows, contrast = slice(0, len(contrast.anchors)), weighting.compared(contrast)
    contrast = alone(contrast) if holds_all_anchors(contrast) else contrast
    with torch.no_grad(), full_precision(contrast.pool):
        weights = weighting.log_weights(weighting.prepare(contrast), rows).exp()
        return weights.masked_fill(~contrast.is_negative(rows), 0)


def effective_number(weights: Tensor) -> Tensor:
    """The effective number of negatives of each anchor, `(sum_j w_j)^2 / sum_j w_j^2` (Kish 1965).

    Args:
        weights: Importance weights [n, m], 0 for what is no negative.

    Returns:
        [n], from 1 (one negative has all the weight) to the number of negatives (all count the same); 0 without any.

    Examples:
        >>> effective_number(torch.tensor([[1.0, 1.0, 0.0], [2.0, 0.0, 0.0]]))
        tensor([2., 1.])
    """
    squares = weights.square().sum(dim=1)
    return weights.sum(dim=1).square() / squares.masked_fill(squares == 0, 1)
