"""Operations of training: differentiable, with forward and backward passes of our own on CPUs.

Each has a plain torch version, which is the truth. The native ones are used where the kernels are there and the types fit; the others
everywhere else: other devices, other types, tensors that are not plain ones (sharded over devices, say).

T tokens, D model width, V vocabulary, N query heads, K key/value heads, M heads of any kind, H head width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from gemel import ops as reference
from gemel.ops import hardware
from gemel.ops.causal import attention
from gemel.ops.cpu import training
from gemel.ops.cpu.training import Kernels

SLICE_BYTES = 2**26  # of logits that torch holds at a time


def products_are_native(dtype: torch.dtype) -> bool:
    """Whether our products are faster than torch's here: in bf16 where the processor has no instructions for it and torch emulates them."""
    return dtype == torch.bfloat16 and not hardware.native_bf16()


def native_kernels(*tensors: Tensor | None) -> Kernels | None:
    """The kernels if they can take these tensors: plain ones on the CPU, all fp32 or all bf16, not empty."""
    first = next(tensor for tensor in tensors if tensor is not None)
    if first.dtype not in training.FORMATS:
        return None
    for tensor in tensors:
        if tensor is None:
            continue
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" and tensor.layout == torch.strided
        if not plain or tensor.dtype != first.dtype or tensor.numel() == 0:
            return None
    return training.kernels()


# --- head and loss ------------------------------------------------------------------------------------------------------------------


def head_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, weights_T: Tensor, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Two fp32 scalars: the sum over tokens of weight * (cross-entropy + z_loss * logsumexp**2), and how much of it is the second term.

    Logits are hidden weight^T; there are never more than a slice of them. With label smoothing s the target is 1 - s of the one token and
    s / V of each. Tokens of weight 0 cost nothing, and their targets may be anything; those of the others are ids. Only the first result
    can be differentiated, with respect to hidden states and weight.
    """
    trained = weights_T.nonzero()[:, 0]
    if len(trained) < len(weights_T):
        hidden_TD, targets_T, weights_T = hidden_TD[trained], targets_T[trained], weights_T[trained]
    kernels = native_kernels(hidden_TD, weight_VD)
    if kernels is None:
        return head_cross_entropy_reference(hidden_TD, weight_VD, targets_T, weights_T, z_loss, label_smoothing)
    low, high = (int(bound) for bound in targets_T.aminmax())
    if low < 0 or high >= len(weight_VD):
        raise IndexError(f"targets are from {low} to {high}, the vocabulary has {len(weight_VD)} entries")
    loss, z = _HeadCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_TD,
        weight_VD,
        targets_T.int().contiguous(),
        weights_T.float().contiguous(),
        z_loss,
        label_smoothing,
        torch.is_grad_enabled(),
        kernels,
    )
    return loss, z


def head_cross_entropy_reference(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, weights_T: Tensor, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The same in torch: slices of tokens, whose logits are computed again for the gradients."""
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    loss, z = (torch.zeros((), dtype=wide, device=hidden_TD.device) for _ in range(2))
    num_rows = max(SLICE_BYTES // (wide.itemsize * len(weight_VD)), 1)
    for hidden_CD, targets_C, weights_C in zip(
        hidden_TD.split(num_rows), targets_T.split(num_rows), weights_T.split(num_rows), strict=True
    ):
        slice_loss, slice_z = checkpoint(
            _slice_loss, hidden_CD, weight_VD, targets_C, weights_C.to(wide), z_loss, label_smoothing, use_reentrant=False
        )
        loss, z = loss + slice_loss, z + slice_z
    return loss, z.detach()


def _slice_loss(
    hidden_CD: Tensor, weight_VD: Tensor, targets_C: Tensor, weights_C: Tensor, z_loss: float, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    logits_CV = (hidden_CD @ weight_VD.t()).to(weights_C.dtype)
    z = z_loss * (weights_C * logits_CV.logsumexp(-1).square()).sum()
    loss_C = F.cross_entropy(logits_CV, targets_C.long(), reduction="none", label_smoothing=label_smoothing)
    return (weights_C * loss_C).sum() + z, z


class _HeadCrossEntropy(torch.autograd.Function):
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
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor]:
        hidden_TD, weight_VD = _rows(hidden_TD), _rows(weight_VD)
        d_hidden_TD = d_weight_VD = None
        if differentiate and ctx.needs_input_grad[0]:
            d_hidden_TD = torch.empty(hidden_TD.shape, dtype=hidden_TD.dtype)
        if differentiate and ctx.needs_input_grad[1]:
            d_weight_VD = torch.empty(weight_VD.shape)
        loss, z = kernels.head_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T, z_loss, label_smoothing, d_hidden_TD, d_weight_VD)
        if d_weight_VD is not None:
            d_weight_VD = d_weight_VD.to(weight_VD.dtype)
        ctx.save_for_backward(d_hidden_TD, d_weight_VD)
        z_sum = torch.tensor(z, dtype=torch.float32)
        ctx.mark_non_differentiable(z_sum)
        return torch.tensor(loss, dtype=torch.float32), z_sum

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden_TD, d_weight_VD = ctx.saved_tensors
        if scale.item() != 1.0:  # what a caller can arrange through the weights, and save a pass over both
            d_hidden_TD = None if d_hidden_TD is None else d_hidden_TD * scale.to(d_hidden_TD.dtype)
            d_weight_VD = None if d_weight_VD is None else d_weight_VD * scale.to(d_weight_VD.dtype)
        return d_hidden_TD, d_weight_VD, None, None, None, None, None, None


