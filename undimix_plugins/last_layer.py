"""Records the inputs of the layer whose outputs a loss compares, for gradients with respect to its weight."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from undimix_plugins.checks import values_are_free
from undimix_plugins.rows import as_full_precision, least_length

MOST_BYTES = 2**30  # most bytes of inputs and outputs that are kept before the first loss


class Call(NamedTuple):
    """A call of the layer: inputs [rows, h], outputs [rows, width], and the version counter of the outputs."""

    inputs: Tensor
    outputs: Tensor
    version: int


class LastLayer:
    """Records the inputs and outputs of an `nn.Linear`, so that a loss can look up the inputs of its embeddings.

    A forward hook records the calls of the layer. It keeps the latest calls, up to twice as many rows as the largest
    batch, or 1 GiB before the first batch. After a loss has read a batch, the next call of the layer deletes the older
    ones. Nothing is recorded under `torch.inference_mode()`, or once this object is deleted.

    Args:
        layer: The `nn.Linear` whose outputs are the embeddings before normalisation.

    Raises:
        TypeError: If `layer` is not an `nn.Linear`.

    Examples:
        >>> layer = torch.nn.Linear(4, 2)
        >>> last = LastLayer(layer)
        >>> inputs = torch.randn(3, 4)
        >>> torch.equal(last.inputs_of(layer(inputs))[0], inputs)
        True
    """

    def __init__(self, layer: nn.Linear) -> None:
        if not isinstance(layer, nn.Linear):
            raise TypeError(
                "last_layer: expected the nn.Linear whose outputs are the embeddings, got "
                f"{type(layer).__name__}; with another layer last, only gradient='embedding' is defined"
            )
        self.layer = layer
        self.calls: list[Call] = []  # the latest last
        self.asked = False  # whether a loss has read them
        self.most: int | None = None  # most rows that are kept
        self.compared = False  # whether copies have been compared with the outputs once
        layer.register_forward_hook(_Hook(self))

    def record(self, inputs: Tensor, outputs: Tensor) -> None:
        """Records a call of the layer. The forward hook calls it.

        Args:
            inputs: The layer's inputs [..., h].
            outputs: The layer's outputs [..., width].
        """
        if torch.is_inference_mode_enabled():
            return
        if self.asked:
            self.calls, self.asked = [], False
        self.calls.append(Call(rows_of(inputs), rows_of(outputs), outputs._version))
        row_bytes = sum(part.shape[1] * part.element_size() for part in self.calls[-1][:2])
        most = MOST_BYTES // row_bytes if self.most is None else self.most
        while len(self.calls) > 1 and sum(len(call.inputs) for call in self.calls[1:]) >= most:
            del self.calls[0]

    def inputs_of(self, *embeddings: Tensor) -> list[Tensor]:
        """Returns the inputs of the layer for embeddings that are its latest outputs.

        Args:
            embeddings: One or more tensors [rows, width]. They may be the outputs themselves, rows of them, or copies
                (in another precision, or concatenated or split). Copies must together be all outputs of the latest
                calls, in the order of the calls.

        Returns:
            For each tensor the inputs [rows, h], without gradient.

        Raises:
            ValueError: If the latest calls gave another number of rows or another width, if outputs were changed in
                place, or if copies have other values. On devices other than the CPU, only the first copies are
                compared.

        Examples:
            >>> layer = torch.nn.Linear(4, 2)
            >>> last = LastLayer(layer)
            >>> z = layer(torch.randn(6, 4))
            >>> [inputs.shape for inputs in last.inputs_of(z[:3], z[3:])]
            [torch.Size([3, 4]), torch.Size([3, 4])]
        """
        calls, rows = self.calls, sum(map(len, embeddings))
        self.asked, self.most = True, max(self.most or 0, 2 * rows)
        expected = "last_layer: expected the loss to be given this Linear's outputs as they are"
        if any(call.outputs._version != call.version for call in calls):
            raise ValueError(f"{expected}, got some that were changed in place: is there a layer after it?")
        by_memory = [_in_memory_of(calls, part) for part in embeddings]
        if all(inputs is not None for inputs in by_memory):
            return [inputs for inputs in by_memory if inputs is not None]
        count, start = 0, len(calls)
        while count < rows and start > 0:
            start -= 1
            count += len(calls[start].inputs)
        if count != rows or any(call.outputs.shape[1] != embeddings[0].shape[1] for call in calls[start:]):
            came = ", ".join(str(list(call.outputs.shape)) for call in calls) or "none"
            shapes = ", ".join(str(list(part.shape)) for part in embeddings)
            raise ValueError(f"{expected}, got embeddings {shapes} where its latest outputs were {came}")
        given = torch.cat([call.inputs for call in calls[start:]])
        if values_are_free(given) or not self.compared:
            outputs = torch.cat([call.outputs for call in calls[start:]])
            together = torch.cat([part.detach() for part in embeddings])
            if not torch.equal(outputs.to(together.dtype), together):
                raise ValueError(f"{expected}, got other values: is there a layer after it, or a normalisation?")
            self.compared = True
        return list(torch.split(given, list(map(len, embeddings))))

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without the recorded calls, which belong to a single step."""
        return {**vars(self), "calls": [], "asked": False}


