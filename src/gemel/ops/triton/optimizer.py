"""AdamW over all tensors of a step in one launch for each combination of types.

A launch gets a table of addresses, one row a tensor, and a list of pieces of equal size, one a program: which tensor, and which part of it.
Hundreds of launches of a few microseconds each would take longer than the arithmetic of a small model.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemel.ops.triton.launch import cut, on_device_of

if TYPE_CHECKING:
    from gemel.ops.train import Moved

PIECE = 8192  # numbers of a program: enough to hide finding them, few enough that small tensors do not leave it idle
BLOCK = 1024


@triton.jit
def _step(
    addresses_ptr,
    sizes_ptr,
    kept_ptr,
    pieces_ptr,
    beta1_rest,
    beta2,
    beta2_rest,
    eps,
    rate,
    root_scale,
    gradient_scale,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    MASTER: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    piece = tl.program_id(0)
    tensor, first = tl.load(pieces_ptr + 2 * piece), tl.load(pieces_ptr + 2 * piece + 1).to(tl.int64) * PIECE
    size, kept = tl.load(sizes_ptr + tensor), tl.load(kept_ptr + tensor)
    addresses = addresses_ptr + tensor * 5
    weight_ptr = tl.load(addresses).to(tl.pointer_type(WEIGHT))
    gradient_ptr = tl.load(addresses + 1).to(tl.pointer_type(GRADIENT))
    first_ptr, second_ptr = tl.load(addresses + 2).to(tl.pointer_type(tl.float32)), tl.load(addresses + 3).to(tl.pointer_type(tl.float32))
    moved_ptr = weight_ptr
    if MASTER:
        moved_ptr = tl.load(addresses + 4).to(tl.pointer_type(tl.float32))
    for start in range(0, PIECE, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        inside = at < size
        gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32) * gradient_scale
        mean = tl.load(first_ptr + at, mask=inside, other=0.0)
        square = tl.load(second_ptr + at, mask=inside, other=0.0)
        mean += (gradient - mean) * beta1_rest
        square = square * beta2 + gradient * gradient * beta2_rest
        moved = tl.load(moved_ptr + at, mask=inside, other=0.0).to(tl.float32)
        moved = moved * kept - rate * (mean / (tl.sqrt(square) * root_scale + eps))
        tl.store(first_ptr + at, mean, mask=inside)
        tl.store(second_ptr + at, square, mask=inside)
        tl.store(weight_ptr + at, moved.to(WEIGHT), mask=inside)
        if MASTER:
            tl.store(moved_ptr + at, moved, mask=inside)


def adamw(tensors: Sequence[Moved], *, rate: float, betas: tuple[float, float], eps: float, step: int, gradient_scale: float = 1.0) -> None:
    """One step of AdamW over all tensors, in place; steps count from 1. As `gemel.ops.train.adamw`, whose `Moved` says what moves.

    All tensors are contiguous; weights are fp32, or narrow images of fp32 masters, and moments are fp32.
    """
    groups: dict[tuple[torch.device, torch.dtype, torch.dtype, bool], list[Moved]] = {}
    for one in tensors:
        groups.setdefault((one.weight.device, one.weight.dtype, one.gradient.dtype, one.master is not None), []).append(one)
    beta1, beta2 = betas
    # Roots of corrected and uncorrected second moments differ by a factor, which the first moment's correction joins in the rate.
    scalars = (1 - beta1, beta2, 1 - beta2, eps, rate / (1 - beta1**step), (1 - beta2**step) ** -0.5, gradient_scale)
    for (device, weight, gradient, master), group in groups.items():
        sizes, pieces = _pieces(tuple(one.weight.numel() for one in group), device)
        addresses = torch.tensor([_addresses(one) for one in group])
        kept = torch.tensor([1 - rate * one.decay for one in group], dtype=torch.float32)
        tables = addresses.to(device, non_blocking=True), sizes, kept.to(device, non_blocking=True), pieces
        types = {"WEIGHT": _TYPES[weight], "GRADIENT": _TYPES[gradient], "MASTER": master}
        with on_device_of(group[0].weight):
            _step[len(pieces),](*tables, *scalars, **types, PIECE=PIECE, BLOCK=BLOCK, num_warps=4)


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _addresses(one: Moved) -> list[int]:
    moments_and_master = one.first, one.second, one.weight if one.master is None else one.master
    return [tensor.data_ptr() for tensor in (one.weight, one.gradient, *moments_and_master)]


@functools.lru_cache(maxsize=16)
def _pieces(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """How many numbers each tensor has, and which piece of which tensor each program moves. The same at every step."""
    sizes_N = torch.tensor(sizes)
    return sizes_N.to(device), torch.stack(cut(sizes_N, PIECE), 1).int().to(device)