# --- attention ----------------------------------------------------------------------------------------------------------------------


def packed_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, starts: Sequence[int], window: int | None = None, slopes_N: Tensor | None = None
) -> Tensor:
    """Causal attention within documents that are packed end to end: document d is tokens starts[d] to starts[d + 1]. Returns [T, N, H].

    N is a multiple of K: each key head serves a group of query heads. A query sees `window` positions, itself included, or all before it;
    ALiBi's `slopes_N` (fp32) penalize distance. Scores are never held (Dao 2023, "FlashAttention-2", arXiv 2307.08691).
    """
    assert starts[0] == 0 and starts[-1] == len(q_TNH), f"documents are from {starts[0]} to {starts[-1]}, there are {len(q_TNH)} tokens"
    kernels = native_kernels(q_TNH, k_TKH, v_TKH)
    if kernels is None:
        return packed_attention_reference(q_TNH, k_TKH, v_TKH, starts, window, slopes_N)
    bounds = torch.tensor(starts, dtype=torch.int32)
    slopes_N = None if slopes_N is None else slopes_N.float().contiguous()
    out_TNH: Tensor = _PackedAttention.apply(q_TNH, k_TKH, v_TKH, bounds, window or 0, slopes_N, kernels)  # type: ignore[no-untyped-call]
    return out_TNH


def packed_attention_reference(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, starts: Sequence[int], window: int | None = None, slopes_N: Tensor | None = None
) -> Tensor:
    """The same in torch, document by document."""
    return torch.cat([attention(q_TNH[a:b], k_TKH[a:b], v_TKH[a:b], window=window, slopes_N=slopes_N) for a, b in pairwise(starts)])


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, starts: Tensor, window: int, slopes_N: Tensor | None, kernels: Kernels
    ) -> Tensor:
        inputs = (*map(_heads, (q_TNH, k_TKH, v_TKH)), starts, window, slopes_N)
        out_TNH, lse_NT = kernels.packed_attention(*inputs)
        ctx.save_for_backward(*inputs[:4], slopes_N, out_TNH, lse_NT)
        ctx.window, ctx.kernels = window, kernels
        return out_TNH

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, d_out_TNH: Tensor) -> tuple[Tensor | None, ...]:
        q_TNH, k_TKH, v_TKH, starts, slopes_N, out_TNH, lse_NT = ctx.saved_tensors
        gradients = ctx.kernels.packed_attention_backward(
            q_TNH, k_TKH, v_TKH, starts, ctx.window, slopes_N, out_TNH, lse_NT, _heads(d_out_TNH)
        )
        return *gradients, None, None, None, None


