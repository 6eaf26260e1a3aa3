"""SwiGLU, forward and backward. Each reads gate and up once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemel.ops.triton.launch import dense_tokens, on_device_of, warps

BLOCK = 1024  # numbers of a row for one program: feed-forward widths are mostly multiples of it, or waste little


@triton.jit
def _forward(x_ptr, y_ptr, width, x_ld, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(x_ptr + row * x_ld + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_ld + width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + columns, (gate * tl.sigmoid(gate) * up).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(x_ptr, d_y_ptr, d_x_ptr, width, x_ld, d_y_ld, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(x_ptr + row * x_ld + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_ld + width + columns, mask=inside, other=0.0).to(tl.float32)
    d_y = tl.load(d_y_ptr + row * d_y_ld + columns, mask=inside, other=0.0).to(tl.float32)
    open_ = tl.sigmoid(gate)
    d_gate, d_up = d_y * up * open_ * (1.0 + gate * (1.0 - open_)), d_y * gate * open_
    tl.store(d_x_ptr + row * 2 * width + columns, d_gate.to(d_x_ptr.dtype.element_ty), mask=inside)
    tl.store(d_x_ptr + row * 2 * width + width + columns, d_up.to(d_x_ptr.dtype.element_ty), mask=inside)


def swiglu(gate_up_T2F: Tensor) -> Tensor:
    """silu(gate) * up over [T, 2F], gate first. Returns [T, F]."""
    y_TF: Tensor = _SwiGLU.apply(gate_up_T2F)
    return y_TF


class _SwiGLU(torch.autograd.Function):
    """Keeps its input and computes silu again."""

    @staticmethod
    def forward(ctx: Any, gate_up_T2F: Tensor) -> Tensor:
        gate_up_T2F = dense_tokens(gate_up_T2F)
        num_tokens, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
        y_TF = torch.empty(num_tokens, width, dtype=gate_up_T2F.dtype, device=gate_up_T2F.device)
        with on_device_of(gate_up_T2F):
            _forward[num_tokens, triton.cdiv(width, BLOCK)](
                gate_up_T2F, y_TF, width, gate_up_T2F.stride(0), BLOCK=BLOCK, num_warps=warps(4 * BLOCK)
            )
        ctx.save_for_backward(gate_up_T2F)
        return y_TF

    @staticmethod
    def again(ctx: Any) -> Tensor:
        """The result."""
        return swiglu(*ctx.saved_tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TF: Tensor) -> Tensor:
        (gate_up_T2F,) = ctx.saved_tensors
        d_y_TF = dense_tokens(d_y_TF)
        num_tokens, width = d_y_TF.shape
        d_x_T2F = torch.empty(gate_up_T2F.shape, dtype=gate_up_T2F.dtype, device=gate_up_T2F.device)
        ld = (gate_up_T2F.stride(0), d_y_TF.stride(0))
        with on_device_of(gate_up_T2F):
            _backward[num_tokens, triton.cdiv(width, BLOCK)](
                gate_up_T2F, d_y_TF, d_x_T2F, width, *ld, BLOCK=BLOCK, num_warps=warps(4 * BLOCK)
            )
        return d_x_T2F
