"""What every adapter's losses share, and how a host's loss object becomes one of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from undimix_plugins.checks import check_temperature
from undimix_plugins.last_layer import LastLayer, inputs_over_lengths
from undimix_plugins.weightings.undimix import UnDiMix
from undimix_plugins.weightings.weighting import Uniform, Weighting, check_weighting

OPTIONS = tuple(field.name for field in fields(UnDiMix))
WARMING_UP = "_full_and_softened"  # the attribute of a loss on its way to its full weighting


class WeightedLoss(nn.Module):
    """What the adapters' losses share: a weighting beside the host's settings.

    Attributes:
        weighting: How much each negative counts.
        last_layer: What remembers the inputs of the layer whose outputs the loss is given; None without such a layer.
        settings: What `undimix()` can set beside the weighting, each an attribute of the class, and its default.
        replaces: The host's methods that work out the loss, which the class has its own of.

    Examples:
        A toolkit's loss gets a subclass of both, here of a loss that takes two views:

        >>> class MyHostLoss(torch.nn.Module):
        ...     def forward(self, a, b):
        ...         return info_nce(two_views(a, b, 0.5), Uniform())
        >>> class MyLoss(WeightedLoss, MyHostLoss):
        ...     def forward(self, a, b):
        ...         return info_nce(two_views(a, b, 0.5), self.weighting)
        >>> reweight(MyHostLoss(), HCL(beta=0.5, tau_plus=0), {MyHostLoss: MyLoss})
        MyLoss(weighting=HCL(beta=0.5, tau_plus=0))
    """

    weighting: Weighting
    last_layer: LastLayer | None = None
    settings: ClassVar[Mapping[str, Any]] = {}
    replaces: ClassVar[tuple[str, ...]] = ("forward",)

    @property
    def no_last_layer(self) -> str:
        """Why `undimix(loss, last_layer=...)` is refused, to follow "expected none"; empty where it is taken."""
        return ""

    def weigh(self, weighting: Weighting | None, **options: Any) -> None:
        """Sets the weighting, by default `UnDiMix(**options)`; a class extends it to check that its settings fit.

        A host's `temperature` is checked here: hosts take some that no weighting can work with.
        """
        of_self = vars(self)  # not a temperature that is worked out of a scale
        if "temperature" in of_self and not isinstance(of_self["temperature"], Tensor):
            self.temperature = check_temperature("temperature", of_self["temperature"])
        chosen = chosen_weighting(weighting, options)
        self.weighting = UnDiMix() if chosen is None else chosen

    def set_options(self, **settings: Any) -> None:
        """Sets what the class takes beside the weighting; a TypeError for what it does not."""
        if "last_layer" in settings:
            layer = settings.pop("last_layer")
            if layer is not None and self.no_last_layer:
                raise ValueError(f"last_layer: expected none {self.no_last_layer}; use gradient='embedding'")
            self.last_layer = None if layer is None else LastLayer(layer)
            if self.last_layer is not None and not self.weighting.needs_last_layer:
                raise TypeError(
                    f"last_layer: expected a weighting with gradient='weight', which uses it, got {self.weighting}"
                )
        unknown = ", ".join(name for name in settings if name not in self.settings)
        if unknown:
            known = ", ".join([*OPTIONS, "last_layer", *self.settings])
            raise TypeError(f"options: expected {known} for {type(self).__name__}, got {unknown}")
        for name, value in settings.items():
            setattr(self, name, value)

    def inputs_of(self, *embeddings: Tensor, normalized: bool = True) -> list[Tensor] | None:
        """The last layer's inputs behind embeddings, as a `Contrast` takes them; None where no layer is remembered.

        Args:
            embeddings: As the loss got them, each [rows, width].
            normalized: Whether the loss brings them to length 1.

        Returns:
            For each its inputs [rows, h], without gradient. None also where the weighting does not use them.

        Raises:
            ValueError: Where the embeddings are not the layer's outputs.
        """
        if self.last_layer is None or not self.weighting.needs_last_layer:
            return None
        inputs = self.last_layer.inputs_of(*embeddings)
        return [inputs_over_lengths(*pair, normalized) for pair in zip(inputs, embeddings, strict=True)]

    def extra_repr(self) -> str:
        """The weighting, beside what the host shows, and settings other than their defaults."""
        others = [
            f"{name}={getattr(self, name)!r}" for name in self.settings if getattr(self, name) != self.settings[name]
        ]
        return ", ".join(filter(None, [super().extra_repr(), f"weighting={self.weighting}", *others]))


def full_weighting(loss: WeightedLoss) -> Weighting:
    """What a loss on its way through a warm-up comes to."""
    full, _ = vars(loss).get(WARMING_UP, (loss.weighting, None))
    return full  # type: ignore[no-any-return]


def chosen_weighting(
    weighting: Weighting | None, options: Mapping[str, Any], *, before: Weighting | None = None
) -> Weighting | None:
    """The weighting, or `UnDiMix` with these options of it; None for neither.

    Args:
        weighting: What was given as one.
        options: Of `UnDiMix`, by name.
        before: What a loss had before: options change an `UnDiMix` in it and leave its others as they are. `Uniform()`
            is as good as none.

    Raises:
        TypeError: For both, for what is no weighting, for options that `UnDiMix` does not have, or that nothing in
            `before` has.

    Examples:
        >>> chosen_weighting(None, {"hardness": 2.0}, before=UnDiMix(influence=0.0)).influence
        0.0
    """
    if weighting is not None:
        check_weighting(weighting)
        if options:
            raise TypeError(
                f"options: expected none of UnDiMix beside a weighting, got {', '.join(options)} beside {weighting}; "
                "set them where it is made"
            )
        return weighting
    if unknown := [name for name in options if name not in OPTIONS]:
        raise TypeError(f"options: expected some of UnDiMix's ({', '.join(OPTIONS)}), got {', '.join(unknown)}")
    if not options:
        return None
    if before is None or before == Uniform():
        return UnDiMix(**options)
    changed = before._with_options(**options)
    if changed is None:
        raise TypeError(
            f"options: expected none of UnDiMix for a loss that is weighted by {before}, got {', '.join(options)}; for "
            "UnDiMix in its place, undimix(loss, UnDiMix(...))"
        )
    return changed


def reweight(
    loss: nn.Module,
    weighting: Weighting | None,
    classes: Mapping[type[nn.Module], type[WeightedLoss]],
    **settings: Any,
) -> nn.Module:
    """What an adapter does: gives a host's loss object our class for its class, and the weighting.

    Args:
        loss: The host's loss object; it is not changed.
        weighting: How much each negative counts; None for `UnDiMix()`.
        classes: The host's losses that are supported, each with our subclass of it.
        settings: What the class takes beside the weighting.

    Returns:
        `loss` itself where it is weighted already, other than by `Uniform()`, and nothing is to be set; otherwise a
        new object.

    Raises:
        TypeError: For a loss that is none of these, or that works out its loss by code of its own.

    Examples:
        `WeightedLoss` has one.
    """
    if isinstance(loss, WeightedLoss):
        full = full_weighting(loss)
        if weighting is None and full != Uniform():
            if not settings and full is loss.weighting:
                return loss
            weighting = full
        weighted: type[nn.Module] = type(loss)
    else:
        weighted = _weighted_class(loss, classes)
    new = weighted.__new__(weighted)
    # Modules, parameters, buffers and hooks stay shared, but each object needs dictionaries of its own.
    tables = set(vars(nn.Module()))
    new.__dict__.update({k: v.copy() if k in tables and hasattr(v, "copy") else v for k, v in vars(loss).items()})
    new.__dict__.pop(WARMING_UP, None)
    new.__dict__["_compiled_call_impl"] = None  # a compiled host's would still call the host
    for name, default in cast(WeightedLoss, new).settings.items():
        new.__dict__.setdefault(name, default)
    cast(WeightedLoss, new).weigh(weighting)
    cast(WeightedLoss, new).set_options(**settings)
    return new


def why_no_loss(loss: object) -> str:
    """What stands for a loss by its looks, and what to do; empty where it may be one."""
    cls = type(loss)
    named_so = any("loss" in base.__name__.lower() for base in cls.__mro__)
    if isinstance(loss, nn.Module) and not named_so and len(list(loss.parameters())) > 1:  # one may be a temperature
        return "which looks like a model: weight the loss that trains it"
    return "which compares no anchor with negatives" if cls.__module__.startswith("torch.nn.") else ""


def _weighted_class(loss: nn.Module, classes: Mapping[type[nn.Module], type[WeightedLoss]]) -> type[nn.Module]:
    cls = type(loss)
    supported = ", ".join(sorted({f"{host.__module__.partition('.')[0]}'s {host.__name__}" for host in classes}))
    host = next((base for base in cls.__mro__ if base in classes), None)
    if host is None:
        wraps = isinstance(getattr(loss, "loss", None), tuple(classes))
        hint = f". Weight the loss inside it: {cls.__name__}(..., undimix(loss), ...)" if wraps else ""
        looks = f", {why_no_loss(loss)}" if why_no_loss(loss) else ""
        raise TypeError(
            f"loss: {cls.__name__} has no negatives to weight or is not supported{looks}; supported: {supported}{hint}"
        )
    ours = classes[host]
    for name in ours.replaces:
        if name in vars(loss) or getattr(cls, name) is not getattr(host, name):
            raise TypeError(
                f"loss: {cls.__name__} replaces {host.__name__}.{name} by its own, which would be lost; "
                f"supported: {supported}, and subclasses that inherit {name} unchanged"
            )
    return ours if cls is host else joined_class(ours, cls)  # type: ignore[arg-type]  # classes do hash


@cache
def joined_class(ours: type[WeightedLoss], theirs: type[nn.Module]) -> type[nn.Module]:
    """A class that is both, for a user's own subclass of a host's loss."""

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # A class made here has no name that pickle could import: it is made again from its two bases.
        return _blank, (ours, theirs), self.__getstate__()  # type: ignore[no-untyped-call]

    namespace = {"__module__": theirs.__module__, "__doc__": theirs.__doc__, "__reduce_ex__": reduce}
    return type(theirs.__name__, (ours, theirs), namespace)


def _blank(ours: type[WeightedLoss], theirs: type[nn.Module]) -> nn.Module:
    cls = joined_class(ours, theirs)  # type: ignore[arg-type]  # classes do hash
    return cls.__new__(cls)


def require(toolkit: str, extra: str) -> None:
    """Raises an ImportError that says which extra to install, where a toolkit's import package is missing.

    Examples:
        >>> require("torch", extra="lightly")
        >>> require("no_such_toolkit", extra="lightly")
        Traceback (most recent call last):
        ImportError: this adapter needs no_such_toolkit, which is not installed: pip install 'undimix-plugins[lightly]'
    """
    if importlib.util.find_spec(toolkit) is None:
        raise ImportError(
            f"this adapter needs {toolkit}, which is not installed: pip install 'undimix-plugins[{extra}]'"
        )