# --- between the products -----------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root mean square norm, x / sqrt(mean(x**2) + eps) * weight over the last axis of [T, D] or [T, M, D]."""
    kernels = native_kernels(x) if _fits_norm(x, weight_D) else None
    if kernels is None:
        return reference.rms_norm(x, weight_D, eps)
    y: Tensor = _RMSNorm.apply(x, weight_D, eps, kernels)  # type: ignore[no-untyped-call]
    return y


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of both and its norm: what stands between two products of a decoder, in one pass."""
    kernels = native_kernels(x_TD, residual_TD) if _fits_norm(x_TD, weight_D) and x_TD.shape == residual_TD.shape else None
    if kernels is None:
        sum_TD = x_TD + residual_TD
        return sum_TD, reference.rms_norm(sum_TD, weight_D, eps)
    sum_TD, y_TD = _AddRMSNorm.apply(x_TD, residual_TD, weight_D, eps, kernels)  # type: ignore[no-untyped-call]
    return sum_TD, y_TD


def _fits_norm(x: Tensor, weight_D: Tensor) -> bool:
    return x.dim() in (2, 3) and weight_D.shape == x.shape[-1:] and native_kernels(weight_D) is not None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, kernels: Kernels) -> Tensor:
        x, scale_D = _heads(x), weight_D.float().contiguous()
        _, y, factor = kernels.rms_norm(x, None, scale_D, eps)
        ctx.save_for_backward(x, scale_D, factor)
        ctx.dtype, ctx.kernels = weight_D.dtype, kernels
        return y

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, scale_D, factor = ctx.saved_tensors
        d_x, d_scale_D = ctx.kernels.rms_norm_backward(x, scale_D, factor, _heads(d_y), None)
        return d_x, d_scale_D.to(ctx.dtype), None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, kernels: Kernels) -> tuple[Tensor, Tensor]:
        scale_D = weight_D.float().contiguous()
        sum_TD, y_TD, factor = kernels.rms_norm(_heads(x_TD), _heads(residual_TD), scale_D, eps)
        ctx.save_for_backward(sum_TD, scale_D, factor)
        ctx.dtype, ctx.kernels = weight_D.dtype, kernels
        return sum_TD, y_TD

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, d_sum_TD: Tensor, d_y_TD: Tensor) -> tuple[Tensor | None, ...]:
        sum_TD, scale_D, factor = ctx.saved_tensors
        d_TD, d_scale_D = ctx.kernels.rms_norm_backward(sum_TD, scale_D, factor, _heads(d_y_TD), _heads(d_sum_TD))
        return d_TD, d_TD, d_scale_D.to(ctx.dtype), None, None


def rope(x_TMH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
    """Pair (i, i + H/2) of every head rotated by its angle, sines signed as in `ops.rope_table`. The angles get no gradient."""
    angles_fit = x_TMH.dim() == 3 and cos_T1H.shape == sin_T1H.shape == (len(x_TMH), 1, x_TMH.shape[-1]) and x_TMH.shape[-1] % 2 == 0
    kernels = native_kernels(x_TMH, cos_T1H, sin_T1H) if angles_fit else None
    if kernels is None or cos_T1H.requires_grad or sin_T1H.requires_grad:
        return reference.rope(x_TMH, cos_T1H, sin_T1H)
    y_TMH: Tensor = _Rope.apply(x_TMH, cos_T1H, sin_T1H, kernels)  # type: ignore[no-untyped-call]
    return y_TMH


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TMH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor, kernels: Kernels) -> Tensor:
        if cos_T1H.stride() != sin_T1H.stride() or cos_T1H.stride(-1) != 1:
            cos_T1H, sin_T1H = cos_T1H.contiguous(), sin_T1H.contiguous()
        ctx.save_for_backward(cos_T1H, sin_T1H)
        ctx.kernels = kernels
        return kernels.rope(_heads(x_TMH), cos_T1H, sin_T1H, back=False)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, d_y_TMH: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.kernels.rope(_heads(d_y_TMH), *ctx.saved_tensors, back=True), None, None, None


def swiglu(gate_up_T2F: Tensor) -> Tensor:
    """silu(gate) * up over [T, 2F], gate first. Returns [T, F]. The backward pass computes silu again, so only the input is kept."""
    kernels = native_kernels(gate_up_T2F) if gate_up_T2F.dim() == 2 else None
    if kernels is None:
        return reference.swiglu(gate_up_T2F)
    y_TF: Tensor = _SwiGLU.apply(gate_up_T2F, kernels)  # type: ignore[no-untyped-call]
    return y_TF


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_T2F: Tensor, kernels: Kernels) -> Tensor:
        gate_up_T2F = _rows(gate_up_T2F)
        ctx.save_for_backward(gate_up_T2F)
        ctx.kernels = kernels
        return kernels.swiglu(gate_up_T2F)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, d_y_TF: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.kernels.swiglu(*ctx.saved_tensors, _rows(d_y_TF)), None


# --- products -----------------------------------------------------------------------------------------------------------------------


def linear(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """The product x W^T + b over [T, D], by whichever of torch's products and ours is faster on this processor: see `products_are_native`."""
    fits = x_TD.dim() == 2 and products_are_native(x_TD.dtype)
    kernels = native_kernels(x_TD, weight_ED) if fits else None
    if kernels is None:
        return F.linear(x_TD, weight_ED, bias_E)
    y_TE: Tensor = _Linear.apply(x_TD, weight_ED, kernels)  # type: ignore[no-untyped-call]
    return y_TE if bias_E is None else y_TE + bias_E


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor, kernels: Kernels) -> Tensor:
        x_TD, weight_ED = _rows(x_TD), _rows(weight_ED)
        ctx.save_for_backward(x_TD, weight_ED)
        ctx.kernels = kernels
        return kernels.gemm(x_TD, weight_ED.t(), x_TD.new_empty(len(x_TD), len(weight_ED)))

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, d_y_TE: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_ED = ctx.saved_tensors
        d_y_TE, d_x_TD, d_weight_ED = _rows(d_y_TE), None, None
        if ctx.needs_input_grad[0]:
            d_x_TD = ctx.kernels.gemm(d_y_TE, weight_ED, torch.empty_like(x_TD, memory_format=torch.contiguous_format))
        if ctx.needs_input_grad[1]:
            d_weight_ED = ctx.kernels.gemm(d_y_TE.t(), x_TD, torch.empty_like(weight_ED, memory_format=torch.contiguous_format))
        return d_x_TD, d_weight_ED, None


