"""What each rank holds of every parameter, as boxes of the whole.

A parameter is cut at most twice: by its `Cut` among the tensor ranks, and what is left of it, flat, in ranges among the ranks that share
optimizer states or parameters. In the end that is some boxes of the whole, and boxes are all that a checkpoint knows: no mesh, no rank. So
a checkpoint of one mesh fits every other.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gemel.model.pieces import everything, run
from gemel.model.shard import Box, Cut
from gemel.train.optim.dynamic import BLOCK
from gemel.train.parallel.mesh import Axis


@dataclass(frozen=True)
class Piece:
    """What a rank has of a parameter, or moves of it: the elements from `start` on of its part, in memory that the two share. Or, as an
    owner (see `matrices`), all of it, whatever its part is.

    `speaks` is true on one of the ranks that have these elements: the one whose norm is counted and whose numbers are saved.
    """

    tensor: Tensor
    start: int
    speaks: bool


def place(x: Tensor, piece: Piece, cut: Cut, axis: Axis) -> tuple[tuple[int, ...], list[Box]]:
    """The shape of the whole that a rank's tensor is of, and the boxes of it whose elements lie in the tensor, one behind the other.

    `x` is the piece of a parameter or belongs to it: of its shape, or one number for every `BLOCK` elements of it, or of a shape of its own
    beside a parameter that is not cut.
    """
    part, num = cut.boxes(axis.rank, axis.size), piece.tensor.numel()
    if x.dim() == 0:
        return (), [()]
    if num == cut.shape.numel():
        return tuple(x.shape), [everything(x.shape)]
    if x.shape == piece.tensor.shape:
        return cut.shape, list(run(part, piece.start, piece.start + num))
    assert x.shape == (-(-num // BLOCK),) and piece.start % BLOCK == 0
    first = piece.start // BLOCK
    return (-(-cut.shape.numel() // BLOCK),), [(slice(first, first + len(x)),)]


def saves(x: Tensor, piece: Piece, cut: Cut, axis: Axis) -> bool:
    """Whether a rank saves its tensor. A number that every piece of a parameter has is saved by whom the parameter begins with."""
    begins = piece.start == 0 and (axis.rank == 0 or piece.tensor.numel() == cut.shape.numel())
    return piece.speaks and (x.dim() > 0 or begins)
