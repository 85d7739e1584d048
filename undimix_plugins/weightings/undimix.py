"""The importance weights of UnDiMix: similarity, influence and diversity, mixed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from undimix_plugins.checks import LARGEST, check_choice, check_number
from undimix_plugins.components import TaskGradients, mean_distances, task_gradients
from undimix_plugins.contrast import Contrast
from undimix_plugins.rows import full_precision
from undimix_plugins.settings import constant
from undimix_plugins.weightings.weighting import Terms, Weighting, check_share, mean_one

# A deviation below this many eps of the terms that made a score is rounding: coincident rows must weigh the same.
ROUNDING = 32


class Prepared(NamedTuple):
    """What is worked out once for all anchors."""

    contrast: Contrast
    tasks: tuple[TaskGradients, TaskGradients] | None  # of the anchors and of the pool; None where they do not count


@constant
@dataclass(frozen=True)
class UnDiMix(Weighting):
    """Uncertainty and diversity mixing: negatives near the anchor, influential and diverse count more.

    Each score (`anchor_similarity` A, `influence` I, `diversity` V) is standardised over the anchor's n_i negatives
    (mean 0, population deviation 1; a deviation within rounding gives scores of 0) to A~, I~, V~. With strengths l and
    hardness h the weights are

        geometric:  w_ij = exp(h * S_ij) / mean over k of exp(h * S_ik),  S = l_A A~ + l_I I~ + l_V V~
        linear:     w_ij = n_i * (l_A softmax(h A~) + l_I softmax(h I~) + l_V softmax(h V~)),  the l's summing to 1

    They average 1 over an anchor's negatives, so `hardness=0` is exactly the plain loss. Linear is the paper's
    interpolation, with constant weights. Geometric is ours: it multiplies where the paper adds, so that a negative must
    score on all three, and a gradient flows through A~, as one does through HCL's weights. Its mean and deviation are
    held, the latter at no less than t: the log-sum of an anchor's negatives, of softmax P_ij, has at a similarity s_ij
    the gradient

        P_ij / t + h * l_A / max(deviation_i, t) * (P_ij - w_ij / n_i),

    whose second part leaves the similarities' mean to the first and makes them spread less.

    Attributes:
        similarity: Strength l_A of anchor vicinity, finite; under linear mixing at least 0.
        influence: Strength l_I of model uncertainty and influence, likewise.
        diversity: Strength l_V of the distance to the other negatives (representativeness in UnReMix), likewise.
        hardness: Scales all standardised scores, at least 0; 0 is the plain loss.
        mixing: "geometric" or "linear".
        gradient: Where the influence takes gradients: at the "embedding", or at the last layer's "weight", which needs
            that layer's inputs in the Contrast.
        distance: Of the diversity: "cosine" or "euclidean".
        detached: Whether weights are constants of a step under geometric mixing too.

    Raises:
        ValueError: For strengths not finite, all 0 (that is `Uniform()`) or, under linear mixing, negative; `hardness`
            negative, not finite or so large that scores would overflow; an unknown `mixing`, `gradient` or `distance`.
            In use: `gradient="weight"` with a Contrast that lacks the last layer's inputs.

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
        """They do."""
        return True

    @property
    def needs_last_layer(self) -> bool:
        """Whether gradients are taken at the last layer's weight."""
        return self.gradient == "weight"

    @property
    def _has_scorer(self) -> bool:
        return type(self) is UnDiMix  # not a subclass, which may weigh otherwise

    def _with_options(self, **options: Any) -> UnDiMix:
        return replace(self, **options)

    @property
    def carries_gradient(self) -> bool:
        """Whether a gradient flows through the weights."""
        return self.mixing == "geometric" and bool(self.similarity and self.hardness) and not self.detached

    def softened(self, share: float) -> UnDiMix:
        """The same with that share of the hardness."""
        return replace(self, hardness=check_share(share) * self.hardness)

    def check(self, contrast: Contrast) -> None:
        """Raises a ValueError where the contrast lacks what the weighting needs."""
        if self.gradient == "weight" and self.influence and contrast.last_layer is None:
            raise ValueError(
                "gradient='weight' needs the last layer's inputs: expected a Contrast with last_layer, its "
                "anchor_inputs and pool_inputs, got None; pass undimix(loss, last_layer=linear), or use "
                "gradient='embedding'"
            )

    @torch.no_grad()
    def prepare(self, contrast: Contrast) -> Prepared:
        """The gradients of the pseudo-labelling tasks of all anchors and of the whole pool."""
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
        """`log w` [r, m]."""
        negative = prepared.contrast.is_negative(rows)
        return self.mixed(self.scores(prepared, rows, negative), negative)

    def scores(self, prepared: Prepared, rows: slice, negative: Tensor) -> dict[str, Tensor]:
        """The standardised scores of a block of anchors, of the components that have a strength.

        Args:
            prepared: What `prepare` returned.
            rows: The block of anchors, r of them.
            negative: Which columns of the pool are their negatives, bool [r, m].

        Returns:
            A~, I~ and V~ by the component's name [r, m], in the embeddings' dtype; 0 for what is no negative. A~ has a
            gradient where the weights carry one.
        """
        contrast, found = prepared.contrast, {}
        with full_precision(contrast.pool):
            if self.similarity:
                scores, error = self._similarity(contrast, rows, negative)
                found["similarity"], deviation = standardise(scores.detach(), error, negative)
                if self.carries_gradient and scores.requires_grad:
                    # Where similarities are all but the same, their deviation would make the gradient too large.
                    at_least_t = deviation + (contrast.held_temperature - deviation).clamp(min=0)
                    moved = (scores - scores.detach()) / at_least_t
                    found["similarity"] = found["similarity"] + moved.masked_fill(~negative | (deviation == 0), 0)
            if self.influence and prepared.tasks is not None:
                found["influence"], _ = standardise(
                    *self._influence(contrast, *prepared.tasks, rows, negative), negative
                )
            if self.diversity:
                found["diversity"], _ = standardise(*self._diversity(contrast, rows, negative), negative)
        return found

    def terms(self, prepared: Prepared, rows: slice) -> Terms:
        """What each component that has a strength adds to the weights of a block of anchors.

        Args:
            prepared: What `prepare` returned.
            rows: The block of anchors, r of them.

        Returns:
            By the component's name [r, m]. Geometric: `h * l_A * A~` and so on, which add up to `log w` but for a
            number of the anchor's own. Linear: `n_i * l_A * softmax(h * A~)` and so on, which add up to `w`.
        """
        if not self._has_scorer:
            return super().terms(prepared, rows)
        negative = prepared.contrast.is_negative(rows)
        terms = self._terms(self.scores(prepared, rows, negative), negative)
        if self.mixing == "geometric":
            return Terms(terms, of_logarithm=True)
        return Terms({name: term.exp() for name, term in terms.items()}, of_logarithm=False)

    def _terms(self, scores: dict[str, Tensor], negative: Tensor) -> dict[str, Tensor]:
        """What each component that has a strength adds to the weights.

        Args:
            scores: As `scores` returns them; of the components that have no strength, none is used.
            negative: Which columns are negatives, bool [r, m].

        Returns:
            By the component's name [r, m]. Geometric: `h * l_A * A~` and so on, of which `log w` is the sum but for a
            number of the anchor's own. Linear: the logarithm of the part that adds up to `w`.
        """
        strengths = {name: float(getattr(self, name)) for name in scores if getattr(self, name)}
        if self.mixing == "geometric":
            return {name: self.hardness * strength * scores[name] for name, strength in strengths.items()}
        largest = max(strengths.values())
        log_total = math.log(sum(strength / largest for strength in strengths.values())) + math.log(largest)
        return {
            name: mean_one(self.hardness * scores[name], negative) + math.log(strength) - log_total
            for name, strength in strengths.items()
        }

    def mixed(self, scores: dict[str, Tensor], negative: Tensor) -> Tensor:
        """`log w` [r, m] of a block's scores; arguments as `_terms` has them."""
        terms = torch.stack(list(self._terms(scores, negative).values()))
        return terms.logsumexp(dim=0) if self.mixing == "linear" else mean_one(terms.sum(dim=0), negative)

    # Each score comes with the size of its rounding error per anchor [r, 1], in units of eps.

    def _similarity(self, contrast: Contrast, rows: slice, negative: Tensor) -> tuple[Tensor, Tensor]:
        anchors, pool = contrast.anchors[rows], contrast.pool
        with torch.no_grad():
            error = anchors.norm(dim=1, keepdim=True) * _largest(pool.norm(dim=1), negative)
        if isinstance(contrast.temperature, Tensor):  # whose gradient goes through the anchors: not through these
            anchors = anchors * (contrast.temperature / contrast.held_temperature)
        return anchors @ pool.T, error

    @torch.no_grad()
    def _influence(
        self, contrast: Contrast, of_anchors: TaskGradients, of_pool: TaskGradients, rows: slice, negative: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Standardising undoes a factor of the whole row: an anchor's own scale, and the largest of its negatives', so
        # that what counts never leaves the range.
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
    def _diversity(self, contrast: Contrast, rows: slice, negative: Tensor) -> tuple[Tensor, Tensor]:
        scores = mean_distances(contrast.pool, negative, self.distance)
        lengths = contrast.pool.norm(dim=1)
        error = torch.ones_like(lengths) if self.distance == "cosine" else lengths
        return scores, _largest(error, negative)


def mix_of(weighting: Weighting) -> UnDiMix | None:
    """The weighting whose scores the fast path works out by itself; None for others."""
    return cast(UnDiMix, weighting) if weighting._has_scorer else None


def standardise(scores: Tensor, error: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Mean 0 and population deviation 1 over each anchor's negatives; 0 where the deviation is rounding.

    Args:
        scores: [r, m].
        error: The size of the terms that made a row's scores [r, 1]; times eps, their rounding error.
        negative: Which columns are negatives, bool [r, m].

    Returns:
        [r, m], 0 in the columns that are no negatives; and the deviations [r, 1], 0 for rounding.
    """
    count = negative.sum(dim=1, keepdim=True).clamp(min=1)
    mean = scores.masked_fill(~negative, 0).sum(dim=1, keepdim=True) / count
    centred = (scores - mean).masked_fill(~negative, 0)
    # A confident row's scores are so small that their squares would be 0.
    size = centred.abs().amax(dim=1, keepdim=True)
    centred = centred / size.masked_fill(size == 0, 1)
    deviation = (centred.square().sum(dim=1, keepdim=True) / count).sqrt()
    rounding = deviation * size <= ROUNDING * torch.finfo(scores.dtype).eps * error
    standardised = (centred / deviation.masked_fill(rounding, 1)).masked_fill(rounding, 0)
    return standardised, (deviation * size).masked_fill(rounding, 0)


def _largest(values: Tensor, negative: Tensor) -> Tensor:
    """The largest of the pool's `values` [m] or [r, m], at least 0, among each anchor's negatives: [r, 1]."""
    return torch.where(negative, values, torch.zeros_like(values)).amax(dim=1, keepdim=True)
