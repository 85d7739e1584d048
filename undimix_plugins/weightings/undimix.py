"""The importance weights of UnDiMix: a mix of similarity, influence and diversity."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from undimix_plugins.checks import LARGEST, check_choice, check_number
from undimix_plugins.components import TaskGradients, mean_distances, task_gradients
from undimix_plugins.contrast import Contrast
from undimix_plugins.masked import mean_one
from undimix_plugins.rows import full_precision
from undimix_plugins.settings import constant
from undimix_plugins.weightings.weighting import Terms, Weighting, check_share

# A deviation below this many eps of the terms of a score is a rounding error. Equal rows must get the same weight.
ROUNDING = 32
# The standard deviation of an anchor's logits from which its weights soften. If logits are normally distributed, the
# softmax is then as concentrated as if half of the negatives counted equally: exp(-spread^2) = 1/2.
MODERATE_SPREAD = math.sqrt(math.log(2))


class Prepared(NamedTuple):
    """What is computed once for all anchors."""

    contrast: Contrast
    tasks: tuple[TaskGradients, TaskGradients] | None  # of the anchors and the pool; None if the influence is 0


class Scores(NamedTuple):
    """The scores of a block of r anchors, with a pool of m candidates.

    Attributes:
        standardised: The standardised scores by name, each [r, m], 0 in columns that are not negatives.
        share: The share of the hardness that is in force for each anchor [r, 1], from 0 to 1. 1 with linear mixing.

    Examples:
        >>> weighting = UnDiMix()
        >>> prepared = weighting.prepare(two_views(torch.randn(8, 4), torch.randn(8, 4), temperature=2.0))
        >>> weighting.scores(prepared, slice(0, 1), prepared.contrast.is_negative(slice(0, 1))).share
        tensor([[0.8929]])
    """

    standardised: dict[str, Tensor]
    share: Tensor


@constant
@dataclass(frozen=True)
class UnDiMix(Weighting):
    """Uncertainty and diversity mixing: gives more weight to similar, influential and diverse negatives.

    Each negative has three scores: `anchor_similarity` A, `influence` I and `diversity` V. They are standardised over
    the n_i negatives of an anchor (mean 0, population standard deviation 1) to A~, I~ and V~. If the deviation is only
    a rounding error, the standardised scores are 0. With strengths l and hardness h the weights are

        geometric:  w_ij = exp(h_i * S_ij) / mean over k of exp(h_i * S_ik),  S = l_A A~ + l_I I~ + l_V V~
        linear:     w_ij = n_i * (l_A softmax(h A~) + l_I softmax(h I~) + l_V softmax(h V~)),  the l's summing to 1

    The mean weight of an anchor's negatives is 1, so `hardness=0` is exactly the plain loss.

    Linear mixing is the interpolation of the paper. Its weights have no gradient. Geometric mixing is ours. It
    multiplies where the paper adds, so that a negative needs high scores in all three.

    Geometric weights adapt to the temperature. Let d_i be the standard deviation of an anchor's logits s_ij / t over
    its negatives. At a low temperature d_i is large: the softmax of the loss has already concentrated on a few
    negatives, about n exp(-d_i^2) of n if the logits are normally distributed. Once these are less than
    half, at d_i = sqrt(log 2) = 0.83, the weights soften:

        h_i = h * fade(d_i),  fade(d) = exp(1 - d^2 / log 2), at most 1

    A gradient flows through A~, as in HCL, but not through the mean and the deviation of A. It fades as well. The
    log-sum of an anchor's negatives, with softmax P_ij, has the gradient

        P_ij / t + g_i * h_i * l_A / t * (P_ij - w_ij / n_i),  g_i = min(1, 1 / d_i) * fade(d_i)

    with respect to the similarity s_ij. The second term sums to 0 over the negatives: it does not change the mean of
    the similarities, but reduces their spread.

    Attributes:
        similarity: Strength l_A of the similarity to the anchor, finite. At least 0 for linear mixing.
        influence: Strength l_I of model uncertainty and influence, finite. At least 0 for linear mixing.
        diversity: Strength l_V of the distance to the other negatives ("representativeness" in UnReMix), finite. At
            least 0 for linear mixing.
        hardness: The factor h of all standardised scores, at least 0. 0 gives the plain loss. With geometric mixing it
            is the largest that an anchor can have.
        mixing: "geometric" or "linear".
        gradient: The gradients of the influence: with respect to the "embedding", or to the "weight" of the last layer.
            "weight" needs a contrast with the inputs of the last layer.
        distance: The distance of the diversity, "cosine" or "euclidean".
        detached: Whether the weights of geometric mixing have no gradient.

    Raises:
        ValueError: If a strength is not finite, or negative with linear mixing, if all strengths are 0 (use `Uniform()`
            for plain weights), if `hardness` is negative, not finite or so large that scores could overflow, or if
            `mixing`, `gradient` or `distance` is unknown. In a loss, if `gradient` is "weight" and the contrast does
            not have the inputs of the last layer.

    References:
        Tabassum, Wahed, Eldardiry, Lourentzou: UnReMix: Hard Negative Sampling Strategies for Contrastive
        Representation Learning (first named UnDiMix), arXiv 2206.01197, section 3.

    Examples:
        >>> contrast = two_views(torch.randn(8, 4), torch.randn(8, 4), temperature=0.5)
        >>> weights = importance_weights(contrast, UnDiMix(hardness=2.0))
        >>> torch.allclose(weights.sum(dim=1), contrast.count)
        True
    """

    similarity: float = 0.5
    influence: float = 0.25
    diversity: float = 0.25
    hardness: float = 1.0
    mixing: str = "geometric"
    gradient: str = "embedding"
    distance: str = "cosine"
    detached: bool = False

    strength: ClassVar[str] = "hardness"
    citation: ClassVar[str] = """
