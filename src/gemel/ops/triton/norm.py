"""RMS norm, forward and backward.

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

from gemel.ops import norm
from gemel.ops.triton.launch import MAX_BLOCK, dense_tokens, on_device_of, warps

TILE = 4096  # numbers that a program holds, if a row is not longer
SHARES = 512  # programs of a backward pass: 3 to 5 for each processor of the GPUs of today, 1 to 4 MB of sums for the usual widths


@triton.jit
def _forward(
    x_ptr,
    scale_ptr,
    y_ptr,
    factor_ptr,
    num_rows,
    group,
    width,
    x_ld,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    token, head = rows // group, rows % group * width
    x = tl.load(x_ptr + (token * x_ld + head)[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    packed = (rows * width)[:, None] + columns[None, :]
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
    d_x_ptr,
    d_scale_ptr,
    num_rows,
    group,
    width,
    x_ld,
    d_y_ld,
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
        tl.store(d_x_ptr + (rows * width)[:, None] + columns[None, :], d_x.to(d_x_ptr.dtype.element_ty), mask=inside)
    tl.store(d_scale_ptr + share * width + columns, tl.sum(d_scale, axis=0), mask=columns < width)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Over the last axis of [T, D] or [T, M, D]: x / sqrt(mean(x**2) + eps) * weight."""
    if len(weight_D) > MAX_BLOCK:
        return norm.rms_norm(x, weight_D, eps)
    y: Tensor = _RMSNorm.apply(x, weight_D, eps)
    return y


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x, weight_D = dense_tokens(x), weight_D.contiguous()
        num_rows, group, width = _shape(x)
        tile = _tile(width)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        factor = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        with on_device_of(x):
            _forward[triton.cdiv(num_rows, tile["ROWS"]),](x, weight_D, y, factor, num_rows, group, width, x.stride(0), eps, **tile)
        ctx.save_for_backward(x, weight_D, factor)
        ctx.eps = eps
        return y

    @staticmethod
    def again(ctx: Any) -> Tensor:
        """The result."""
        x, weight_D, _ = ctx.saved_tensors
        return rms_norm(x, weight_D, ctx.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, factor = ctx.saved_tensors
        d_y, (num_rows, group, width) = dense_tokens(d_y), _shape(x)
        tile = _tile(width)
        num_shares = min(SHARES, triton.cdiv(num_rows, tile["ROWS"]))
        d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        d_scale_SD = torch.empty(num_shares, width, dtype=torch.float32, device=x.device)
        ld = x.stride(0), d_y.stride(0)
        with on_device_of(x):
            _backward[num_shares,](x, weight_D, factor, d_y, d_x, d_scale_SD, num_rows, group, width, *ld, **tile)
        return d_x, d_scale_SD.sum(0).to(weight_D.dtype), None


def _shape(x: Tensor) -> tuple[int, int, int]:
    """Rows, rows of a token, width."""
    return x.numel() // x.shape[-1], x.shape[1] if x.dim() == 3 else 1, x.shape[-1]


def _tile(width: int) -> dict[str, int]:
    """How many rows a program norms at a time, and with how many warps."""
    block = triton.next_power_of_2(width)
    rows = max(TILE // block, 1)
    return {"ROWS": rows, "BLOCK": block, "num_warps": warps(rows * block)}
