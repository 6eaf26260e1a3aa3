"""One step of AdamW over a parameter in one launch, whatever its weights and moments are stored as.

They become fp32 in registers, move, and go back: what is read and written is what is stored. How bf16 is rounded at random is a function of
a key and a place, as everywhere (`train.optim.noise`), so a GPU draws the bits that a CPU would have drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemel.ops.adamw import mixed
from gemel.ops.triton.launch import on_device_of

if TYPE_CHECKING:
    from gemel.ops.adamw import How, Part, Stored

BLOCK = 1024
PLAIN, HALVED, ROUNDED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _read(data_ptr, low_ptr, at, inside, FORM: tl.constexpr):
    x = tl.load(data_ptr + at, mask=inside, other=0)
    if FORM == PLAIN:
        return x.to(tl.float32)
    bits = x.to(tl.int32) << 16
    if FORM == HALVED:
        bits += tl.load(low_ptr + at, mask=inside, other=0).to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _write(data_ptr, low_ptr, keys_ptr, table_ptr, at, place, inside, x, LENGTH: tl.constexpr, FORM: tl.constexpr):
    if FORM == PLAIN:
        tl.store(data_ptr + at, x, mask=inside)
    else:
        bits = x.to(tl.int32, bitcast=True)
        if FORM == HALVED:
            tl.store(low_ptr + at, bits.to(tl.int16), mask=inside)
            bits += 0x8000
        else:
            keys = keys_ptr + place // LENGTH * 2
            drawn = tl.load(table_ptr + place % LENGTH, mask=inside, other=0) ^ tl.load(keys, mask=inside, other=0)
            bits += ((drawn * tl.load(keys + 1, mask=inside, other=0)) >> 16) & 0xFFFF
        tl.store(data_ptr + at, (bits >> 16).to(tl.int16), mask=inside)


@triton.jit
def _step(
    weight_ptr,
    weight_low_ptr,
    weight_keys_ptr,
    gradient_ptr,
    first_ptr,
    first_keys_ptr,
    second_ptr,
    second_keys_ptr,
    table_ptr,
    size,
    offset,
    keep,
    rest1,
    beta2,
    rest2,
    root,
    eps,
    rate,
    shrink,
    LENGTH: tl.constexpr,
    WEIGHT: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, place = at < size, at + offset
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
    mean = _read(first_ptr, first_ptr, at, inside, FIRST)
    square = _read(second_ptr, second_ptr, at, inside, SECOND)
    mean += (gradient - mean) * rest1
    square = square * beta2 + gradient * gradient * rest2
    moved = _read(weight_ptr, weight_low_ptr, at, inside, WEIGHT) * keep - rate * tl.div_rn(mean, tl.div_rn(tl.sqrt_rn(square), root) + eps)
    if shrink > 0:
        moved -= tl.minimum(tl.maximum(moved, -shrink), shrink)
    _write(weight_ptr, weight_low_ptr, weight_keys_ptr, table_ptr, at, place, inside, moved, LENGTH, WEIGHT)
    _write(first_ptr, first_ptr, first_keys_ptr, table_ptr, at, place, inside, mean, LENGTH, FIRST)
    _write(second_ptr, second_ptr, second_keys_ptr, table_ptr, at, place, inside, square, LENGTH, SECOND)


def adamw(how: How, part: Part, table: Tensor) -> None:
    """As `gemel.ops.adamw.step`, whose `Part` this is of."""
    stored = part.weight, part.first, part.second
    draws = next((x.draws for x in stored if x.draws is not None), None)
    offset, length = (0, 1) if draws is None else (draws.offset, draws.length)
    data = [x.data if _form(x) == PLAIN.value else x.data.view(torch.int16) for x in stored]
    low = data[0] if part.weight.low is None else part.weight.low
    keys = [_keys(x, table) for x in stored]
    size = part.gradient.numel()
    with on_device_of(part.gradient):
        _step[triton.cdiv(size, BLOCK),](
            *(data[0], low, keys[0], part.gradient, data[1], keys[1], data[2], keys[2], table, size, offset),
            *how,
            LENGTH=length,
            WEIGHT=_form(part.weight),
            FIRST=_form(part.first),
            SECOND=_form(part.second),
            BLOCK=BLOCK,
            num_warps=4,
        )


def _form(x: Stored) -> int:
    form = PLAIN if x.data.dtype == torch.float32 else ROUNDED if x.low is None else HALVED
    return int(form.value)


def _keys(x: Stored, table: Tensor) -> Tensor:
    """The two words of each stretch's key, as int32; whatever, where nothing is drawn."""
    if x.draws is None:
        return table
    return torch.tensor([mixed(key) for key in x.draws.keys], dtype=torch.int32).to(table.device, non_blocking=True)