def _in_memory_of(calls: list[Call], embeddings: Tensor) -> Tensor | None:
    """Returns the inputs of embeddings that are outputs, or rows of them, in the same memory. None for copies."""
    memory, width = embeddings.untyped_storage().data_ptr(), embeddings.shape[1]
    for inputs, outputs, _ in calls:
        alike = outputs.dtype == embeddings.dtype and outputs.shape[1] == width and outputs.is_contiguous()
        if not alike or outputs.untyped_storage().data_ptr() != memory:
            continue
        first, over = divmod(int(embeddings.storage_offset()) - int(outputs.storage_offset()), width)
        step, part = divmod(embeddings.stride(0), width)
        if over == part == 0 and embeddings.stride(1) == 1 and 0 <= first < len(outputs) and step > 0:
            behind = inputs[first::step][: len(embeddings)]
            if len(behind) == len(embeddings):
                return behind
    return None


def rows_of(features: Tensor) -> Tensor:
    """Returns features [..., width] as rows [rows, width], without gradient."""
    return features.detach().reshape(-1, features.shape[-1])


class _Hook:
    """A forward hook that calls `LastLayer.record` as long as the LastLayer exists."""

    def __init__(self, last_layer: LastLayer) -> None:
        self.last_layer = weakref.ref(last_layer)

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        last_layer = self.last_layer()
        if last_layer is not None:
            last_layer.record(inputs[0], outputs)

    def __reduce__(self) -> tuple[Any, ...]:
        last_layer = self.last_layer()
        return (_Hook, (last_layer,)) if last_layer is not None else (_Nothing, ())


class _Nothing:
    """A hook that does nothing. A copied hook becomes one if its LastLayer no longer exists."""

    def __call__(self, *args: Any) -> None:
        return None


def inputs_over_lengths(inputs: Tensor, embeddings: Tensor, normalized: bool) -> Tensor:
    """Returns the inputs of the last layer as `LastLayerInputs` takes them.

    Args:
        inputs: The inputs of the layer [rows, h].
        embeddings: The outputs of the layer [rows, width].
        normalized: Whether the loss normalises the embeddings to length 1.

    Returns:
        The inputs [rows, h] in full precision, divided by the lengths of the embeddings if these are normalised.

    Examples:
        >>> inputs_over_lengths(torch.ones(1, 2), torch.tensor([[3.0, 4.0]]), normalized=True)
        tensor([[0.2000, 0.2000]])
    """
    inputs = as_full_precision(inputs)
    if not normalized:
        return inputs
    lengths: Tensor = torch.linalg.vector_norm(as_full_precision(embeddings.detach()), dim=1, keepdim=True)
    return inputs / lengths.masked_fill(lengths < least_length(embeddings.dtype), 1)
