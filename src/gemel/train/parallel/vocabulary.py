"""Embedding and head of which every rank has some rows, and the cross-entropy over all of them.

No rank ever sees another's logits. A slice of tokens needs three numbers per token from all: the largest logit, then together the sum of
exponentials, the target's logit and, for label smoothing, the sum of logits (Shoeybi et al. 2019, arXiv 1909.08053). Gradients are computed
with the loss, a slice at a time, as in the loss of one rank.

T tokens, C tokens of a slice, D model width, V rows of the vocabulary that this rank has.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gemel.model.shard import rows_of
from gemel.train.parallel.mesh import Axis

SLICE_BYTES = 2**25  # of a slice's logits in fp32


def embedding(weight_VD: Tensor, tokens_T: Tensor, num_rows: int, axis: Axis) -> Tensor:
    """The rows of this rank, zeros for tokens of others: summed over ranks it is the embedding."""
    start, stop = rows_of(num_rows, axis.rank, axis.size)
    elsewhere_T1 = ((tokens_T < start) | (tokens_T >= stop))[:, None]
    return F.embedding((tokens_T - start).clamp_(0, max(stop - start - 1, 0)), weight_VD).masked_fill(elsewhere_T1, 0.0)


def cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    weights_T: Tensor,
    num_rows: int,
    axis: Axis,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Two fp32 scalars, the same on every rank, of which only the first can be differentiated: the sum over tokens of weight *
    (cross-entropy + z_loss * logsumexp**2), and how much of it is the second term.

    The gradient of the hidden states is what this rank's rows add to it: they have to come from `collectives.enter`.
    """
    kind = hidden_TD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_TD.dtype
    trained = weights_T.nonzero()[:, 0]
    if len(trained) < len(weights_T):
        hidden_TD, targets_T, weights_T = hidden_TD[trained], targets_T[trained], weights_T[trained]
    place = (num_rows, axis, z_loss, label_smoothing, torch.is_grad_enabled())
    loss, z = _CrossEntropy.apply(hidden_TD.to(dtype), weight_VD.to(dtype), targets_T, weights_T.float(), *place)  # type: ignore[no-untyped-call]
    return loss, z


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        weights_T: Tensor,
        num_rows: int,
        axis: Axis,
        z_loss: float,
        label_smoothing: float,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor]:
        first, last = rows_of(num_rows, axis.rank, axis.size)
        loss, z = (torch.zeros((), dtype=torch.float32, device=hidden_TD.device) for _ in range(2))
        grad_TD = torch.empty_like(hidden_TD) if differentiate else None
        grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if differentiate else None
        step = max(SLICE_BYTES // (4 * -(-num_rows // axis.size)), 1)  # of the largest part: slices are the same everywhere
        for start in range(0, len(hidden_TD), step):
            rows = slice(start, start + step)
            hidden_CD, weights_C = hidden_TD[rows], weights_T[rows]
            logits_CV = (hidden_CD @ weight_VD.t()).float()
            here_C = (targets_T[rows] >= first) & (targets_T[rows] < last)
            targets_C = (targets_T[rows] - first).clamp_(0, max(last - first - 1, 0))
            lse_C, target_C, mean_C = _exchange(logits_CV, targets_C, here_C, num_rows, axis)
            z_C = z_loss * weights_C * lse_C.square()
            loss += (weights_C * (lse_C - (1 - label_smoothing) * target_C - label_smoothing * mean_C) + z_C).sum()
            z += z_C.sum()
            if grad_TD is not None and grad_VD is not None:
                slope_CV = logits_CV.sub_(lse_C[:, None]).exp_().mul_((weights_C * (1 + 2 * z_loss * lse_C))[:, None])
                if label_smoothing:
                    slope_CV.sub_((weights_C * (label_smoothing / num_rows))[:, None])
                slope_CV.scatter_add_(-1, targets_C[:, None], (here_C * weights_C * (label_smoothing - 1))[:, None])
                slope_CV = slope_CV.to(hidden_TD.dtype)
                torch.mm(slope_CV, weight_VD, out=grad_TD[rows])
                grad_VD += slope_CV.t() @ hidden_CD
        if grad_TD is not None:
            ctx.save_for_backward(grad_TD, grad_VD)
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_TD, grad_VD = (grad * scale for grad in ctx.saved_tensors)
        return grad_TD.to(ctx.saved_tensors[0].dtype), grad_VD.to(grad_TD.dtype), *[None] * 7


def _exchange(logits_CV: Tensor, targets_C: Tensor, here_C: Tensor, num_rows: int, axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """Over the whole vocabulary: log of the sum of exponentials, logit of the target, mean logit."""
    largest_C = logits_CV.amax(-1) if logits_CV.shape[1] else logits_CV.new_full((len(logits_CV),), -torch.inf)
    dist.all_reduce(largest_C, dist.ReduceOp.MAX, group=axis.group)
    sum_C = (logits_CV - largest_C[:, None]).exp_().sum(-1)
    target_C = logits_CV.gather(-1, targets_C[:, None])[:, 0] * here_C
    sums_3C = torch.stack((sum_C, target_C, logits_CV.sum(-1)))
    dist.all_reduce(sums_3C, group=axis.group)
    return sums_3C[0].log() + largest_C, sums_3C[1], sums_3C[2] / num_rows
