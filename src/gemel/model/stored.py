"""A tensor in a checkpoint's file as it looks from outside: known by shape and type, and read when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gemel.model.leaves.lowbit import LowBit


@dataclass(frozen=True)
class Stored:
    """`dtype` is None for a matrix of few bits, which is read as `LowBit`. What is read may lie in the mapped file: copy what is kept."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    read: Callable[[], Tensor | LowBit]

    def tensor(self) -> Tensor:
        """The values of one that has a `dtype`."""
        tensor = self.read()
        assert isinstance(tensor, Tensor)
        return tensor
