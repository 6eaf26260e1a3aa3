"""The head and the cross-entropy behind it, a slice of the tokens at a time.

A slice's logits are a product of torch's. One kernel then reads them twice and leaves their gradient in their place, and two more products
turn that into the gradients of hidden states and weight; so gradients are computed with the loss, and the backward pass only scales them
(as in Liger Kernel, Hsu et al. 2024, arXiv 2410.10989). Nothing the size of tokens times vocabulary is ever held.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemel.ops.triton.launch import on_device_of, warps

SLICE_BYTES = 2**28  # of logits: thousands of rows, so that adding a slice's gradient of the weight to the others' costs little beside it
MAX_BLOCK = 8192  # logits that a program has in registers


@triton.jit
def _cross_entropy(
    logits_ptr,
    targets_ptr,
    weights_ptr,
    loss_ptr,
    z_ptr,
    vocab,
    z_loss,
    label_smoothing,
    SMOOTH: tl.constexpr,
    DIFFERENTIATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, columns = tl.program_id(0), tl.arange(0, BLOCK)
    row_ptr = logits_ptr + token.to(tl.int64) * vocab
    target, weight = tl.load(targets_ptr + token), tl.load(weights_ptr + token)
    top, total = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
    of_target, of_all = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    for first in range(0, vocab, BLOCK):
        inside = first + columns < vocab
        x = tl.load(row_ptr + first + columns, mask=inside, other=float("-inf")).to(tl.float32)
        highest = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - highest) + tl.sum(tl.exp(x - highest), axis=0)
        top = highest
        # A sum, not a load: what other threads of this program write below, nothing may still have to read.
        of_target += tl.sum(tl.where(first + columns == target, x, 0.0), axis=0)
        if SMOOTH:
            of_all += tl.sum(tl.where(inside, x, 0.0), axis=0)
    lse = top + tl.log(total)
    z = weight * z_loss * lse * lse
    tl.store(z_ptr + token, z)
    tl.store(loss_ptr + token, weight * (lse - (1.0 - label_smoothing) * of_target - label_smoothing * of_all / vocab) + z)
    if DIFFERENTIATE:
        slope, everywhere = 1.0 + 2.0 * z_loss * lse, label_smoothing / vocab
        for first in range(0, vocab, BLOCK):
            inside = first + columns < vocab
            x = tl.load(row_ptr + first + columns, mask=inside, other=0.0).to(tl.float32)
            wanted = everywhere + tl.where(first + columns == target, 1.0 - label_smoothing, 0.0)
            d_x = weight * (tl.exp(x - lse) * slope - wanted)
            tl.store(row_ptr + first + columns, d_x.to(logits_ptr.dtype.element_ty), mask=inside)


def head_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, weights_T: Tensor, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Two fp32 scalars: the sum over tokens of weight * (cross-entropy + z_loss * logsumexp**2), and how much of it is the second term.

    Only the first can be differentiated. All tokens are trained ones, and their targets are ids: `gemel.ops.train.head_cross_entropy` has
    seen to that.
    """
    loss, z = _HeadCrossEntropy.apply(
        hidden_TD, weight_VD, targets_T.contiguous(), weights_T.float().contiguous(), z_loss, label_smoothing, torch.is_grad_enabled()
    )
    return loss, z


class _HeadCrossEntropy(torch.autograd.Function):
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
        of_hidden, of_weight = (differentiate and needed for needed in ctx.needs_input_grad[:2])
        d_hidden_TD = torch.empty_like(hidden_TD) if of_hidden else None
        d_weight_VD = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device) if of_weight else None
        loss_T, z_T = (torch.empty_like(weights_T) for _ in range(2))
        for rows in _slices(len(hidden_TD), weight_VD):
            logits_CV = hidden_TD[rows] @ weight_VD.t()
            tokens = targets_T[rows], weights_T[rows], loss_T[rows], z_T[rows]
            _leave_gradient(logits_CV, *tokens, z_loss, label_smoothing, differentiate=of_hidden or of_weight)
            if d_hidden_TD is not None:
                torch.mm(logits_CV, weight_VD, out=d_hidden_TD[rows])
            if d_weight_VD is not None:
                _add_product(d_weight_VD, logits_CV.t(), hidden_TD[rows])
        ctx.save_for_backward(d_hidden_TD, d_weight_VD)
        ctx.dtype = weight_VD.dtype
        loss, z = loss_T.sum(), z_T.sum()
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Whether the scale is 1, as it mostly is, is on the device; asking would wait for all that is queued there.
        d_hidden_TD, d_weight_VD = ctx.saved_tensors
        if d_hidden_TD is not None:
            d_hidden_TD = torch.mul(d_hidden_TD, scale, out=torch.empty_like(d_hidden_TD))
        if d_weight_VD is not None:
            d_weight_VD = torch.mul(d_weight_VD, scale, out=torch.empty_like(d_weight_VD, dtype=ctx.dtype))
        return d_hidden_TD, d_weight_VD, None, None, None, None, None


def _slices(num_tokens: int, weight_VD: Tensor) -> list[slice]:
    """Equal shares of the tokens whose logits are at most `SLICE_BYTES`."""
    most = max(SLICE_BYTES // (weight_VD.itemsize * len(weight_VD)), 1)
    size = triton.cdiv(num_tokens, triton.cdiv(num_tokens, most))
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


def _leave_gradient(
    logits_CV: Tensor,
    targets_C: Tensor,
    weights_C: Tensor,
    loss_C: Tensor,
    z_C: Tensor,
    z_loss: float,
    label_smoothing: float,
    *,
    differentiate: bool,
) -> None:
    """Fill in each token's loss and z-loss, and put the gradient of their sum in the place of the logits."""
    num_tokens, vocab = logits_CV.shape
    block = min(triton.next_power_of_2(vocab), MAX_BLOCK)
    how = {"SMOOTH": label_smoothing != 0, "DIFFERENTIATE": differentiate, "BLOCK": block, "num_warps": warps(block)}
    with on_device_of(logits_CV):
        _cross_entropy[num_tokens,](logits_CV, targets_C, weights_C, loss_C, z_C, vocab, z_loss, label_smoothing, **how)


def _add_product(sum_VD: Tensor, slope_VC: Tensor, hidden_CD: Tensor) -> None:
    """Sums of narrow products are kept in fp32."""
    if hidden_CD.dtype == torch.float32:
        sum_VD.addmm_(slope_VC, hidden_CD)
    else:
        sum_VD += slope_VC @ hidden_CD
