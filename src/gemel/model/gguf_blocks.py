"""Matrices of GGUF as `LowBit`, without going through their values.

A row is a run of blocks, each with its scales in front of its numbers. Here scales and numbers are taken apart. GGUF puts elements j and
j + n/2 of a run of n into the two halves of one byte; ours are neighbours. N rows, B blocks in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gemel.model.leaves.lowbit import LowBit


def q8_0(blocks_NBb: Tensor) -> LowBit:
    """34 bytes for 32 elements: scale, then int8."""
    return LowBit(blocks_NBb[..., 2:].view(torch.int8).flatten(1).contiguous(), _half(blocks_NBb[..., :2]))


def q4_0(blocks_NBb: Tensor) -> LowBit:
    """18 bytes for 32 elements: scale, then numbers around 8."""
    return LowBit(_neighbours(blocks_NBb[..., 2:]), _half(blocks_NBb[..., :2]))


def q4_1(blocks_NBb: Tensor) -> LowBit:
    """20 bytes for 32 elements: scale, minimum, numbers from 0."""
    return LowBit(_neighbours(blocks_NBb[..., 4:]), _half(blocks_NBb[..., :2]), _half(blocks_NBb[..., 2:4]))


def q4_k(blocks_NBb: Tensor) -> LowBit:
    """144 bytes for 256 elements: a scale of scales and one of minima, eight 6-bit numbers for each, then numbers from 0 in runs of 64.

    Scales and minima are products of both levels, rounded to fp16.
    """
    num_rows = len(blocks_NBb)
    levels_NB2 = blocks_NBb[..., :4].contiguous().view(torch.float16).float()
    scales, minima, rest = torch.split(blocks_NBb[..., 4:16], 4, -1)
    # The first four of each lie in the low 6 bits of their bytes; the others have 4 bits in `rest` and their top 2 above the first four.
    scales_NB8 = torch.cat((scales & 63, rest & 15 | scales >> 2 & 48), -1)
    minima_NB8 = torch.cat((minima & 63, rest >> 4 | minima >> 2 & 48), -1)
    scale_NG = (levels_NB2[..., :1] * scales_NB8).to(torch.float16).reshape(num_rows, -1)
    minimum_NG = (levels_NB2[..., 1:] * -minima_NB8.float()).to(torch.float16).reshape(num_rows, -1)
    return LowBit(_neighbours(blocks_NBb[..., 16:].reshape(num_rows, -1, 32)), scale_NG, minimum_NG)


PACKED: Mapping[str, Callable[[Tensor], LowBit]] = {"Q8_0": q8_0, "Q4_0": q4_0, "Q4_1": q4_1, "Q4_K": q4_k}


def _half(pairs: Tensor) -> Tensor:
    return pairs.contiguous().view(torch.float16).squeeze(-1)


def _neighbours(runs: Tensor) -> Tensor:
    """Runs of n/2 bytes that hold elements j and j + n/2 to [N, K/2] bytes that hold 2j and 2j + 1. Works on two bytes at a time."""
    both = runs.contiguous().view(torch.int16)
    first = both & 0x000F | both >> 4 & 0x00F0
    last = both >> 4 & 0x000F | both >> 8 & 0x00F0
    return torch.cat((first, last), -1).to(torch.uint8).flatten(1)
