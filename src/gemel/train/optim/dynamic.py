"""The 8-bit code of optimizer state: dynamic quantization (Dettmers et al. 2022, arXiv 2110.02861).

A number between 0 and 1 is written as a power of ten and a linear fraction, and the smaller the power, the fewer bits the fraction gets:
there are codes down to about 10^-7, and around 1 they lie about 1% apart. State spans many orders of magnitude, so that equal steps would
turn most of it to zero, while its largest numbers should still be exact to a few percent. Blocks of 256 elements share one scale, their
largest magnitude, so that an outlier spoils 255 neighbours and not a whole matrix.

Second moments are never negative, so they spend the sign's bit on the fraction. And one that is not zero is never rounded to zero: its root
divides, and an update over a root of zero would be as large as eps allows (the zero-point problem, Li et al. 2023, arXiv 2309.01507).

Encoding is one look-up: the upper 20 bits of the fp32 pattern (sign, exponent, 11 of the mantissa's bits) index a table of nearest codes. A
number within 2^-11 of the middle between two codes may therefore get the farther one.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
NUM_DECADES = 7
_DROPPED_BITS = 12


class Code(NamedTuple):
    """`values` [256], ascending, and `nearest` [2^20], the code for each upper part of an fp32 pattern."""

    values: Tensor
    nearest: Tensor


@functools.cache
def code(signed: bool, device: torch.device) -> Code:
    """The tables of one kind, on a device."""
    values = _values(signed)
    edges = (values[:-1] + values[1:]) / 2
    patterns = torch.arange(2 ** (32 - _DROPPED_BITS), dtype=torch.int64) << _DROPPED_BITS
    middles = patterns + (1 << (_DROPPED_BITS - 1))  # of the numbers that share the pattern's upper part
    numbers = (middles - ((middles >> 31) << 32)).to(torch.int32).view(torch.float32).double()
    nearest = torch.bucketize(numbers.nan_to_num(0.0), edges)
    if not signed:
        nearest[(patterns > 0) & (nearest == 0)] = 1
    nearest[0] = int((values == 0).nonzero())
    return Code(values.float().to(device), nearest.to(torch.uint8).to(device))


def _values(signed: bool) -> Tensor:
    """256 numbers, ascending: in the i-th decade 2^i cells (twice as many without a sign) by their middles; 0; and 1."""
    numbers = [0.0, 1.0]
    for decade in range(NUM_DECADES):
        num_cells = 2 ** (decade + (0 if signed else 1))
        width = 0.9 / num_cells
        middles = [(0.1 + width * (cell + 0.5)) * 10.0 ** (decade - NUM_DECADES + 1) for cell in range(num_cells)]
        numbers += middles + ([-x for x in middles] if signed else [])
    return torch.tensor(sorted(numbers), dtype=torch.float64)


def encode(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (uint8) and one scale per block of fp32 numbers; their count must be a multiple of `BLOCK`."""
    blocks = x.view(-1, BLOCK)
    low, high = torch.aminmax(blocks, dim=1)
    scales = torch.maximum(high, -low)
    normal = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    index = normal.view(torch.int32).view(-1).bitwise_right_shift_(_DROPPED_BITS).bitwise_and_((1 << (32 - _DROPPED_BITS)) - 1)
    return code(signed, x.device).nearest.index_select(0, index), scales


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The way back, to a new fp32 tensor."""
    values = code(signed, codes.device).values.index_select(0, codes.to(torch.int32))
    values.view(-1, BLOCK).mul_(scales.unsqueeze(1))
    return values
