"""The base class of the adapters' losses, and the conversion of a toolkit's loss object to such a class."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from undimix_plugins.checks import check_temperature
from undimix_plugins.last_layer import LastLayer, inputs_over_lengths
from undimix_plugins.weightings.undimix import UnDiMix
from undimix_plugins.weightings.weighting import Uniform, Weighting, check_weighting

OPTIONS = tuple(field.name for field in fields(UnDiMix))
WARMING_UP = "_full_and_softened"  # the attribute of a loss during a warm-up


class WeightedLoss(nn.Module):
    """Base class of the adapters' losses: a toolkit's loss (the host) with a weighting.

    Attributes:
        weighting: How much each negative counts.
        last_layer: The `LastLayer` that records the inputs of the layer whose outputs are passed to the loss, or None.
        settings: The further settings that `undimix()` accepts, with their defaults. Each is an attribute of the class.
        replaces: The methods of the host that the class overrides to compute the weighted loss.

    Examples:
        Subclass both `WeightedLoss` and the toolkit's loss. This loss takes two views:

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
        """Why the loss does not accept a last layer, as the end of the message "expected none ..."; empty if it does.

        Override it in a loss that cannot use the inputs of a last layer.
        """
        return ""

    def weigh(self, weighting: Weighting | None, **options: Any) -> None:
        """Sets the weighting, by default `UnDiMix(**options)`.

        It also checks the host's `temperature`, because hosts accept values that no weighting can use. Extend it in a
        subclass to check further settings of the host.

        Args:
            weighting: How much each negative counts. Defaults to `UnDiMix(**options)`.
            options: Options of `UnDiMix`, to be used instead of `weighting`.

        Raises:
            TypeError: If `weighting` is not a `Weighting`, if options are given together with it, or if `UnDiMix` does
                not have an option.
            ValueError: If `UnDiMix` does not accept the value of an option, or if the host's temperature is not a
                finite number of at least 1e-10.
        """
        of_self = vars(self)  # not a temperature that is computed from a scale
        if "temperature" in of_self and not isinstance(of_self["temperature"], Tensor):
            self.temperature = check_temperature("temperature", of_self["temperature"])
        chosen = chosen_weighting(weighting, options)
        self.weighting = UnDiMix() if chosen is None else chosen

    def set_options(self, **settings: Any) -> None:
        """Sets the last layer and the further settings of the class.

        Args:
            settings: `last_layer`, an `nn.Linear` or None, and any of the class's `settings`, by name.

        Raises:
            TypeError: If the class does not have a setting, if the last layer is not an `nn.Linear`, or if the
                weighting does not use one.
            ValueError: If the loss does not accept a last layer (`no_last_layer`).
        """
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
        """Returns the last layer's inputs for embeddings, as `LastLayerInputs` takes them.

        Args:
            embeddings: The embeddings that the loss received, each [rows, width].
            normalized: Whether the loss normalises the embeddings to length 1. The inputs are then divided by the
                lengths of the embeddings.

        Returns:
            For each tensor the inputs [rows, h], without gradient. None if no layer is set or the weighting does not
            use it.

        Raises:
            ValueError: If the embeddings are not the outputs of the layer.

        Examples:
            >>> class MyLoss(WeightedLoss):
            ...     weighting = UnDiMix(gradient="weight")
            >>> layer, loss = torch.nn.Linear(4, 2), MyLoss()
            >>> loss.set_options(last_layer=layer)
            >>> [inputs.shape for inputs in loss.inputs_of(layer(torch.randn(3, 4)))]
            [torch.Size([3, 4])]
        """
        if self.last_layer is None or not self.weighting.needs_last_layer:
            return None
        inputs = self.last_layer.inputs_of(*embeddings)
        return [inputs_over_lengths(*pair, normalized) for pair in zip(inputs, embeddings, strict=True)]

    def extra_repr(self) -> str:
        """Returns what the host shows, the weighting, and the settings that differ from their defaults."""
        others = [
            f"{name}={getattr(self, name)!r}" for name in self.settings if getattr(self, name) != self.settings[name]
        ]
        return ", ".join(filter(None, [super().extra_repr(), f"weighting={self.weighting}", *others]))


