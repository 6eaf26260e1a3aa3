"""The operations of training: each picks, call by call, the fastest version that can do it.

There are native ones for CPUs (`cpu.autograd`) and ones in Triton for GPUs (`triton`), with forward and backward passes of their own. They
are used where the tensors fit, for validation as for steps; the plain ones, which are the truth, everywhere else: in inference mode, on
other devices, for other types, for tensors that are not plain ones (sharded over devices, say), and under a compiler, which makes kernels
of its own out of plain ones.

T tokens, D model width, E output width, N query heads, K key/value heads, M heads of any kind, H head width, F feed-forward width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from gemel.ops import activation, hardware, head, norm, rotary, triton
from gemel.ops.causal import attention
from gemel.ops.cpu import autograd
from gemel.ops.cpu.autograd import fit


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last axis, see `norm.rms_norm`."""
    fits = _trains() and x.dim() in (2, 3) and weight_D.shape == x.shape[-1:]
    if fits and triton.takes(x) and triton.takes(weight_D):
        return triton.rms_norm(x, weight_D, eps)
    if not (fits and fit(x) and fit(weight_D)):
        return norm.rms_norm(x, weight_D, eps)
    y: Tensor = autograd.RMSNorm.apply(x, weight_D, eps)  # type: ignore[no-untyped-call]
    return y


