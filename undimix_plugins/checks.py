"""Input checks. Each error message names the argument, what was expected and what was passed.

Shapes, dtypes and devices are always checked. Values (finite rows, columns in range) are only checked on the CPU, since
the host would have to wait for any other device. There, a non-finite embedding gives a loss of NaN.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor

LEAST_TEMPERATURE = 1e-10  # float32 cannot represent smaller differences of cosines
LARGEST = 1e30  # largest factor: products with larger ones could overflow float32
WARM = 2.0  # the temperature above which all candidates count nearly the same
INTEGERS = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

LOOKED: set[str] = set()  # warnings for which a device's values have been read once


def may_look(tensor: Tensor, what: str) -> bool:
    """Whether to read a tensor's values for a warning: always on the CPU, on other devices only the first time.

    Args:
        tensor: The tensor to read.
        what: The name of the warning.

    Examples:
        >>> may_look(torch.zeros(3), "debiasing")
        True
    """
    if values_are_free(tensor):
        return True
    if torch.compiler.is_compiling() or what in LOOKED:
        return False
    LOOKED.add(what)
    return True


def values_are_free(tensor: Tensor) -> bool:
    """Whether reading a tensor's values costs no device-host synchronisation and no graph break.

    Args:
        tensor: The tensor to read.

    Returns:
        True for a tensor on the CPU, unless `torch.compile` traces the call.

    Examples:
        >>> values_are_free(torch.zeros(3))
        True
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def largest_product(dtype: torch.dtype) -> float:
    """Returns the largest row length and logit that are accepted, so that sums of their squares do not overflow.

    Examples:
        >>> largest_product(torch.float32)
        1000000000000000.0
    """
    return 1e150 if dtype == torch.float64 else 1e15