@misc{tabassum2022unremix,
    title={Hard Negative Sampling Strategies for Contrastive Representation Learning},
    author={Afrina Tabassum and Muntasir Wahed and Hoda Eldardiry and Ismini Lourentzou},
    year={2022},
    eprint={2206.01197},
    archivePrefix={arXiv},
    primaryClass={cs.LG},
    url={https://arxiv.org/abs/2206.01197},
}
"""

    def __post_init__(self) -> None:
        check_choice("mixing", self.mixing, ("linear", "geometric"))
        check_choice("gradient", self.gradient, ("embedding", "weight"))
        check_choice("distance", self.distance, ("cosine", "euclidean"))
        check_number("hardness", self.hardness, at_least=0)
        strengths = {name: getattr(self, name) for name in ("similarity", "influence", "diversity")}
        for name, strength in strengths.items():
            if self.mixing == "linear":
                check_number(name, strength, at_least=0)
            else:
                check_number(name, strength)
        if not any(strengths.values()):
            raise ValueError(
                "similarity, influence, diversity: expected at least one strength other than 0, got all 0; "
                "for plain weights use Uniform()"
            )
        strongest = max(map(abs, strengths.values())) if self.mixing == "geometric" else 1.0
        if self.hardness * strongest > LARGEST:
            came = ", ".join(f"{name}={strength!r}" for name, strength in strengths.items())
            raise ValueError(
                f"hardness: expected at most {LARGEST:g} once multiplied by the largest strength, "
                f"got {self.hardness!r} with {came}"
            )

    @property
    def has_mean_one(self) -> bool:
        """True: the weights have mean 1."""
        return True

    @property
    def needs_last_layer(self) -> bool:
        """True if `gradient` is "weight"."""
        return self.gradient == "weight"

    @property
    def _has_scorer(self) -> bool:
        return type(self) is UnDiMix  # not a subclass, which may weigh otherwise

    def _with_options(self, **options: Any) -> UnDiMix:
        return replace(self, **options)

    @property
    def carries_gradient(self) -> bool:
        """Whether a gradient flows through the weights: with geometric mixing, unless they are detached."""
        return self.mixing == "geometric" and bool(self.similarity and self.hardness) and not self.detached

    def softened(self, share: float) -> UnDiMix:
        """Returns a copy with `hardness` multiplied by `share`, a number from 0 to 1."""
        return replace(self, hardness=check_share(share) * self.hardness)

    def check(self, contrast: Contrast) -> None:
        """Raises a ValueError if the weighting needs what the contrast lacks: the last layer's inputs, or vectors."""
        if self.diversity and contrast.scores_given and contrast.vectors is None:
            raise ValueError(
                "diversity: expected 0 where the loss gives similarities and no vectors, whose distances it needs, "
                f"got {self.diversity!r}; use UnDiMix(diversity=0)"
            )
        if self.gradient == "weight" and self.influence and contrast.last_layer is None:
            raise ValueError(
                "gradient='weight' needs the last layer's inputs: expected a Contrast with last_layer, its "
                "anchor_inputs and pool_inputs, got None; pass undimix(loss, last_layer=linear), or use "
                "gradient='embedding'"
            )

    @torch.no_grad()
    def prepare(self, contrast: Contrast) -> Prepared:
        """Computes the gradients of the pseudo-labelling tasks of all anchors and candidates."""
        self.check(contrast)
        if not self.influence:
            return Prepared(contrast, None)
        with full_precision(contrast.pool):
            of_anchors, of_pool = task_gradients(
                contrast.anchors,
                contrast.pool,
                contrast.held_temperature,
                contrast.own_columns,
                None if contrast.positives_in_pool else contrast.positives,
                contrast.gathered,
            )
            if self.gradient == "weight" and contrast.last_layer is not None and contrast.last_layer.normalized:
                of_anchors, of_pool = of_anchors.along_sphere(contrast.anchors), of_pool.along_sphere(contrast.pool)
        return Prepared(contrast, (of_anchors, of_pool))

    def log_weights(self, prepared: Prepared, rows: slice) -> Tensor:
        """Returns `log w` [r, m]. It has a gradient with geometric mixing, unless `detached` is set."""
        negative = prepared.contrast.is_negative(rows)
        return self.mixed(self.scores(prepared, rows, negative), negative)

    def scores(self, prepared: Prepared, rows: slice, negative: Tensor) -> Scores:
        """Computes the standardised scores of a block of anchors, for all components whose strength is not 0.

        Args:
            prepared: What `prepare` returned.
            rows: The block of r anchors.
            negative: Which columns of the pool are their negatives, bool [r, m].

        Returns:
            A~, I~ and V~ by the names "similarity", "influence" and "diversity", in the embeddings' dtype, and the
            share of the hardness. A~ has a gradient if the weights have one.

        Examples:
            >>> contrast, weighting = two_views(torch.randn(8, 4), torch.randn(8, 4), 0.5), UnDiMix(influence=0.0)
            >>> rows = slice(0, 2)
            >>> list(weighting.scores(weighting.prepare(contrast), rows, contrast.is_negative(rows)).standardised)
            ['similarity', 'diversity']
        """
        contrast, found = prepared.contrast, {}
        geometric = self.mixing == "geometric"
        with full_precision(contrast.pool):
            share = contrast.pool.new_ones(len(contrast.anchors[rows]), 1)
            if self.similarity or geometric:
                scores, error = self._similarity(contrast, rows, negative)
                similarity, deviation = standardise(scores.detach(), error, negative)
                inverse_spread = torch.where(deviation > 0, contrast.held_temperature / deviation, 0)
                if geometric:
                    share = hardness_share_at(inverse_spread)
                if self.carries_gradient and scores.requires_grad:
                    slope = gradient_slope_at(inverse_spread) / contrast.held_temperature
                    moved = (scores - scores.detach()) * slope
                    similarity = similarity + moved.masked_fill(~negative, 0)
                if self.similarity:
                    found["similarity"] = similarity
            if self.influence and prepared.tasks is not None:
                found["influence"], _ = standardise(
                    *self._influence(contrast, *prepared.tasks, rows, negative), negative
                )
            if self.diversity:
                found["diversity"], _ = standardise(*self._diversity(contrast, negative), negative)
        return Scores(found, share)

    def terms(self, prepared: Prepared, rows: slice) -> Terms:
        """Returns the contribution of each component to the weights of a block of anchors.

        Components with strength 0 are left out.

        Args:
            prepared: What `prepare` returned.
            rows: The block of r anchors.

        Returns:
            The contributions by name, each [r, m]. For geometric mixing `h_i * l_A * A~` and so on, which add up to
            `log w` up to a constant for each anchor. For linear mixing `n_i * l_A * softmax(h * A~)` and so on, which
            add up to `w`.

        Examples:
            >>> weighting = UnDiMix()
            >>> prepared = weighting.prepare(two_views(torch.randn(8, 4), torch.randn(8, 4), temperature=0.5))
            >>> parts, of_logarithm = weighting.terms(prepared, slice(0, 2))
            >>> sorted(parts), of_logarithm
            (['diversity', 'influence', 'similarity'], True)
        """
        if not self._has_scorer:
            return super().terms(prepared, rows)
        negative = prepared.contrast.is_negative(rows)
        terms = self._terms(self.scores(prepared, rows, negative), negative)
        if self.mixing == "geometric":
            return Terms(terms, of_logarithm=True)
        return Terms({name: term.exp() for name, term in terms.items()}, of_logarithm=False)

    def _terms(self, scores: Scores, negative: Tensor) -> dict[str, Tensor]:
        """Returns the contribution of each component whose strength is not 0.

        Args:
            scores: What `scores` returned. Components with strength 0 are ignored.
            negative: Which columns are negatives, bool [r, m].

        Returns:
            The contributions by name, each [r, m]. For geometric mixing `h_i * l_A * A~` and so on, which add up to
            `log w` up to a constant for each anchor. For linear mixing the logarithms of the parts that add up to `w`.
        """
        of_name, share = scores
        strengths = {name: float(getattr(self, name)) for name in of_name if getattr(self, name)}
        if self.mixing == "geometric":
            return {name: self.hardness * strength * share * of_name[name] for name, strength in strengths.items()}
        largest = max([*strengths.values()])  # a list, for the compiler of torch 2.4
        log_total = math.log(sum(strength / largest for strength in strengths.values())) + math.log(largest)
        return {
            name: mean_one(self.hardness * of_name[name], negative) + math.log(strength) - log_total
            for name, strength in strengths.items()
        }

    def mixed(self, scores: Scores, negative: Tensor) -> Tensor:
        """Returns `log w` [r, m] for what `scores` returned. The arguments are those of `_terms`."""
        terms = torch.stack(list(self._terms(scores, negative).values()))
        return terms.logsumexp(dim=0) if self.mixing == "linear" else mean_one(terms.sum(dim=0), negative)

    # Each of these returns a score [r, m] and, for each anchor, the size of its rounding error [r, 1] in units of eps.

    def _similarity(self, contrast: Contrast, rows: slice, negative: Tensor) -> tuple[Tensor, Tensor]:
        anchors, pool = contrast.anchors[rows], contrast.pool
        with torch.no_grad():
            error = anchors.norm(dim=1, keepdim=True) * _largest(pool.norm(dim=1), negative)
        if isinstance(contrast.temperature, Tensor):  # removes the temperature's gradient, which the anchors carry
            anchors = anchors * (contrast.temperature / contrast.held_temperature)
        return anchors @ pool.T, error

    @torch.no_grad()
    def _influence(
        self, contrast: Contrast, of_anchors: TaskGradients, of_pool: TaskGradients, rows: slice, negative: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Standardising removes any factor of a row. So the scale of the anchor and the largest scale of its negatives
        # are left out, and the scores stay in the range of their dtype.
        direction, terms = of_anchors.direction[rows], of_anchors.terms[rows, None]
        log_scale = of_pool.log_scale.expand(len(direction), -1).masked_fill(~negative, -torch.inf)
        largest = log_scale.amax(dim=1, keepdim=True)
        scale = (log_scale - largest.masked_fill(largest.isneginf(), 0)).exp()
        scores = direction @ of_pool.direction.T * scale
        length, pool_length = direction.norm(dim=1, keepdim=True), of_pool.direction.norm(dim=1)
        error = terms * _largest(scale * pool_length, negative) + length * _largest(scale * of_pool.terms, negative)
        if self.gradient == "weight" and contrast.last_layer is not None:
            anchor_inputs, pool_inputs = contrast.last_layer.anchor_inputs[rows], contrast.last_layer.pool_inputs
            scores = scores * (anchor_inputs @ pool_inputs.T)
            longest = _largest(pool_inputs.norm(dim=1), negative)
            error = error * anchor_inputs.norm(dim=1, keepdim=True) * longest
        return scores, error

    @torch.no_grad()
    def _diversity(self, contrast: Contrast, negative: Tensor) -> tuple[Tensor, Tensor]:
        rows = contrast.pool if contrast.vectors is None else contrast.vectors
        scores = mean_distances(rows, negative, self.distance)
        lengths = rows.norm(dim=1)
        error = torch.ones_like(lengths) if self.distance == "cosine" else lengths
        return scores, _largest(error, negative)


def mix_of(weighting: Weighting) -> UnDiMix | None:
    """Returns the weighting if the fast path computes its scores itself, otherwise None."""
    return cast(UnDiMix, weighting) if weighting._has_scorer else None


def hardness_share_at(inverse_spread: Tensor) -> Tensor:
    """Returns the share of the hardness that is in force for each anchor: `fade(spread)`.

    Args:
        inverse_spread: One over the standard deviation of the anchor's logits. 0 stands for logits that are all the
            same: there is nothing to soften.

    Returns:
        Shares from 0 to 1, of the same shape.

    Examples:
        >>> hardness_share_at(1 / torch.tensor([0.5, 1.0, 1.5]))
        tensor([1.0000, 0.6423, 0.1058])
    """
    return _fade_at(inverse_spread).masked_fill(inverse_spread == 0, 1)


def gradient_slope_at(inverse_spread: Tensor) -> Tensor:
    """Returns how much a standardised similarity grows with the logit, for the gradient of the weights.

    It is `min(1, 1 / spread) * fade(spread)`.

    Args:
        inverse_spread: One over the standard deviation of the anchor's logits. 0 stands for logits that are all the
            same: such weights have no gradient.

    Returns:
        Slopes from 0 to 1, of the same shape.

    Examples:
        >>> gradient_slope_at(1 / torch.tensor([0.5, 1.0, 1.5]))
        tensor([1.0000, 0.6423, 0.0705])
    """
    # If all similarities are nearly the same, their deviation would make the gradient too large.
    return inverse_spread.clamp(max=1) * _fade_at(inverse_spread)


def _fade_at(inverse_spread: Tensor) -> Tensor:
    """Returns `fade(spread) = exp(1 - spread^2 / log 2)`, at most 1, for `1 / spread`."""
    return (1 - (MODERATE_SPREAD * inverse_spread).clamp(max=1).reciprocal().square()).exp()


def standardise(scores: Tensor, error: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Standardises scores over each anchor's negatives, to mean 0 and population standard deviation 1.

    Args:
        scores: [r, m], floating point.
        error: The size of the terms of each row's scores [r, 1]. Multiplied by eps, it is their rounding error.
        negative: Which columns are negatives, bool [r, m].

    Returns:
        The standardised scores [r, m], 0 in columns that are not negatives, and the deviations [r, 1]. Both are 0 for a
        row whose deviation is only a rounding error.

    Examples:
        >>> scores, deviations = standardise(torch.tensor([[1.0, 3.0]]), torch.ones(1, 1), torch.ones(1, 2).bool())
        >>> scores, deviations
        (tensor([[-1.,  1.]]), tensor([[1.]]))
    """
    count = negative.sum(dim=1, keepdim=True).clamp(min=1)
    mean = scores.masked_fill(~negative, 0).sum(dim=1, keepdim=True) / count
    centred = (scores - mean).masked_fill(~negative, 0)
    # The scores of a confident row are so small that their squares would be 0.
    size = centred.abs().amax(dim=1, keepdim=True)
    centred = centred / size.masked_fill(size == 0, 1)
    deviation = (centred.square().sum(dim=1, keepdim=True) / count).sqrt()
    rounding = deviation * size <= ROUNDING * torch.finfo(scores.dtype).eps * error
    standardised = (centred / deviation.masked_fill(rounding, 1)).masked_fill(rounding, 0)
    return standardised, (deviation * size).masked_fill(rounding, 0)


def _largest(values: Tensor, negative: Tensor) -> Tensor:
    """Returns the largest of `values` [m] or [r, m], at least 0, among each anchor's negatives [r, 1]."""
    return torch.where(negative, values, torch.zeros_like(values)).amax(dim=1, keepdim=True)
