"""The native operations of training as functions that can be differentiated.

Each saves what its backward pass needs and no more, and takes tensors that `fit`: plain ones, all of one type that the kernels know. Those
that are quick can be done `again` from what they saved, so that nobody has to keep their results (see `train.recompute`).

T tokens, D model width, E output width, V vocabulary, N query heads, K key/value heads, M heads of any kind, H head width, F feed-forward
width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemel.ops.cpu import training
from gemel.ops.cpu.training import Kernels

Gradients = tuple[Tensor | None, ...]


def fit(*tensors: Tensor | None) -> Kernels | None:
    """The kernels if they can take these tensors: plain ones on the CPU, all fp32 or all bf16, not empty, and not being compiled."""
    first = next(tensor for tensor in tensors if tensor is not None)
    if first.dtype not in training.FORMATS or torch.compiler.is_compiling():
        return None
    for tensor in tensors:
        if tensor is None:
            continue
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" and tensor.layout == torch.strided
        if not plain or tensor.dtype != first.dtype or tensor.numel() == 0:
            return None
    return training.kernels()


def _kernels() -> Kernels:
    kernels = training.kernels()
    assert kernels is not None
    return kernels


class Linear(torch.autograd.Function):
    """The product x W^T."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        """[T, D] and [E, D] to [T, E]."""
        x_TD, weight_ED = _rows(x_TD), _rows(weight_ED)
        ctx.save_for_backward(x_TD, weight_ED)
        return _kernels().gemm(x_TD, weight_ED.t(), x_TD.new_empty(len(x_TD), len(weight_ED)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TE: Tensor) -> Gradients:
        """Of both factors, or of the one that is trained."""
        x_TD, weight_ED = ctx.saved_tensors
        kernels, d_y_TE, d_x_TD, d_weight_ED = _kernels(), _rows(d_y_TE), None, None
        if ctx.needs_input_grad[0]:
            d_x_TD = kernels.gemm(d_y_TE, weight_ED, torch.empty(x_TD.shape, dtype=x_TD.dtype))
        if ctx.needs_input_grad[1]:
            d_weight_ED = kernels.gemm(d_y_TE.t(), x_TD, torch.empty(weight_ED.shape, dtype=weight_ED.dtype))
        return d_x_TD, d_weight_ED


class PackedAttention(torch.autograd.Function):
    """Keeps queries, keys, values, outputs, and one number per query and head."""

    @staticmethod
    def forward(ctx: Any, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, starts: Tensor, window: int, slopes_N: Tensor | None) -> Tensor:
        """`starts` int32, `slopes_N` fp32, window 0 for none."""
        q_TNH, k_TKH, v_TKH = _heads(q_TNH), _heads(k_TKH), _heads(v_TKH)
        if q_TNH.untyped_storage().data_ptr() != v_TKH.untyped_storage().data_ptr():
            v_TKH = v_TKH.contiguous()  # rotated heads lie elsewhere; what values were cut from need not be kept for them alone
        out_TNH, lse_NT = _kernels().packed_attention(q_TNH, k_TKH, v_TKH, starts, window, slopes_N)
        ctx.save_for_backward(q_TNH, k_TKH, v_TKH, starts, slopes_N, out_TNH, lse_NT)
        ctx.window = window
        return out_TNH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_TNH: Tensor) -> Gradients:
        """Weights of attention are computed again from what was kept."""
        q_TNH, k_TKH, v_TKH, starts, slopes_N, out_TNH, lse_NT = ctx.saved_tensors
        d_out_TNH = _heads(d_out_TNH)
        gradients = _kernels().packed_attention_backward(q_TNH, k_TKH, v_TKH, starts, ctx.window, slopes_N, out_TNH, lse_NT, d_out_TNH)
        return *gradients, None, None, None


class RMSNorm(torch.autograd.Function):
    """Keeps its input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """[T, D] or [T, M, D]; the weight fp32 or bf16."""
        x, scale_D = _heads(x), weight_D.float().contiguous()
        y, factor = _kernels().rms_norm(x, scale_D, eps)
        ctx.save_for_backward(x, scale_D, factor)
        ctx.weight_dtype, ctx.eps = weight_D.dtype, eps
        return y

    @staticmethod
    def again(ctx: Any) -> Tensor:
        """The result."""
        x, scale_D, _ = ctx.saved_tensors
        return _kernels().rms_norm(x, scale_D, ctx.eps)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> Gradients:
        """Of the input and the weight."""
        x, scale_D, factor = ctx.saved_tensors
        d_x, d_scale_D = _kernels().rms_norm_backward(x, scale_D, factor, _heads(d_y))
        return d_x, d_scale_D.to(ctx.weight_dtype), None