def full_weighting(loss: WeightedLoss) -> Weighting:
    """Returns the weighting that a loss has after its warm-up, or its present one if there is no warm-up.

    Examples:
        >>> class MyLoss(WeightedLoss):
        ...     weighting = UnDiMix(hardness=2.0)
        >>> loss = MyLoss()
        >>> set_hardness(loss, 0.25)
        >>> loss.weighting.hardness, full_weighting(loss).hardness
        (0.5, 2.0)
    """
    full, _ = vars(loss).get(WARMING_UP, (loss.weighting, None))
    return full  # type: ignore[no-any-return]


def chosen_weighting(
    weighting: Weighting | None, options: Mapping[str, Any], *, before: Weighting | None = None
) -> Weighting | None:
    """Returns `weighting`, or an `UnDiMix` with the given options.

    Args:
        weighting: The weighting that the user passed, or None.
        options: Options of `UnDiMix`, by name. Pass none together with `weighting`.
        before: The present weighting of the loss. If it is or contains an `UnDiMix`, the options change that one and
            keep its other options. None and `Uniform()` are replaced by a new `UnDiMix`.

    Returns:
        The weighting. None if neither `weighting` nor options are given.

    Raises:
        TypeError: If both `weighting` and options are given, if `weighting` is not a `Weighting`, if `UnDiMix` does not
            have an option, or if `before` contains no `UnDiMix`.
        ValueError: If `UnDiMix` does not accept the value of an option.

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
    """Converts a toolkit's loss object to its weighted class. Most adapters only call this function.

    The result shares the modules, parameters, buffers and hooks of `loss`.

    Args:
        loss: The toolkit's loss object. It is not changed.
        weighting: How much each negative counts. None means `UnDiMix()` for a plain loss, and the present weighting for
            a weighted loss.
        classes: Maps each supported loss class of the toolkit to its weighted subclass.
        settings: Further settings of the weighted class, and `last_layer`.

    Returns:
        A new object of the weighted class. `loss` itself if it is weighted already, other than by `Uniform()`, and
        neither a weighting nor settings are given.

    Raises:
        TypeError: If the class of `loss` is not in `classes` and inherits from none of them, if it overrides a method
            that the weighted class replaces, or as `WeightedLoss.weigh` and `WeightedLoss.set_options` do.
        ValueError: As `WeightedLoss.weigh` and `WeightedLoss.set_options` do.

    Examples:
        >>> class MyHostLoss(torch.nn.Module):
        ...     def forward(self, a, b):
        ...         return info_nce(two_views(a, b, 0.5), Uniform())
        >>> class MyLoss(WeightedLoss, MyHostLoss):
        ...     def forward(self, a, b):
        ...         return info_nce(two_views(a, b, 0.5), self.weighting)
        >>> isinstance(reweight(MyHostLoss(), UnDiMix(), {MyHostLoss: MyLoss}), MyHostLoss)
        True
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
    new = _copy(loss, weighted)
    new.__dict__.pop(WARMING_UP, None)
    for name, default in cast(WeightedLoss, new).settings.items():
        new.__dict__.setdefault(name, default)
    cast(WeightedLoss, new).weigh(weighting)
    cast(WeightedLoss, new).set_options(**settings)
    return new


