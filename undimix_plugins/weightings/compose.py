"""Several methods as one weighting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from undimix_plugins.contrast import Contrast
from undimix_plugins.settings import loadable
from undimix_plugins.weightings.false_negatives import FalseNegatives
from undimix_plugins.weightings.weighting import Uniform, Weighting, check_share, check_weighting


def compose(*weightings: Weighting) -> Weighting:
    """Combines several methods into one weighting.

    The methods are applied in this order:

    1. `Ring`, `PositiveAware`, `FalseNegativeElimination` and `FalseNegativeAttraction` choose the negatives, in the
       order given. Each method chooses from the negatives that the one before it kept.
    2. `UnDiMix`, `HCL`, `ADNCE`, `BCL`, `ProGCL` and `SimilarityPenalty` weight the negatives that are left. The
       weights of several methods are multiplied.
    3. `Debiased`, `HCL` and `MoCHi` change the sum of the negatives, in the order given. `HCL(alpha=...)` also
       multiplies the positive's term.

    Args:
        weightings: One or more weightings.

    Returns:
        The combined weighting. A single weighting is returned unchanged.

    Raises:
        TypeError: If an argument is not a `Weighting`.
        ValueError: If there is no argument, if a method is given twice, if two methods debias, if false negatives are
            both eliminated and attracted, if a sum is debiased whose weights do not have mean 1, or if a sum is
            debiased after synthetic negatives were added (`MoCHi` before `Debiased`).

    Examples:
        >>> weighting = compose(UnDiMix(), Debiased(tau_plus=0.1), FalseNegativeElimination(k=8))
        >>> loss = info_nce(two_views(torch.randn(8, 4), torch.randn(8, 4), 0.5), weighting)
    """
    for weighting in weightings:
        check_weighting(weighting)
    parts = [
        part
        for given in weightings
        for part in (given.parts if isinstance(given, Composed) else [given])
        if type(part) is not Uniform
    ]
    if not weightings:
        raise ValueError("weightings: expected at least one, got none")
    if reason := _against(parts):
        raise ValueError(f"weightings: {reason}, got {', '.join(map(repr, weightings))}")
    return Composed(parts) if len(parts) > 1 else parts[0] if parts else weightings[0]


def _against(parts: Sequence[Weighting]) -> str | None:
    """Returns why the weightings cannot be combined, or None if they can."""
    parts = [part._method() for part in parts]
    kinds = [type(part) for part in parts]
    if len(set(kinds)) < len(kinds):
        return "expected each method once"
    if sum(isinstance(part, FalseNegatives) for part in parts) > 1:
        return "expected false negatives to be left out or attracted, not both"
    debias = [place for place, part in enumerate(parts) if part.debiases]
    if len(debias) > 1:
        return "expected at most one that debiases (HCL(tau_plus=0) does not)"
    of_sum = [place for place in debias if parts[place]._combines()]
    # At hardness 0, such as HCL(beta=0), all weights are 1.
    weighing = [part for part in parts if _weighs(part) and part._hardness() != 0]
    if of_sum:
        debiasing, names = type(parts[of_sum[0]]).__name__, [type(part).__name__ for part in weighing]
        for part, name in zip(weighing, names, strict=True):
            if not part.has_mean_one:
                return (
                    f"expected weights of mean 1 where {debiasing} debiases, which {name}'s are not (a class of your "
                    "own whose weights average 1 states has_mean_one = True)"
                )
        if len(weighing) > 1:
            return (
                f"expected one method with weights where {debiasing} debiases ({debiasing}(tau_plus=0) does not), "
                f"since debiasing is not defined for a product of weights, here of {' and '.join(names)}"
            )
    adding = next((place for place, part in enumerate(parts) if part.adds_negatives), len(parts))
    if any(place > adding for place in of_sum):
        name = type(parts[adding]).__name__
        return f"expected debiasing before {name}, whose negatives are no draws that a class has a share of"
    return None


def _weighs(part: Weighting) -> bool:
    """Whether the weights are not all equal."""
    return not part._weigher()._weighs_alike


@loadable
class Composed(Weighting):
    """A weighting that combines several methods, as `compose` returns it.

    Attributes:
        parts: The weightings, two or more.

    Examples:
        >>> compose(Ring(lower=50, upper=90), Debiased(tau_plus=0.1)).parts
        (Ring(lower=50, upper=90), Debiased(tau_plus=0.1))
    """

    def __init__(self, parts: Sequence[Weighting]) -> None:
        self.parts = tuple(parts)

    def __repr__(self) -> str:
        """Returns the call of `compose` that makes it."""
        return f"compose({', '.join(map(repr, self.parts))})"

    def __eq__(self, other: object) -> bool:
        """Whether the other combines equal weightings in the same order."""
        return isinstance(other, Composed) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    @property
    def citation(self) -> str:  # type: ignore[override]
        """The citations of all parts."""
        return "".join(f"{citation}\n" for part in self.parts if (citation := part.citation.strip("\n")))

    @property
    def has_mean_one(self) -> bool:
        """Whether a single part weights the negatives, with mean 1. Products of weights do not have mean 1."""
        weighing = self._weighing()
        return len(weighing) == 1 and weighing[0].has_mean_one

    @property
    def debiases(self) -> bool:
        """Whether a part debiases."""
        return any(part.debiases for part in self.parts)

    @property
    def needs_last_layer(self) -> bool:
        """Whether a part needs the inputs of the last layer."""
        return any(part.needs_last_layer for part in self.parts)

    @property
    def positive_factor(self) -> float:
        """The product of the parts' factors."""
        factor = 1.0
        for part in self.parts:  # torch.compile cannot trace math.prod
            factor *= part.positive_factor
        return factor

    def _weighing(self) -> list[Weighting]:
        return [part for part in self.parts if _weighs(part)] or [Uniform()]

    def _weigher(self) -> Weighting:
        """Returns the only part with weights, `Uniform()` if there is none, or itself if there are several."""
        weighing = self._weighing()
        return self if len(weighing) > 1 else weighing[0]._weigher()

    def _combines(self) -> bool:
        return any(part._combines() for part in self.parts)

    def _with_options(self, **options: Any) -> Weighting | None:
        changed = [part._with_options(**options) for part in self.parts]
        if not any(changed):
            return None
        return compose(*(new or part for new, part in zip(changed, self.parts, strict=True)))

    def _hardness(self) -> float | None:
        """Returns the hardness of the first part that has one."""
        return next((of for part in self.parts if (of := part._hardness()) is not None), None)

    def _title(self) -> str:
        return " + ".join(part._title() for part in self.parts)

    def choose(self, contrast: Contrast) -> Contrast:
        """Returns the contrast after each part has chosen in turn."""
        for part in self.parts:
            contrast = part.choose(contrast)
        return contrast

    def prepare(self, contrast: Contrast) -> Any:
        """Returns a list of what each part that weights the negatives prepares."""
        return [part.prepare(contrast) for part in self._weighing()]

    def log_weights(self, prepared: Any, rows: slice) -> Tensor:
        """Returns the sum of the parts' log-weights [r, m]."""
        first, *others = (part.log_weights(of, rows) for part, of in zip(self._weighing(), prepared, strict=True))
        return sum(others, start=first)

    def combine(self, contrast: Contrast, positives: Tensor, negatives: Tensor, count: Tensor) -> Tensor:
        """Returns the log-sum after each part has changed it in turn [n]."""
        for part in self.parts:
            negatives = part.combine(contrast, positives, negatives, count)
        return negatives

    def softened(self, share: float) -> Weighting:
        """Returns the parts, each at this share of its strength, a number from 0 to 1."""
        check_share(share)
        softened = [part.softened(share) for part in self.parts]
        return Composed([part for part in softened if type(part) is not Uniform]) if share else Uniform()