def length_of_all(rows: Tensor) -> float:
    """Returns the length of all rows as one vector, computed in full precision.

    Examples:
        >>> length_of_all(torch.tensor([[3.0], [4.0]]))
        5.0
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return float(torch.linalg.vector_norm(rows.detach(), dtype=dtype))


def check_embeddings(**embeddings: Tensor) -> None:
    """Checks that tensors are matrices of finite floats with the same width, dtype and device.

    Args:
        embeddings: One or more tensors [rows, width]. Pass each by name; error messages use the names.

    Raises:
        ValueError: If a tensor does not have two dimensions, is empty, is sparse, nested or on the meta device, if its
            dtype is not float16, bfloat16, float32 or float64, or if widths, dtypes or devices differ. On the CPU also
            if a value is not finite, or if a row is longer than 1e15 (1e150 in float64): its inner products could
            overflow.

    Examples:
        >>> check_embeddings(out0=torch.zeros(4, 8), out1=torch.zeros(4, 9))
        Traceback (most recent call last):
        ValueError: out1: expected width 8, as out0 has, got shape [4, 9]
    """
    check_lengths(embeddings, check_finite(**embeddings))


def check_kinds(**embeddings: Tensor) -> None:
    """Checks like `check_embeddings`, but reads no values.

    Args:
        embeddings: One or more tensors [rows, width]. Pass each by name; error messages use the names.

    Raises:
        ValueError: As `check_embeddings` does, except for values.

    Examples:
        >>> check_kinds(z0=torch.zeros(4, 8), z1=torch.zeros(4, 8, dtype=torch.float64))
        Traceback (most recent call last):
        ValueError: z1: expected torch.float32, as z0 has, got torch.float64
    """
    first_name, first = next(iter(embeddings.items()))
    for name, rows in embeddings.items():
        if not isinstance(rows, Tensor):
            raise ValueError(f"{name}: expected a tensor of shape [rows, width], got {type(rows).__name__}")
        if rows.is_nested or rows.layout != torch.strided:
            layout = "a nested tensor" if rows.is_nested else str(rows.layout)
            raise ValueError(f"{name}: expected a dense tensor of shape [rows, width], got {layout}")
        if rows.dim() != 2:
            raise ValueError(f"{name}: expected a tensor of shape [rows, width], got shape {list(rows.shape)}")
        if rows.numel() == 0:
            raise ValueError(f"{name}: expected at least one row and one column, got shape {list(rows.shape)}")
        if rows.dtype not in FLOATS:
            few = ", which has fewer than 16 bits" if rows.is_floating_point() else ""
            raise ValueError(f"{name}: expected floating-point embeddings, got {rows.dtype}{few}")
        if rows.shape[1] != first.shape[1]:
            raise ValueError(
                f"{name}: expected width {first.shape[1]}, as {first_name} has, got shape {list(rows.shape)}"
            )
        if rows.dtype != first.dtype:
            raise ValueError(f"{name}: expected {first.dtype}, as {first_name} has, got {rows.dtype}")
        if rows.device != first.device:
            raise ValueError(f"{name}: expected device {first.device}, as {first_name} has, got {rows.device}")
        if rows.device.type == "meta" and not torch.compiler.is_compiling():
            raise ValueError(f"{name}: expected embeddings on a device that holds values, got meta")


def check_finite(**embeddings: Tensor) -> dict[str, float]:
    """Checks like `check_embeddings`, but allows rows of any length.

    Args:
        embeddings: One or more tensors [rows, width]. Pass each by name; error messages use the names.

    Returns:
        By name, the length of each tensor as one vector, infinite if it overflows. Empty for tensors on devices other
        than the CPU.

    Raises:
        ValueError: As `check_embeddings` does, except for long rows.

    Examples:
        >>> check_finite(z=torch.tensor([[3.0, 4.0]]))
        {'z': 5.0}
    """
    check_kinds(**embeddings)
    lengths = {}
    for name, rows in embeddings.items():
        if values_are_free(rows):
            lengths[name] = length_of_all(rows)  # not finite if a value is not finite, or if the length overflows
            if not math.isfinite(lengths[name]):
                finite = rows.isfinite().all(dim=1)
                if not finite.all():
                    row = int((~finite).nonzero()[0, 0])
                    raise ValueError(f"{name}: expected finite embeddings, got a non-finite value in row {row}")
    return lengths


def check_lengths(embeddings: Mapping[str, Tensor], lengths: Mapping[str, float]) -> None:
    """Checks that no row is so long that its inner products could overflow.

    Args:
        embeddings: Tensors [rows, width], by name.
        lengths: What `check_finite` returned for them.

    Raises:
        ValueError: If a row is longer than 1e15 (1e150 in float64).

    Examples:
        >>> rows = torch.ones(4, 8)
        >>> check_lengths({"z": rows}, check_finite(z=rows))
    """
    for name, length in lengths.items():
        most = largest_product(embeddings[name].dtype)
        if length <= most:
            continue
        rows = embeddings[name].detach().double()
        largest = rows.abs().amax()  # whose square may overflow
        of_rows = torch.linalg.vector_norm(rows / largest, dim=1)
        longest = float(of_rows.max()) * float(largest)
        if longest > most:
            raise ValueError(
                f"{name}: expected embeddings of a length up to {most:.0e}, whose inner products do not overflow (has "
                f"training diverged?), got {longest:.0e} in row {int(of_rows.argmax())}"
            )


def check_columns(name: str, columns: Tensor, *, shape: tuple[int | None, ...], pool: Tensor) -> Tensor:
    """Checks columns of the pool, padded with -1, and returns them as int64.

    Args:
        name: The name of the argument, for error messages.
        columns: A tensor of any integer dtype.
        shape: The expected shape. None in it allows any length of that dimension.
        pool: The candidates [m, d].

    Returns:
        The columns, same shape, int64.

    Raises:
        ValueError: If `columns` is not an integer tensor of this shape on the pool's device, or (on the CPU) if a
            column is not from -1 to m - 1.

    Examples:
        >>> columns = check_columns("own_columns", torch.tensor([0, 7]), shape=(2,), pool=torch.zeros(3, 4))
        Traceback (most recent call last):
        ValueError: own_columns: expected columns from -1 (none) to 2, got 0 to 7
    """
    if not isinstance(columns, Tensor):
        raise ValueError(f"{name}: expected a tensor of integers, got {type(columns).__name__}")
    if columns.dim() != len(shape) or any(a not in (None, b) for a, b in zip(shape, columns.shape, strict=True)):
        expected = ", ".join("k" if length is None else str(length) for length in shape)
        raise ValueError(f"{name}: expected shape [{expected}], got {list(columns.shape)}")
    if columns.dtype not in INTEGERS or columns.layout != torch.strided:
        layout = "" if columns.layout == torch.strided else f", {columns.layout}"
        raise ValueError(f"{name}: expected integer columns of the pool, got {columns.dtype}{layout}")
    if columns.device != pool.device:
        raise ValueError(f"{name}: expected device {pool.device}, as the pool has, got {columns.device}")
    padding = -1 if columns.dtype.is_signed else 0  # a large uint64 would become one of -1
    columns = columns.long()
    if values_are_free(columns) and columns.numel():
        least, most = int(columns.min()), int(columns.max())
        if least < padding or most >= len(pool):
            raise ValueError(f"{name}: expected columns from -1 (none) to {len(pool) - 1}, got {least} to {most}")
    return columns


def check_same_length(**tensors: Tensor) -> None:
    """Checks that tensors have the same number of rows.

    Args:
        tensors: One or more tensors [rows, ...]. Pass each by name; error messages use the names.

    Raises:
        ValueError: If a tensor has another number of rows than the first.

    Examples:
        >>> check_same_length(z0=torch.zeros(4, 8), z1=torch.zeros(3, 8))
        Traceback (most recent call last):
        ValueError: z1: expected 4 rows, as z0 has, got 3
    """
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if len(tensor) != len(first):
            raise ValueError(f"{name}: expected {len(first)} rows, as {first_name} has, got {len(tensor)}")


def check_labels(labels: Tensor | None, rows: Tensor, of: str) -> None:
    """Checks that there is an integer label for each row, or that there are no labels.

    Args:
        labels: Labels [rows], of an integer or bool dtype, on the device of `rows`, or None.
        rows: Embeddings [rows, ...].
        of: What a row is, such as "sample", for error messages.

    Raises:
        ValueError: If the labels have another shape, device or kind of dtype.

    Examples:
        >>> check_labels(torch.zeros(3), torch.zeros(3, 8), of="sample")
        Traceback (most recent call last):
        ValueError: labels: expected integers, got torch.float32
    """
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.shape != rows.shape[:1]:
        came = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels: expected one for each {of}, of shape [{len(rows)}], got {came}")
    if labels.device != rows.device:
        raise ValueError(f"labels: expected device {rows.device}, as the embeddings have, got {labels.device}")
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels: expected integers, got {labels.dtype}")


def check_inputs(anchors: Tensor, pool: Tensor, anchor_inputs: Tensor | None, pool_inputs: Tensor | None) -> None:
    """Checks the inputs of the last layer.

    Args:
        anchors: Embeddings [n, d].
        pool: The candidates [m, d].
        anchor_inputs: The inputs of the last layer [n, h] that gave the anchors, or None.
        pool_inputs: The inputs of the last layer [m, h] that gave the pool, or None.

    Raises:
        ValueError: If only one of the inputs is given, if they do not have a row for each anchor and candidate, if they
            are on another device, or as `check_embeddings` does.

    Examples:
        >>> check_inputs(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, 6), torch.zeros(2, 6))
        Traceback (most recent call last):
        ValueError: pool_inputs: expected 3 rows, as pool has, got 2
    """
    if anchor_inputs is None and pool_inputs is None:
        return
    if anchor_inputs is None or pool_inputs is None:
        missing = "anchor_inputs" if anchor_inputs is None else "pool_inputs"
        raise ValueError(f"{missing}: expected the last layer's inputs for anchors and pool both, got None")
    check_embeddings(anchor_inputs=anchor_inputs, pool_inputs=pool_inputs)
    if anchor_inputs.device != anchors.device:
        raise ValueError(f"anchor_inputs: expected device {anchors.device}, as anchors has, got {anchor_inputs.device}")
    check_same_length(anchors=anchors, anchor_inputs=anchor_inputs)
    check_same_length(pool=pool, pool_inputs=pool_inputs)


def check_that_logits_fit(
    rows: Mapping[str, Tensor], lengths: Mapping[str, float], temperature: float | Tensor
) -> None:
    """Checks that logits cannot overflow.

    Args:
        rows: Anchors, positives and pool, by name, each [rows, width].
        lengths: What `check_finite` returned for them.
        temperature: The temperature, a number or a scalar tensor.

    Raises:
        ValueError: If a logit could exceed 1e15 (1e150 in float64).

    Examples:
        >>> rows = {name: torch.ones(2, 4) for name in ("anchors", "positives", "pool")}
        >>> check_that_logits_fit(rows, check_finite(**rows), temperature=0.05)
    """
    held = temperature.detach() if isinstance(temperature, Tensor) else temperature
    bound = largest_product(torch.promote_types(rows["pool"].dtype, torch.float32))
    others = [name for name in lengths if name != "anchors"]
    if lengths["anchors"] * max(lengths[name] for name in others) <= bound * float(held):
        return
    of = {name: rows[name].detach().norm(dim=1, dtype=torch.float64).max().item() for name in lengths}
    other = max(others, key=of.__getitem__)
    if of["anchors"] * of[other] > bound * float(held):
        raise ValueError(
            f"temperature: expected similarities over it up to {bound:.0e}, got {temperature!r} with anchors of "
            f"length {of['anchors']:.2g} and {other} of length {of[other]:.2g}"
        )


def check_scalar_temperature(temperature: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Checks a temperature, and returns it as a float or as a scalar tensor in full precision.

    Args:
        temperature: A number, or a floating-point tensor with one element.
        dtype: The dtype of the embeddings.

    Returns:
        A float for a number. For a tensor a scalar, in float32 if `dtype` is half precision, otherwise in `dtype`.

    Raises:
        ValueError: If the temperature is not a finite number above 0, or not a floating-point tensor with one element.
            The value of a tensor is only checked on the CPU.

    Examples:
        >>> check_scalar_temperature(torch.tensor([0.5]), torch.float32)
        tensor(0.5000)
    """
    if not isinstance(temperature, Tensor):
        return check_number("temperature", temperature, above=0)
    if temperature.numel() != 1 or temperature.dtype not in FLOATS or temperature.layout != torch.strided:
        layout = "" if temperature.layout == torch.strided else f", {temperature.layout}"
        came = f"{temperature.dtype} {list(temperature.shape)}{layout}"
        raise ValueError(f"temperature: expected one floating-point number, got {came}")
    if temperature.device.type == "meta" and not torch.compiler.is_compiling():
        raise ValueError("temperature: expected a number on a device that holds values, got meta")
    if values_are_free(temperature):
        check_number("temperature", float(temperature.detach()), above=0)
    return temperature.reshape(()).to(torch.promote_types(dtype, torch.float32))


