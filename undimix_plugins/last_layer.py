"""The inputs of the layer whose outputs a loss compares, for gradients at that layer's weight."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from undimix_plugins.checks import values_are_free
from undimix_plugins.rows import as_full_precision, least_length

MOST_BYTES = 2**30  # of inputs and outputs, before a loss has shown how many it needs


class Call(NamedTuple):
    """A call of the layer: inputs [rows, h], outputs [rows, width], and how often these had been changed in place."""

    inputs: Tensor
    outputs: Tensor
    version: int


class LastLayer:
    """Remembers what a Linear was given and gave, for a loss that asks for what lies behind its embeddings.

    A loss's batch is remembered until the layer is called again. Of calls that no loss has asked for yet, the latest
    are kept: as many rows as twice the largest batch, before the first one 1 GiB; none under `torch.inference_mode()`.
    Once nobody holds the object, its hook does nothing.

    Args:
        layer: The Linear whose outputs the embeddings are, before they are normalised.

    Raises:
        TypeError: For what is no `nn.Linear`.

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
        self.asked = False  # whether a loss has had them
        self.most: int | None = None  # rows that are kept
        self.compared = False  # whether copies have once been seen to be this layer's outputs
        layer.register_forward_hook(_Hook(self))

    def record(self, inputs: Tensor, outputs: Tensor) -> None:
        """Remembers a call of the layer."""
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
        """The layer's inputs behind embeddings, which are its outputs of the latest calls.

        Args:
            embeddings: One or more tensors [rows, width]; as they came from the layer, or in another precision, or
                merged or cut across calls, then all of them in the order of the calls.

        Returns:
            For each its inputs [rows, h], without gradient.

        Raises:
            ValueError: Where the latest calls did not give as many rows of that width; where outputs were changed in
                place; or where copies have other values (on devices other than the CPU, the first are compared).
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
        """Without what is remembered, which belongs to one step."""
        return {**vars(self), "calls": [], "asked": False}


def _in_memory_of(calls: list[Call], embeddings: Tensor) -> Tensor | None:
    """The inputs behind embeddings that are outputs, or rows of them, in the same memory; None for copies."""
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
    """Features of any rank as rows [rows, width], without gradient."""
    return features.detach().reshape(-1, features.shape[-1])


class _Hook:
    """Calls `record` of a LastLayer as long as there is one."""

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
    """What a hook becomes in a copy, once nobody holds its LastLayer."""

    def __call__(self, *args: Any) -> None:
        return None


def inputs_over_lengths(inputs: Tensor, embeddings: Tensor, normalized: bool) -> Tensor:
    """The last layer's inputs [rows, h] as a `Contrast` takes them: over the lengths of what is normalised."""
    inputs = as_full_precision(inputs)
    if not normalized:
        return inputs
    lengths: Tensor = torch.linalg.vector_norm(as_full_precision(embeddings.detach()), dim=1, keepdim=True)
    return inputs / lengths.masked_fill(lengths < least_length(embeddings.dtype), 1)
