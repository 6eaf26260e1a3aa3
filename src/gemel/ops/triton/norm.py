"""RMS norm, alone and of a sum, forward and backward.

A program norms whole rows, several if they are short (norms of heads have 64 or 128 numbers each), in fp32. The gradient of the scale is a
sum over all rows: each of a fixed number of programs sums its share in registers, and torch adds the shares, so the order never changes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemel import ops as reference
from gemel.ops.triton.launch import MAX_BLOCK, dense_tokens, on_device_of, warps

TILE = 4096  # numbers that a program holds, if a row is not longer
SHARES = 512  # programs of a backward pass: 3 to 5 for each processor of the GPUs of today, 1 to 4 MB of sums for the usual widths


@triton.jit
def _forward(
    x_ptr,
    residual_ptr,
    scale_ptr,
    sum_ptr,
    y_ptr,
    factor_ptr,
    num_rows,
    group,
    width,
    x_ld,
    residual_ld,
    eps,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    token, head = rows // group, rows % group * width
    x = tl.load(x_ptr + (token * x_ld + head)[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    packed = (rows * width)[:, None] + columns[None, :]
    if ADD:
        x += tl.load(residual_ptr + (token * residual_ld + head)[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        narrow = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + packed, narrow, mask=inside)
        x = narrow.to(tl.float32)  # what is normed is the sum that others see
    factor = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    scale = tl.load(scale_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    tl.store(y_ptr + packed, (x * factor[:, None] * scale[None, :]).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(factor_ptr + rows, factor, mask=rows < num_rows)


@triton.jit
def _backward(
    x_ptr,
    scale_ptr,
    factor_ptr,
    d_y_ptr,
    d_sum_ptr,
    d_x_ptr,
    d_scale_ptr,
    num_rows,
    group,
    width,
    x_ld,
    d_y_ld,
    d_sum_ld,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    share, columns = tl.program_id(0), tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    d_scale = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(share * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
        token, head = rows // group, rows % group * width
        x = tl.load(x_ptr + (token * x_ld + head)[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        d_y = tl.load(d_y_ptr + (token * d_y_ld + head)[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(factor_ptr + rows, mask=rows < num_rows, other=0.0)
        normed, slope = x * factor[:, None], d_y * scale[None, :]
        d_scale += d_y * normed
        d_x = (slope - normed * (tl.sum(slope * normed, axis=1) / width)[:, None]) * factor[:, None]
        if ADD:
            past = d_sum_ptr + (token * d_sum_ld + head)[:, None] + columns[None, :]
            d_x += tl.load(past, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x_ptr + (rows * width)[:, None] + columns[None, :], d_x.to(d_x_ptr.dtype.element_ty), mask=inside)
    tl.store(d_scale_ptr + share * width + columns, tl.sum(d_scale, axis=0), mask=columns < width)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Over the last axis of [T, D] or [T, M, D]: x / sqrt(mean(x**2) + eps) * weight."""
    if not _fits(x, weight_D):
        return reference.rms_norm(x, weight_D, eps)
    _, y = _RMSNorm.apply(x, None, weight_D, eps)  # type: ignore[no-untyped-call]
    return y  # type: ignore[no-any-return]


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of both and its norm: what stands between two products of a decoder, in one pass."""
    if not _fits(x_TD, weight_D) or x_TD.shape != residual_TD.shape:
        sum_TD = x_TD + residual_TD
        return sum_TD, reference.rms_norm(sum_TD, weight_D, eps)
    sum_TD, y_TD = _RMSNorm.apply(x_TD, residual_TD, weight_D, eps)  # type: ignore[no-untyped-call]
    return sum_TD, y_TD


def _fits(x: Tensor, weight_D: Tensor) -> bool:
    return x.dim() in (2, 3) and weight_D.shape == x.shape[-1:] and len(weight_D) <= MAX_BLOCK


def _shape(x: Tensor) -> tuple[int, int, int]:
    """Rows, rows of a token, width."""
    return x.numel() // x.shape[-1], x.shape[1] if x.dim() == 3 else 1, x.shape[-1]


def _tile(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    rows = max(TILE // block, 1)
    return {"ROWS": rows, "BLOCK": block, "num_warps": warps(rows * block)}


class _RMSNorm(torch.autograd.Function):
    """What is normed and its norm; without a residual the first is None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor | None, Tensor]:
        x, residual = dense_tokens(x), None if residual is None else dense_tokens(residual)
        weight_D, (num_rows, group, width), tile = weight_D.contiguous(), _shape(x), _tile(x.shape[-1])
        total = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        factor = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        ld = (x.stride(0), 0 if residual is None else residual.stride(0))
        with on_device_of(x):
            _forward[triton.cdiv(num_rows, tile["ROWS"]),](
                *(x, residual, weight_D, total, y, factor), *(num_rows, group, width), *ld, eps, ADD=residual is not None, **tile
            )
        ctx.save_for_backward(total, weight_D, factor)
        ctx.add = residual is not None
        return total if ctx.add else None, y

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, d_sum: Tensor | None, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, factor = ctx.saved_tensors
        d_y, d_sum = dense_tokens(d_y), dense_tokens(d_sum) if ctx.add else None
        num_rows, group, width = _shape(x)
        tile = _tile(width)
        shares = min(SHARES, triton.cdiv(num_rows, tile["ROWS"]))
        d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        d_scale_SD = torch.empty(shares, width, dtype=torch.float32, device=x.device)
        ld = (x.stride(0), d_y.stride(0), 0 if d_sum is None else d_sum.stride(0))
        with on_device_of(x):
            _backward[shares,](*(x, weight_D, factor, d_y, d_sum, d_x, d_scale_SD), *(num_rows, group, width), *ld, ADD=ctx.add, **tile)
        return d_x, d_x if ctx.add else None, d_scale_SD.sum(0).to(weight_D.dtype), None
