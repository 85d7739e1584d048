"""Several methods at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from undimix_plugins.contrast import Contrast
from undimix_plugins.settings import loadable
from undimix_plugins.weightings.false_negatives import FalseNegatives
from undimix_plugins.weightings.weighting import Uniform, Weighting, check_share, check_weighting


def compose(*weightings: Weighting) -> Weighting:
    """Several methods as one weighting.

    1. What chooses negatives (`Ring`, `FalseNegativeElimination`, `FalseNegativeAttraction`) does so first, in the
       order given: the next sees what the last has left.
    2. What weights them (`UnDiMix`, `HCL`, `BCL`, `ProGCL`, `SimilarityPenalty`) does that with those that are left; of
       several the weights are multiplied.
    3. What changes their sum (`Debiased`, `HCL`, `MoCHi`) does so in the order given.

    Args:
        weightings: At least one.

    Returns:
        A weighting; for one, itself.

    Raises:
        TypeError: For what is no weighting.
        ValueError: For none, or for what makes no sense together: a method twice, two that debias, false negatives that
            are left out and attracted, debiasing of weights that are not of mean 1, debiasing of a sum with synthetic
            negatives in it (`MoCHi` before `Debiased`).

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
    """Why they make no sense together; None where they do."""
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
    weighing = [part for part in parts if not part._weigher()._weighs_alike]
    for part in weighing if of_sum else ():
        if not part.has_mean_one:
            return f"expected weights of mean 1 where their sum is debiased, which a {type(part).__name__}'s are not"
    if of_sum and len(weighing) > 1:
        return "expected weights of mean 1 where their sum is debiased, which a product's are not"
    adding = next((place for place, part in enumerate(parts) if part.adds_negatives), len(parts))
    if any(place > adding for place in of_sum):
        name = type(parts[adding]).__name__
        return f"expected debiasing before {name}, whose negatives are no draws that a class has a share of"
    return None


@loadable
class Composed(Weighting):
    """What `compose` returns.

    Attributes:
        parts: The weightings, at least two.
    """

    def __init__(self, parts: Sequence[Weighting]) -> None:
        self.parts = tuple(parts)

    def __repr__(self) -> str:
        """As it is written."""
        return f"compose({', '.join(map(repr, self.parts))})"

    def __eq__(self, other: object) -> bool:
        """Whether the same methods are composed in the same order."""
        return isinstance(other, Composed) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    @property
    def citation(self) -> str:  # type: ignore[override]
        """Those of the parts."""
        return "".join(f"{citation}\n" for part in self.parts if (citation := part.citation.strip("\n")))

    @property
    def has_mean_one(self) -> bool:
        """Where a single part weighs, whether its weights do; a product's do not."""
        weighing = self._weighing()
        return len(weighing) == 1 and weighing[0].has_mean_one

    @property
    def debiases(self) -> bool:
        """Whether any part does."""
        return any(part.debiases for part in self.parts)

    @property
    def needs_last_layer(self) -> bool:
        """Whether any part does."""
        return any(part.needs_last_layer for part in self.parts)

    def _weighing(self) -> list[Weighting]:
        return [part for part in self.parts if not part._weigher()._weighs_alike] or [Uniform()]

    def _weigher(self) -> Weighting:
        """The one part that weighs, or equal weights; of several, itself."""
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
        """That of the first part that has any."""
        return next((of for part in self.parts if (of := part._hardness()) is not None), None)

    def _title(self) -> str:
        return " + ".join(part._title() for part in self.parts)

    def choose(self, contrast: Contrast) -> Contrast:
        """What one part after the other leaves."""
        for part in self.parts:
            contrast = part.choose(contrast)
        return contrast

    def prepare(self, contrast: Contrast) -> Any:
        """What each part that weighs prepares."""
        return [part.prepare(contrast) for part in self._weighing()]

    def log_weights(self, prepared: Any, rows: slice) -> Tensor:
        """Their sum [r, m]."""
        first, *others = (part.log_weights(of, rows) for part, of in zip(self._weighing(), prepared, strict=True))
        return sum(others, start=first)

    def combine(self, contrast: Contrast, positives: Tensor, negatives: Tensor, count: Tensor) -> Tensor:
        """What one part after the other makes of them [n]."""
        for part in self.parts:
            negatives = part.combine(contrast, positives, negatives, count)
        return negatives

    def softened(self, share: float) -> Weighting:
        """The parts, each on its way."""
        check_share(share)
        softened = [part.softened(share) for part in self.parts]
        return Composed([part for part in softened if type(part) is not Uniform]) if share else Uniform()