def rope(x_TMH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
    """Heads rotated by their positions' angles, which get no gradient, see `rotary.rope`."""
    fits = _trains() and x_TMH.dim() == 3 and not x_TMH.shape[-1] % 2
    fits = (
        fits and cos_T1H.shape == sin_T1H.shape == (len(x_TMH), 1, x_TMH.shape[-1]) and not (cos_T1H.requires_grad or sin_T1H.requires_grad)
    )
    if fits and triton.takes(x_TMH, cos_T1H, sin_T1H):
        return triton.rope(x_TMH, cos_T1H, sin_T1H)
    if not (fits and fit(x_TMH, cos_T1H, sin_T1H)):
        return rotary.rope(x_TMH, cos_T1H, sin_T1H)
    y_TMH: Tensor = autograd.Rope.apply(x_TMH, cos_T1H, sin_T1H)  # type: ignore[no-untyped-call]
    return y_TMH


def swiglu(gate_up_T2F: Tensor) -> Tensor:
    """silu(gate) * up, see `activation.swiglu`."""
    fits = _trains() and gate_up_T2F.dim() == 2
    if fits and triton.takes(gate_up_T2F):
        return triton.swiglu(gate_up_T2F)
    if not (fits and fit(gate_up_T2F)):
        return activation.swiglu(gate_up_T2F)
    y_TF: Tensor = autograd.SwiGLU.apply(gate_up_T2F)  # type: ignore[no-untyped-call]
    return y_TF


def linear(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """The product x W^T + b. The native one is used for types in which it is faster than torch's, see `products_are_native`."""
    if _trains() and x_TD.dim() == 2:
        cast_TD, cast_ED = _cast(x_TD, weight_ED)
        if products_are_native(cast_TD.dtype) and fit(cast_TD, cast_ED):
            y_TE: Tensor = autograd.Linear.apply(cast_TD, cast_ED)  # type: ignore[no-untyped-call]
            return y_TE if bias_E is None else y_TE + bias_E.to(y_TE.dtype)
    return F.linear(x_TD, weight_ED, bias_E)


def product(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, *, add: bool = False) -> Tensor:
    """The product a b in the type of its factors, written to `out_MN`, or added to it, which may be fp32 where they are not.

    Without gradients: the part of `linear` for those who write their own. Either factor may be a transposed view.
    """
    if products_are_native(a_MK.dtype) and (kernels := fit(a_MK, b_KN)):
        return kernels.gemm(a_MK, b_KN, out_MN, add=add)
    if out_MN.dtype == a_MK.dtype and not add:
        return torch.mm(a_MK, b_KN, out=out_MN)
    result_MN = a_MK @ b_KN
    return out_MN.add_(result_MN) if add else out_MN.copy_(result_MN)


@functools.cache
def products_are_native(dtype: torch.dtype) -> bool:
    """Whether native products of this type are faster than torch's. A matter of the processor alone: a resumed run must decide alike.

    In bf16 they are where it has no instructions for it and torch emulates them. In fp32 MKL, which torch calls, is hard to beat (on a
    Zen 3 it was as fast, or up to 40% faster), but leaves the wider half of AMD's vectors unused: 231 of 539 GFLOP/s were measured on a
    Zen 5.
    """
    if dtype == torch.bfloat16:
        return not hardware.native_bf16()
    return dtype == torch.float32 and hardware.vendor() == "AuthenticAMD" and "avx512_bf16" in hardware.isa()


def packed_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, starts: Sequence[int], window: int | None = None, slopes_N: Tensor | None = None
) -> Tensor:
    """Causal attention within documents that are packed end to end: document d is tokens starts[d] to starts[d + 1]. Returns [T, N, H].

    N is a multiple of K: each key head serves a group of query heads. A query sees `window` positions, itself included, or all before it;
    ALiBi's `slopes_N` (fp32) penalize distance. Natively scores are never held (Dao 2023, "FlashAttention-2", arXiv 2307.08691). A
    document's result does not depend on the others, to the last bit.
    """
    assert starts[0] == 0 and starts[-1] == len(q_TNH), f"documents are from {starts[0]} to {starts[-1]}, there are {len(q_TNH)} tokens"
    q_TNH, k_TKH, v_TKH = _cast(q_TNH, k_TKH, v_TKH)
    if triton.takes(q_TNH, k_TKH, v_TKH):
        return triton.packed_attention(q_TNH, k_TKH, v_TKH, starts, window, slopes_N)
    if not fit(q_TNH, k_TKH, v_TKH):
        return packed_attention_reference(q_TNH, k_TKH, v_TKH, starts, window, slopes_N)
    bounds, slopes_N = torch.tensor(starts, dtype=torch.int32), None if slopes_N is None else slopes_N.float().contiguous()
    out_TNH: Tensor = autograd.PackedAttention.apply(q_TNH, k_TKH, v_TKH, bounds, window or 0, slopes_N)  # type: ignore[no-untyped-call]
    return out_TNH


def packed_attention_reference(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, starts: Sequence[int], window: int | None = None, slopes_N: Tensor | None = None
) -> Tensor:
    """The same in torch, document by document."""
    outs = [attention(q_TNH[a:b], k_TKH[a:b], v_TKH[a:b], window=window, slopes_N=slopes_N) for a, b in pairwise(starts)]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def head_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, weights_T: Tensor, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Two fp32 scalars: the sum over tokens of weight * (cross-entropy + z_loss * logsumexp**2), and how much of it is the second term.

    Only the first can be differentiated, with respect to hidden states and weight. Logits are hidden weight^T, and there are never more
    than a slice of them. With label smoothing s the target is 1 - s of the one token and s / V of each. Products are done in the type of
    the hidden states, or autocast's, everything behind them in fp32. Tokens of weight 0 cost nothing, and their targets may be anything;
    those of the others must be ids (`IndexError`).
    """
    hidden_TD, weight_VD = _cast(hidden_TD, weight_VD)
    trained = weights_T.nonzero()[:, 0]
    if len(trained) < len(weights_T):
        hidden_TD, targets_T, weights_T = hidden_TD[trained], targets_T[trained], weights_T[trained]
    differentiate = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    on_gpu = triton.takes(hidden_TD, weight_VD)
    if not (on_gpu or fit(hidden_TD, weight_VD)):
        return head.cross_entropy(hidden_TD, weight_VD, targets_T, weights_T, z_loss, label_smoothing)
    low, high = (int(bound) for bound in targets_T.aminmax())
    if low < 0 or high >= len(weight_VD):
        raise IndexError(f"targets are from {low} to {high}, the vocabulary has {len(weight_VD)} entries")
    if on_gpu:
        return triton.head_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T, z_loss, label_smoothing)
    loss, z = autograd.HeadCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_TD, weight_VD, targets_T.int().contiguous(), weights_T.float().contiguous(), z_loss, label_smoothing, differentiate
    )
    return loss, z


def _trains() -> bool:
    """Whether this may be a step or a validation: not inference mode, and not what a compiler looks at, which cannot ask about it."""
    return not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled())


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast makes of the arguments of a product."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor.to(dtype) for tensor in tensors)
