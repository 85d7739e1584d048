"""`undimix(loss)` weights the negatives of a toolkit's loss.

The core imports no toolkit. A package registers its adapter, a function `weighted(loss, weighting)`, under the
entry-point group `undimix_plugins.adapters`. The entry point has the name of the toolkit's import package.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar, cast

from torch import nn

from undimix_plugins.weighted_loss import OPTIONS, WeightedLoss, chosen_weighting, full_weighting, why_no_loss
from undimix_plugins.weightings.weighting import Weighting

GROUP = "undimix_plugins.adapters"

# Options that belong elsewhere, and where to pass them.
ELSEWHERE = {
    "temperature": "it belongs to the loss, as in NTXentLoss(temperature=0.2); a ranking loss has scale=5 for that",
    "scale": "it belongs to the loss, as in MultipleNegativesRankingLoss(model, scale=5)",
    "logit_scale": "it goes into the loss's call",
    "beta": "it belongs to HCL, as in undimix(loss, HCL(beta=0.5, tau_plus=0))",
    "tau_plus": "it belongs to HCL or Debiased, as in undimix(loss, HCL(beta=0.5, tau_plus=0))",
    "alpha": "it belongs to SimilarityPenalty or HCL, as in undimix(loss, SimilarityPenalty(alpha=9.0))",
    "margin": "it belongs to PositiveAware, as in undimix(loss, PositiveAware(margin=0.05)), or to GISTEmbedLoss",
    "labels": "labels go into the loss's call, where it takes them: criterion(z0, z1, labels)",
}

Loss = TypeVar("Loss")


def undimix(
    loss: Loss, weighting: Weighting | None = None, *, last_layer: nn.Linear | None = None, **options: Any
) -> Loss:
    """Returns a drop-in replacement for a toolkit's loss that weights its negatives.

    The result is a new object of the same class. It shares the model, the memory bank and the buffers of `loss`.
    `loss` itself is not changed.

    If `loss` is weighted already, a new `weighting` replaces the old one, and options of `UnDiMix` change the `UnDiMix`
    that the loss has. With neither, the loss is returned unchanged. A loss weighted by `Uniform()` is treated as a
    plain loss.

    Args:
        loss: A loss object of a toolkit that has an adapter.
        weighting: How much each negative counts. Defaults to `UnDiMix(**options)`.
        last_layer: The `nn.Linear` whose outputs are passed to the loss. A forward hook records its inputs, which
            `UnDiMix(gradient="weight")` needs. If given, `gradient` defaults to "weight".
        options: Options of `UnDiMix`, to be used instead of `weighting`, and further settings of the loss, such as
            `exclude_duplicates=True` for the losses of sentence-transformers.

    Returns:
        A loss with the same call, settings and class (`isinstance` holds).

    Raises:
        TypeError: If no adapter supports `loss` (the message lists the supported losses of its toolkit and says how to
            weight your own loss), if `weighting` is not a `Weighting`, if options of `UnDiMix` are given together with
            `weighting`, if neither `UnDiMix` nor the loss has an option, or if `last_layer` is not an `nn.Linear`.
        ValueError: If `UnDiMix` does not accept the value of an option, or if a setting of the loss does not allow
            weights.

    Examples:
        >>> from lightly.loss import NTXentLoss
        >>> criterion = undimix(NTXentLoss(temperature=0.5))
        >>> isinstance(criterion, NTXentLoss)
        True
        >>> loss = criterion(torch.randn(8, 32), torch.randn(8, 32))
    """
    if loss is None or isinstance(loss, type):
        example, came = (
            ("NTXentLoss()", "None") if loss is None else (f"{loss.__name__}(...)", f"the class {loss.__name__}")
        )
        raise TypeError(f"loss: expected a loss object such as {example}, got {came}")
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
    weighted = _adapter(loss).load()(loss, weighting, **settings)
    needs_last_layer = weighting is not None and weighting.needs_last_layer
    if needs_last_layer and last_layer is None and not _has_last_layer(loss):
        for one in _weighted_losses(weighted):
            if one.no_last_layer:
                raise ValueError(f"gradient: expected 'embedding' {one.no_last_layer}, got 'weight'")
        raise TypeError(
            "last_layer: expected the nn.Linear whose outputs the loss is given, which gradient='weight' needs, got "
            "None: undimix(loss, last_layer=linear)"
        )
    return cast(Loss, weighted)


def _weighted_losses(loss: object) -> list[WeightedLoss]:
    modules = loss.modules() if isinstance(loss, nn.Module) else ()
    return [module for module in modules if isinstance(module, WeightedLoss)]


def _weighting_in(loss: object) -> Weighting | None:
    """Returns the full weighting of the first weighted loss in `loss`, which may be `loss` itself, or None."""
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
