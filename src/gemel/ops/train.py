"""Operations of training: differentiable, with forward and backward passes of our own on CPUs.

Each has a plain torch version, which is the truth. The native ones are used where the kernels are there and the types fit; the others
everywhere else: other devices, other types, tensors that are not plain ones (sharded over devices, say).

T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from gemel.ops.cpu import training
from gemel.ops.cpu.training import Kernels

SLICE_BYTES = 2**26  # of logits that torch holds at a time


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


def _rows(matrix: Tensor) -> Tensor:
    """The matrix itself if its rows are contiguous, else a copy."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()