def _copy(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """Returns a copy of a class, which shares modules, parameters, buffers and hooks."""
    new = cls.__new__(cls)
    tables = set(vars(nn.Module()))  # each object needs its own
    new.__dict__.update({k: v.copy() if k in tables and hasattr(v, "copy") else v for k, v in vars(module).items()})
    new.__dict__["_compiled_call_impl"] = None  # that of a compiled module would still call the module
    return new


def with_parts(module: nn.Module, **parts: nn.Module) -> nn.Module:
    """Returns a copy of a module with other submodules, for a toolkit's loss that holds other losses.

    Args:
        module: The module. It is not changed.
        parts: The new submodules, by name.

    Returns:
        A module of the same class. It shares parameters, buffers, hooks and all other submodules.

    Examples:
        >>> with_parts(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(2, 1)), **{"0": torch.nn.Tanh()})
        Sequential(
          (0): Tanh()
          (1): Linear(in_features=2, out_features=1, bias=True)
        )
    """
    new = _copy(module, type(module))
    new._modules.update(parts)
    return new


class Around(nn.Module):
    """What `around` adds to the class of a toolkit's loss that holds another one: settings reach the one inside."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._modules["loss"], name) if self._is_of_inside(name) else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_of_inside(name):
            setattr(self._modules["loss"], name, value)
        else:
            super().__setattr__(name, value)

    def _is_of_inside(self, name: str) -> bool:
        inner = vars(self).get("_modules", {}).get("loss")  # none yet in one that is unpickled
        return name in ("weighting", "last_layer", "settings") or name in getattr(inner, "settings", ())


def around(loss: nn.Module, inner: nn.Module) -> nn.Module:
    """Returns a toolkit's loss with another loss inside, the attribute `loss`, for an adapter of such losses.

    Args:
        loss: The outer loss. It is not changed.
        inner: The weighted loss to put into it.

    Returns:
        A loss with the class's name, modules and buffers of `loss`. Its `weighting` and settings are those of `inner`:
        what you set on it reaches `inner`. `loss` itself if it is such a loss of `inner` already.

    Examples:
        >>> class Twice(torch.nn.Module):
        ...     def __init__(self, loss):
        ...         super().__init__()
        ...         self.loss = loss
        >>> class MyLoss(WeightedLoss):
        ...     weighting = UnDiMix()
        >>> outer = around(Twice(MyLoss()), MyLoss())
        >>> outer.weighting = HCL(beta=0.5, tau_plus=0)
        >>> outer.loss.weighting
        HCL(beta=0.5, tau_plus=0)
    """
    if isinstance(loss, Around) and inner is loss.loss:
        return loss
    wrapper = with_parts(loss, loss=inner)
    if not isinstance(loss, Around):
        wrapper.__class__ = joined_class(Around, type(loss))  # type: ignore[arg-type]
    return wrapper


def why_no_loss(loss: object) -> str:
    """Returns why an object is probably not a contrastive loss, to follow its name in a message.

    Args:
        loss: Any object.

    Returns:
        The reason and what to do, or an empty string if it may be a contrastive loss.

    Examples:
        >>> why_no_loss(torch.nn.CrossEntropyLoss())
        'which compares no anchor with negatives'
    """
    if _looks_like_a_model(loss):
        return "which looks like a model: weight the loss that trains it"
    return "which compares no anchor with negatives" if type(loss).__module__.startswith("torch.nn.") else ""


def _looks_like_a_model(loss: object) -> bool:
    named_a_loss = any("loss" in base.__name__.lower() for base in type(loss).__mro__)
    return isinstance(loss, nn.Module) and not named_a_loss and len(list(loss.parameters())) > 1  # one: a temperature


def _supported(classes: Iterable[type[nn.Module]]) -> str:
    """Returns the names of the supported losses, by toolkit."""
    names: dict[str, set[str]] = {}
    for host in classes:
        names.setdefault(host.__module__.partition(".")[0], set()).add(host.__name__)
    return "; ".join(f"{toolkit}: {', '.join(sorted(names[toolkit]))}" for toolkit in sorted(names))


def _weighted_class(loss: nn.Module, classes: Mapping[type[nn.Module], type[WeightedLoss]]) -> type[nn.Module]:
    cls = type(loss)
    supported = _supported(classes)
    host = next((base for base in cls.__mro__ if base in classes), None)
    if host is None:
        wraps = isinstance(getattr(loss, "loss", None), tuple(classes))
        hint = f". Weight the loss inside it: {cls.__name__}(..., undimix(loss), ...)" if wraps else ""
        if _looks_like_a_model(loss):
            raise TypeError(
                f"loss: {cls.__name__} looks like a model, not a loss: weight the loss that trains "
                f"it{_how_to_weight_inside(loss, classes)}; supported: {supported}"
            )
        looks = f", {why_no_loss(loss)}" if why_no_loss(loss) else ""
        raise TypeError(
            f"loss: {cls.__name__} has no negatives to weight or is not supported{looks}; supported: {supported}{hint}"
        )
    ours = classes[host]
    for name in ours.replaces:
        of_host, of_cls = (getattr(one, name, None) for one in (host, cls))  # None: the method is newer than the host
        if name in vars(loss) or of_cls is not of_host:
            raise TypeError(
                f"loss: {cls.__name__} replaces {host.__name__}.{name} by its own, which would be lost; "
                f"supported: {supported}, and subclasses that inherit {name} unchanged"
            )
    return ours if cls is host else joined_class(ours, cls)  # type: ignore[arg-type]  # classes do hash


def _how_to_weight_inside(model: nn.Module, classes: Mapping[type[nn.Module], type[WeightedLoss]]) -> str:
    """Returns the assignments that weight the losses inside a model, to follow a message; none if it has none."""
    names = [
        re.sub(r"\.(\d+)", r"[\1]", f"model.{name}")
        for name, part in model.named_modules()
        if isinstance(part, tuple(classes)) and not isinstance(part, WeightedLoss)
    ]
    return "".join(f", {name} = undimix({name})" for name in names)


@cache
def joined_class(ours: type[nn.Module], theirs: type[nn.Module]) -> type[nn.Module]:
    """Returns a class that inherits from both, for a user's own subclass of a toolkit's loss.

    Args:
        ours: The weighted class of the toolkit's loss.
        theirs: The user's subclass of the toolkit's loss. It must not override what `ours` replaces.

    Returns:
        A class with the name, module and docstring of `theirs`. Its objects can be pickled.

    Examples:
        >>> class MyHostLoss(torch.nn.Module):
        ...     pass
        >>> class MyLoss(WeightedLoss, MyHostLoss):
        ...     pass
        >>> class UsersLoss(MyHostLoss):
        ...     pass
        >>> joined = joined_class(MyLoss, UsersLoss)
        >>> joined.__name__, issubclass(joined, MyLoss), issubclass(joined, UsersLoss)
        ('UsersLoss', True, True)
    """

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # pickle cannot import a class that is made here: it is made again from its two bases.
        return _blank, (ours, theirs), self.__getstate__()  # type: ignore[no-untyped-call]

    namespace = {"__module__": theirs.__module__, "__doc__": theirs.__doc__, "__reduce_ex__": reduce}
    return type(theirs.__name__, (ours, theirs), namespace)


def _blank(ours: type[nn.Module], theirs: type[nn.Module]) -> nn.Module:
    cls = joined_class(ours, theirs)  # type: ignore[arg-type]  # classes do hash
    return cls.__new__(cls)


def release(text: str) -> tuple[int, ...]:
    """Returns the numbers of a release, to be compared.

    Args:
        text: A version, as `importlib.metadata.version` returns it.

    Returns:
        Its first three numbers.

    Examples:
        >>> release("2.14.1+cpu")
        (2, 14, 1)
        >>> release("2.6.0") < (2, 10)
        True
    """
    return tuple(map(int, re.findall(r"\d+", text)[:3]))


def require(toolkit: str, extra: str) -> None:
    """Raises an ImportError that names the extra to install if a toolkit's import package is missing.

    Args:
        toolkit: The import package, such as "torch_geometric".
        extra: The extra of undimix-plugins that installs it, such as "pyg".

    Raises:
        ImportError: If the package is not installed.

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
