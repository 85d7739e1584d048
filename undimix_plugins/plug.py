"""One verb: `undimix(loss)` weights the negatives of a toolkit's loss.

The core knows no toolkit. An adapter is a function `weighted(loss, weighting)` that a package registers under the
entry-point group `undimix_plugins.adapters`, named for the toolkit's import package; most are one call of `reweight`.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar, cast

from torch import nn

from undimix_plugins.weighted_loss import OPTIONS, WeightedLoss, chosen_weighting, full_weighting, why_no_loss
from undimix_plugins.weightings.weighting import Weighting

GROUP = "undimix_plugins.adapters"

# What belongs to something else than the verb, and where it goes.
ELSEWHERE = {
    "temperature": "it belongs to the loss, as in NTXentLoss(temperature=0.2); a ranking loss has scale=5 for that",
    "scale": "it belongs to the loss, as in MultipleNegativesRankingLoss(model, scale=5)",
    "beta": "it belongs to HCL, as in undimix(loss, HCL(beta=0.5, tau_plus=0))",
    "tau_plus": "it belongs to HCL or Debiased, as in undimix(loss, HCL(beta=0.5, tau_plus=0))",
    "alpha": "it belongs to SimilarityPenalty, as in undimix(loss, SimilarityPenalty(alpha=9.0))",
    "labels": "labels go into the loss's call, where it takes them: criterion(z0, z1, labels)",
}

Loss = TypeVar("Loss")


def undimix(
    loss: Loss, weighting: Weighting | None = None, *, last_layer: nn.Linear | None = None, **options: Any
) -> Loss:
    """A drop-in for a toolkit's loss, of the same class, with its negatives weighted.

    The result is a new object that shares the loss's model, memory bank and buffers; the loss itself is left as it was.
    A loss that is weighted already (by anything but `Uniform()`, which is the plain loss) is returned as it is, or with
    the new weighting if one is given; options change those that they name of the `UnDiMix` that it has.

    Args:
        loss: A loss object of a toolkit that has an adapter.
        weighting: How much each negative counts. Defaults to `UnDiMix(**options)`.
        last_layer: The Linear whose outputs the loss is given, for `UnDiMix(gradient="weight")`, which is then the
            default. Its inputs are remembered by a forward hook.
        options: Of `UnDiMix`, instead of a weighting; and settings that the loss takes beside a weighting, such as
            `exclude_duplicates=True` of sentence-transformers' losses.

    Returns:
        A loss with the same call, settings and class (`isinstance` holds).

    Raises:
        TypeError: For what is no contrastive loss that an adapter knows (the error lists those of its toolkit, and says
            how to weight one's own), something else than a `Weighting`, options of `UnDiMix` beside one, options that
            neither it nor the loss has, or a last layer that is no Linear.
        ValueError: For options that `UnDiMix` refuses, or settings of the loss that rule a weighting out.

    Examples:
        >>> from lightly.loss import NTXentLoss
        >>> criterion = undimix(NTXentLoss(temperature=0.5))
        >>> isinstance(criterion, NTXentLoss)
        True
        >>> loss = criterion(torch.randn(8, 32), torch.randn(8, 32))
    """
    if loss is None or isinstance(loss, type):
        came = "None" if loss is None else f"the class {loss.__name__}"
        raise TypeError(f"loss: expected a loss object such as NTXentLoss(), got {came}")
    settings = {name: value for name, value in options.items() if name not in OPTIONS}
    ours = {name: value for name, value in options.items() if name in OPTIONS}
    for name, why in ELSEWHERE.items():
        if name in settings:
            raise TypeError(f"options: {name} is no option of undimix(), got {name}={settings[name]!r}: {why}")
    if last_layer is not None:
        settings["last_layer"] = last_layer
        if weighting is None:
            ours.setdefault("gradient", "weight")
    weighting = chosen_weighting(weighting, ours, before=_weighting_in(loss) if ours else None)
    needs_last_layer = weighting is not None and weighting.needs_last_layer
    if needs_last_layer and last_layer is None and not _has_last_layer(loss):
        raise TypeError(
            "last_layer: expected the nn.Linear whose outputs the loss is given, which gradient='weight' needs, got "
            "None: undimix(loss, last_layer=linear)"
        )
    return cast(Loss, _adapter(loss).load()(loss, weighting, **settings))


def _weighted_losses(loss: object) -> list[WeightedLoss]:
    modules = loss.modules() if isinstance(loss, nn.Module) else ()
    return [module for module in modules if isinstance(module, WeightedLoss)]


def _weighting_in(loss: object) -> Weighting | None:
    """The full weighting of a loss that is weighted already, or has such a one inside."""
    return next((full_weighting(weighted) for weighted in _weighted_losses(loss)), None)


def _has_last_layer(loss: object) -> bool:
    return any(weighted.last_layer is not None for weighted in _weighted_losses(loss))


def _adapter(loss: object) -> EntryPoint:
    adapters = {adapter.name: adapter for adapter in entry_points(group=GROUP)}
    packages = [cls.__module__.partition(".")[0] for cls in type(loss).__mro__]
    for package in packages:
        if package in adapters:
            return adapters[package]
    name = type(loss).__name__
    if isinstance(loss, (dict, list, tuple)):
        raise TypeError(f"loss: expected one loss object, got a {name}: weight each loss in it")
    losses_of = ", ".join(sorted(adapters)) or "no toolkit (is undimix-plugins installed?)"
    came = f"{name}, {why_no_loss(loss)}" if why_no_loss(loss) else f"{name} of {packages[0]!r}"
    raise TypeError(
        f"loss: expected a contrastive loss that an adapter knows, of {losses_of}, got {came}. To weight a loss of "
        "your own, call info_nce(two_views(*unit_rows(z0=z0, z1=z1), temperature), UnDiMix()) of undimix_plugins in "
        "it. For another toolkit, register a function weighted(loss, weighting) under the entry-point group "
        f"{GROUP!r}, named for its import package"
    )
