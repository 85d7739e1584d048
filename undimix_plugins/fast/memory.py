"""Memory for blocks of scores, kept from one call to the next."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from undimix_plugins.blocks import PADDING


class Workspace:
    """Memory for blocks of scores, kept from one call to the next on the CPU, whose allocator gives large ones back.

    To get them again costs a page fault for every 4 KiB, a fifth of a step at any batch size.
    """

    spare: ClassVar[dict[torch.dtype, Tensor]] = {}

    def __init__(self, like: Tensor, numbers: int) -> None:
        self.next = 0
        memory = self.spare.pop(like.dtype, None) if like.device.type == "cpu" else None
        if memory is None or len(memory) < numbers:
            with torch.inference_mode(False):
                memory = like.new_empty(numbers)
        self.memory = memory

    def block(self, rows: int, columns: int) -> Tensor:
        """Returns an uninitialised block [rows, columns]."""
        width = columns + PADDING
        block = self.memory[self.next : self.next + rows * width].view(rows, width)[:, :columns]
        self.next += rows * width
        return block

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *error: object) -> None:
        if type(self.memory) is Tensor and self.memory.device.type == "cpu":
            self.spare[self.memory.dtype] = self.memory