def check_anchor_weights(weights: Tensor, anchors: Tensor) -> Tensor:
    """Checks weights of anchors, and returns them in the anchors' dtype, without gradient.

    Args:
        weights: A weight for each anchor [n], a real dtype.
        anchors: Embeddings [n, d].

    Returns:
        The weights [n].

    Raises:
        ValueError: If the weights have another shape or device, if they are complex or sparse, or (on the CPU) if one
            is not from 0 to 1e30.

    Examples:
        >>> check_anchor_weights(torch.tensor([1, 2]), torch.zeros(2, 4))
        tensor([1., 2.])
    """
    if not isinstance(weights, Tensor) or weights.shape != anchors.shape[:1]:
        came = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"anchor_weights: expected a tensor of shape [{len(anchors)}], got {came}")
    if weights.is_complex() or weights.layout != torch.strided:
        raise ValueError(f"anchor_weights: expected real numbers, got {weights.dtype}, {weights.layout}")
    if weights.device != anchors.device:
        raise ValueError(f"anchor_weights: expected device {anchors.device}, as anchors has, got {weights.device}")
    if values_are_free(weights) and not bool(((weights >= 0) & (weights <= 1e30)).all()):
        raise ValueError(
            f"anchor_weights: expected finite numbers of at least 0 and at most 1e+30, got {weights.min():g} to "
            f"{weights.max():g}"
        )
    return weights.detach().to(anchors.dtype)


