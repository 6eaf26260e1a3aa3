"""Rotary positions, forward and backward: one kernel, since the gradient of a rotation is the rotation back."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemel.ops.triton.launch import dense_tokens, on_device_of, warps

TILE = 2048  # numbers of one token that a program rotates: as many heads as that makes, which share their angles


@triton.jit
def _turn(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    num_heads,
    half,
    x_ld,
    cos_ld,
    sin_ld,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads, pairs = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    here = pairs < half
    cos1 = tl.load(cos_ptr + token * cos_ld + pairs, mask=here, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_ptr + token * cos_ld + half + pairs, mask=here, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr + token * sin_ld + pairs, mask=here, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_ptr + token * sin_ld + half + pairs, mask=here, other=0.0).to(tl.float32)
    if BACK:
        sin1, sin2 = sin2, sin1
    inside = (heads < num_heads)[:, None] & here[None, :]
    at = (heads * 2 * half)[:, None] + pairs[None, :]
    x1 = tl.load(x_ptr + token * x_ld + at, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + token * x_ld + half + at, mask=inside, other=0.0).to(tl.float32)
    y1, y2 = x1 * cos1[None, :] + x2 * sin1[None, :], x2 * cos2[None, :] + x1 * sin2[None, :]
    y = y_ptr + token * num_heads * 2 * half + at
    tl.store(y, y1.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y + half, y2.to(y_ptr.dtype.element_ty), mask=inside)


def rope(x_TMH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
    """Pair (i, i + H/2) of every head rotated by its angle, sines signed as in `ops.rope_table`. The angles get no gradient."""
    y_TMH: Tensor = _Rope.apply(x_TMH, cos_T1H, sin_T1H)
    return y_TMH


class _Rope(torch.autograd.Function):
    """Keeps the angles, which all layers share."""

    @staticmethod
    def forward(ctx: Any, x_TMH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
        angles = dense_tokens(cos_T1H), dense_tokens(sin_T1H)
        ctx.save_for_backward(*angles)
        return _turned(x_TMH, *angles, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TMH: Tensor) -> tuple[Tensor | None, ...]:
        return _turned(d_y_TMH, *ctx.saved_tensors, back=True), None, None


def _turned(x_TMH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor, *, back: bool) -> Tensor:
    x_TMH = dense_tokens(x_TMH)
    num_tokens, num_heads, width = x_TMH.shape
    block = triton.next_power_of_2(width // 2)
    heads = min(max(TILE // (2 * block), 1), triton.next_power_of_2(num_heads))
    y_TMH = torch.empty(x_TMH.shape, dtype=x_TMH.dtype, device=x_TMH.device)
    ld = (x_TMH.stride(0), cos_T1H.stride(0), sin_T1H.stride(0))
    with on_device_of(x_TMH):
        _turn[num_tokens, triton.cdiv(num_heads, heads)](
            *(x_TMH, cos_T1H, sin_T1H, y_TMH), *(num_heads, width // 2), *ld, BACK=back, HEADS=heads, BLOCK=block, num_warps=warps(TILE)
        )
    return y_TMH