# --- optimizer ----------------------------------------------------------------------------------------------------------------------


class Moved(NamedTuple):
    """A tensor that AdamW moves, with all that belongs to it. Moments and the master copy, if there is one, are fp32."""

    weight: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    master: Tensor | None = None
    decay: float = 0.0


def adamw(tensors: Sequence[Moved], *, rate: float, betas: tuple[float, float], eps: float, step: int, gradient_scale: float = 1.0) -> None:
    """One step of AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) over all tensors, in place; steps count from 1.

    Weights are fp32, or bf16 as the rounded images of their masters. Gradients, fp32 or bf16, are multiplied with `gradient_scale` on the
    way, which is where clipping costs nothing.
    """
    kernels = training.kernels() if all(map(_movable, tensors)) else None
    if kernels is None:
        return adamw_reference(tensors, rate=rate, betas=betas, eps=eps, step=step, gradient_scale=gradient_scale)
    parts = [
        training.AdamWPart(
            *(one.weight.numel(), one.weight.data_ptr(), None if one.master is None else one.master.data_ptr(), one.gradient.data_ptr()),
            *(one.first.data_ptr(), one.second.data_ptr()),
            *(training.FORMATS[one.weight.dtype], training.FORMATS[one.gradient.dtype], one.decay),
        )
        for one in tensors
    ]
    kernels.adamw(training.AdamW(rate, *betas, eps, gradient_scale, step), parts)
    return None


def adamw_reference(
    tensors: Sequence[Moved], *, rate: float, betas: tuple[float, float], eps: float, step: int, gradient_scale: float = 1.0
) -> None:
    """The same in torch, tensor by tensor."""
    beta1, beta2 = betas
    with torch.no_grad():
        for weight, gradient, first, second, master, decay in tensors:
            moved, gradient = weight if master is None else master, gradient.to(first.dtype) * gradient_scale
            first.lerp_(gradient, 1 - beta1)
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            root = second.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
            moved.mul_(1 - rate * decay).addcdiv_(first, root, value=-rate / (1 - beta1**step))
            if master is not None:
                weight.copy_(master)


def _movable(one: Moved) -> bool:
    wide = [one.first, one.second] + ([one.weight] if one.master is None else [one.master])
    shaped = all(tensor.is_contiguous() and tensor.shape == one.weight.shape for tensor in (*wide, one.weight, one.gradient))
    fit = native_kernels(*wide) is not None and native_kernels(one.weight) is not None and native_kernels(one.gradient) is not None
    return shaped and fit and one.first.dtype == torch.float32


def _rows(matrix: Tensor) -> Tensor:
    """The matrix itself if its rows are contiguous, else a copy."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def _heads(tensor: Tensor) -> Tensor:
    """The tensor itself if the numbers of a token follow one another, else a copy; tokens may be apart."""
    dense = tensor.stride()[1:] == tensor[:1].contiguous().stride()[1:]
    return tensor if dense else tensor.contiguous()