def check_number(
    name: str,
    value: float,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """Checks that `value` is a finite real number in a range, and returns it as a float.

    Args:
        name: The name of the argument, for the error message.
        value: The number. A bool is not accepted.
        at_least: The smallest value that is accepted.
        above: The value must be larger than this bound.
        below: The value must be smaller than this bound.

    Returns:
        The number as a float. Under `torch.compile`, `value` itself, unchecked.

    Raises:
        ValueError: If `value` is not a finite real number in the range.

    Examples:
        >>> check_number("temperature", 0.0, above=0)
        Traceback (most recent call last):
        ValueError: temperature: expected a finite number above 0, got 0.0
    """
    if torch.compiler.is_compiling():  # a setting may be a symbol, whose value cannot be read
        return value
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer larger than any float
        number = math.inf
    if not (math.isfinite(number) and at_least <= number < below and number > above):
        bounds = [
            f"{word} {bound:g}"
            for word, bound in (("at least", at_least), ("above", above), ("below", below))
            if math.isfinite(bound)
        ]
        expected = " ".join(["a finite number", " and ".join(bounds)]).strip()
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return number


def check_temperature(name: str, value: float, *, inverse: bool = False) -> float:
    """Checks a temperature, or its inverse (a scale), and returns it as a float.

    Args:
        name: The name of the argument, for messages.
        value: The temperature, or the scale that similarities are multiplied by.
        inverse: Whether `value` is a scale, the inverse of the temperature.

    Returns:
        The number as a float.

    Raises:
        ValueError: If `value` is not a finite number above 0, or if the temperature is below 1e-10.

    Warns:
        UserWarning: If the temperature is above 2.

    Examples:
        >>> check_temperature("scale", 20, inverse=True)
        20.0
    """
    number = check_number(name, value, above=0)
    if torch.compiler.is_compiling():
        return number
    temperature = 1 / max(number, LEAST_TEMPERATURE) if inverse else number
    if temperature < LEAST_TEMPERATURE:
        bound = f"at most {1 / LEAST_TEMPERATURE:g}" if inverse else f"at least {LEAST_TEMPERATURE:g}"
        raise ValueError(f"{name}: expected {bound}, got {value!r}")
    if temperature > WARM:
        means = f" means a temperature of {temperature:g}" if inverse else ""
        usual = "2 to 20" if inverse else "0.05 to 0.5 (a scale of 20 is a temperature of 0.05)"
        warnings.warn(
            f"{name}={value!r}{means}: at such a temperature all candidates count nearly the same. Usual: {usual}",
            stacklevel=4,
        )
    return number


def check_strength(name: str, value: float, *, above: float | None = None) -> float:
    """Checks that `value` is a number from 0 to 1e30, and returns it as a float.

    Args:
        name: The name of the argument, for the error message.
        value: The number.
        above: If given, the value must be larger than this bound instead of at least 0.

    Returns:
        The number as a float.

    Raises:
        ValueError: If `value` is not a finite real number in the range.

    Examples:
        >>> check_strength("beta", 1e39)
        Traceback (most recent call last):
        ValueError: beta: expected at most 1e+30, got 1e+39
    """
    number = check_number(name, value, at_least=0) if above is None else check_number(name, value, above=above)
    if number > LARGEST:
        raise ValueError(f"{name}: expected at most {LARGEST:g}, got {value!r}")
    return number


def check_whole(name: str, value: float, *, at_least: float, below: float = math.inf) -> int:
    """Checks that `value` is a whole number in a range, and returns it as an int.

    Args:
        name: The name of the argument, for the error message.
        value: The number. A float without a fractional part is accepted.
        at_least: The smallest value that is accepted.
        below: The value must be smaller than this bound.

    Returns:
        The number as an int.

    Raises:
        ValueError: If `value` is not a whole number in the range.

    Examples:
        >>> check_whole("k", 2.5, at_least=1)
        Traceback (most recent call last):
        ValueError: k: expected a whole number, got 2.5
    """
    if check_number(name, value, at_least=at_least, below=below) != int(value):
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    return int(value)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Checks that `value` is one of several choices.

    Args:
        name: The name of the argument, for the error message.
        value: The value.
        choices: The values that are accepted.

    Raises:
        ValueError: If `value` is not one of them. The message lists them.

    Examples:
        >>> check_choice("mixing", "cubic", ("linear", "geometric"))
        Traceback (most recent call last):
        ValueError: mixing: expected one of 'linear', 'geometric', got 'cubic'
    """
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
