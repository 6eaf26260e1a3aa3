"""The head and the cross-entropy behind it, a slice of the tokens at a time.

The logits of a batch are its largest tensor by far: 4,096 tokens over a vocabulary of 49,152 are 805 MB in fp32, and the plain way holds
several of their size. Nobody needs them whole: a slice's logits give its loss and its gradients, and are gone. So gradients are computed
with the loss, in the forward pass, and the backward pass only scales them. That is one product of the head less than computing logits
again, and costs one matrix of the head's size (as in Liger Kernel, Hsu et al. 2024, arXiv 2410.10989).

T tokens, C tokens of a slice, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SLICE_BYTES = 2**25  # of a slice's logits in fp32: enough rows for a fast product, few enough to stay near the caches


def cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, weights_T: Tensor, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """See `train.head_cross_entropy`; sums are in fp32, or in fp64 where hidden states are."""
    differentiate = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    loss, z = _CrossEntropy.apply(hidden_TD, weight_VD, targets_T, weights_T.to(wide), z_loss, label_smoothing, differentiate)  # type: ignore[no-untyped-call]
    return loss, z


class _CrossEntropy(torch.autograd.Function):
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
        wide = weights_T.dtype
        num_rows = max(SLICE_BYTES // (wide.itemsize * len(weight_VD)), 1)
        loss, z = (torch.zeros((), dtype=wide, device=hidden_TD.device) for _ in range(2))
        if differentiate:
            grad_TD = torch.empty_like(hidden_TD)
            grad_VD = torch.zeros_like(weight_VD, dtype=wide)
        for start in range(0, len(hidden_TD), num_rows):
            rows = slice(start, start + num_rows)
            hidden_CD, targets_C, weights_C = hidden_TD[rows], targets_T[rows], weights_T[rows]
            logits_CV = (hidden_CD @ weight_VD.t()).to(wide)
            lse_C = logits_CV.logsumexp(-1)
            z_C = z_loss * weights_C * lse_C.square()
            loss += (weights_C * _cross_entropy(logits_CV, lse_C, targets_C, label_smoothing) + z_C).sum()
            z += z_C.sum()
            if differentiate:
                slope_CV = _slope(logits_CV, lse_C, targets_C, weights_C, z_loss, label_smoothing).to(hidden_TD.dtype)
                torch.mm(slope_CV, weight_VD, out=grad_TD[rows])
                _add_product(grad_VD, slope_CV.t(), hidden_CD)
        if differentiate:
            ctx.save_for_backward(grad_TD, grad_VD)
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_TD, grad_VD = ctx.saved_tensors
        if scale.device.type != "cpu" or scale != 1:  # what a caller who puts it into the weights has made of it
            grad_TD, grad_VD = grad_TD.mul_(scale), grad_VD.mul_(scale)
        return grad_TD, grad_VD.to(grad_TD.dtype), None, None, None, None, None


def _cross_entropy(logits_CV: Tensor, lse_C: Tensor, targets_C: Tensor, label_smoothing: float) -> Tensor:
    target_C = logits_CV.gather(-1, targets_C[:, None])[:, 0]
    if label_smoothing:
        target_C = (1 - label_smoothing) * target_C + label_smoothing * logits_CV.mean(-1)
    return lse_C - target_C


def _slope(logits_CV: Tensor, lse_C: Tensor, targets_C: Tensor, weights_C: Tensor, z_loss: float, label_smoothing: float) -> Tensor:
    """The gradient with respect to the logits, in their place."""
    slope_CV = logits_CV.sub_(lse_C[:, None]).exp_()
    slope_CV.mul_((weights_C * (1 + 2 * z_loss * lse_C))[:, None])
    if label_smoothing:
        slope_CV.sub_((weights_C * (label_smoothing / logits_CV.shape[1]))[:, None])
    return slope_CV.scatter_add_(-1, targets_C[:, None], (weights_C * (label_smoothing - 1))[:, None])


def _add_product(sum_VD: Tensor, slope_VC: Tensor, hidden_CD: Tensor) -> None:
    """Sums of narrow products are kept in fp32."""
    if hidden_CD.dtype == sum_VD.dtype:
        sum_VD.addmm_(slope_VC, hidden_CD)
    else:
        sum_VD += slope_VC @ hidden_CD