class Rope(torch.autograd.Function):
    """Keeps the angles, which all layers share."""

    @staticmethod
    def forward(ctx: Any, x_TMH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
        """[T, M, H]; the angles get no gradient."""
        if cos_T1H.stride() != sin_T1H.stride() or cos_T1H.stride(-1) != 1:
            cos_T1H, sin_T1H = cos_T1H.contiguous(), sin_T1H.contiguous()
        ctx.save_for_backward(cos_T1H, sin_T1H)
        return _kernels().rope(_heads(x_TMH), cos_T1H, sin_T1H, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TMH: Tensor) -> Gradients:
        """The gradient, rotated back."""
        return _kernels().rope(_heads(d_y_TMH), *ctx.saved_tensors, back=True), None, None


class SwiGLU(torch.autograd.Function):
    """Keeps its input and computes silu again."""

    @staticmethod
    def forward(ctx: Any, gate_up_T2F: Tensor) -> Tensor:
        """[T, 2F] to [T, F]."""
        gate_up_T2F = _rows(gate_up_T2F)
        ctx.save_for_backward(gate_up_T2F)
        return _kernels().swiglu(gate_up_T2F)

    @staticmethod
    def again(ctx: Any) -> Tensor:
        """The result."""
        return _kernels().swiglu(*ctx.saved_tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TF: Tensor) -> Gradients:
        """Of gate and up, side by side."""
        (gate_up_T2F,) = ctx.saved_tensors
        return (_kernels().swiglu(gate_up_T2F, _rows(d_y_TF)),)


class HeadCrossEntropy(torch.autograd.Function):
    """Gradients are computed with the loss, for a loss whose own gradient is 1; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        weights_T: Tensor,
        z_loss: float,
        label_smoothing: float,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the part of it that is z-loss, which has no gradient. Targets int32, weights fp32, both contiguous."""
        hidden_TD, weight_VD = _rows(hidden_TD), _rows(weight_VD)
        d_hidden_TD = d_weight_VD = None
        if differentiate and ctx.needs_input_grad[0]:
            d_hidden_TD = torch.empty(hidden_TD.shape, dtype=hidden_TD.dtype)
        if differentiate and ctx.needs_input_grad[1]:
            d_weight_VD = torch.empty(weight_VD.shape)
        loss, z = _kernels().head_cross_entropy(
            hidden_TD, weight_VD, targets_T, weights_T, z_loss, label_smoothing, d_hidden_TD, d_weight_VD
        )
        ctx.save_for_backward(d_hidden_TD, None if d_weight_VD is None else d_weight_VD.to(weight_VD.dtype))
        z_sum = torch.tensor(z, dtype=torch.float32)
        ctx.mark_non_differentiable(z_sum)
        return torch.tensor(loss, dtype=torch.float32), z_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> Gradients:
        """Times the loss's own gradient, which callers who put it into the weights have made 1: a pass over both is spared."""
        d_hidden_TD, d_weight_VD = ctx.saved_tensors
        if scale.item() != 1.0:
            d_hidden_TD = None if d_hidden_TD is None else d_hidden_TD * scale.to(d_hidden_TD.dtype)
            d_weight_VD = None if d_weight_VD is None else d_weight_VD * scale.to(d_weight_VD.dtype)
        return d_hidden_TD, d_weight_VD, None, None, None, None, None


def _rows(matrix: Tensor) -> Tensor:
    """The matrix itself if the numbers of a row follow one another, else a copy."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def _heads(tensor: Tensor) -> Tensor:
    """The tensor itself if the numbers of a token follow one another, else a copy; tokens may be apart."""
    dense = tensor.stride()[1:] == tensor[:1].contiguous().stride()[1:]
    return tensor if dense else tensor.contiguous()
