"""The weight-name table: which tensors of a checkpoint make up which of ours, and how, in both directions.

A family states its table once. Loading reads it left to right, saving right to left, and the shapes that a checkpoint must have follow from
our shapes by running the same transform on tensors without storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Form(Protocol):
    """A reversible way from a checkpoint's tensors to one of ours.

    `by_rows` says that rows are only put in another order, so that whatever there is one of per row goes the same way.
    """

    by_rows: ClassVar[bool]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Theirs to ours."""
        ...

    def split(self, whole: Tensor) -> list[Tensor]:
        """Ours to theirs."""
        ...


@dataclass(frozen=True)
class Stacked:
    """Parts that lie below each other, with so many rows each; a single part is taken as it is."""

    by_rows: ClassVar[bool] = True
    rows: tuple[int, ...]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Concatenate."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))

    def split(self, whole: Tensor) -> list[Tensor]:
        """Cut."""
        return list(torch.split(whole, list(self.rows)))


@dataclass(frozen=True)
class Transposed:
    """A matrix stored as [inputs, outputs]."""

    by_rows: ClassVar[bool] = False

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Swap the axes."""
        return parts[0].t()

    def split(self, whole: Tensor) -> list[Tensor]:
        """Swap the axes."""
        return [whole.t()]


@dataclass(frozen=True)
class Interleaved:
    """Fused queries, keys and values stored head by head: [heads, 3, head_width] rows instead of [3, heads, head_width]."""

    by_rows: ClassVar[bool] = True
    num_heads: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Head by head to kind by kind."""
        by_head = parts[0].view(self.num_heads, 3, -1, *parts[0].shape[1:])
        return by_head.transpose(0, 1).reshape(parts[0].shape)

    def split(self, whole: Tensor) -> list[Tensor]:
        """Kind by kind to head by head."""
        by_kind = whole.view(3, self.num_heads, -1, *whole.shape[1:])
        return [by_kind.transpose(0, 1).reshape(whole.shape)]


@dataclass(frozen=True)
class Weight:
    """One of our tensors, the names of theirs in the order in which they enter it, and the transform."""

    name: str
    parts: tuple[str, ...]
    form: Form


def same(name: str, part: str, rows: int) -> Weight:
    """A tensor that is the same on both sides."""
    return Weight(name, (part,), Stacked((rows,)))
