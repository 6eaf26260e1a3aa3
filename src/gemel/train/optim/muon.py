"""Muon (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982).

Principle: the momentum of a matrix is replaced by the nearest matrix whose singular values are all about 1, so that directions in which
gradients are rarely large are learnt as fast as the others. A quintic iteration of Newton and Schulz finds it with matrix products alone.
Trades: half of AdamW's state and fewer steps to the same loss, for three matrix products an iteration, which cost the same however small
the batch was. Embeddings, the head and vectors are AdamW's.

What lies fused in one matrix (queries, keys and values; gate and up) is orthogonalized part by part, as if it were not fused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gemel.config import optim
from gemel.train.optim.method import At, Slot

# The quintic x -> a x + b x^3 + c x^5 of Jordan et al.: steepest at zero of those that map [0, 1] into about [0.7, 1.2] when repeated.
QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon:
    """Of one parameter with two dimensions; `sections` are the heights of its fused parts."""

    elementwise = False

    def __init__(self, config: optim.Muon, device: torch.device, sections: Sequence[int] = ()):
        self.config, self.sections = config, sections
        bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type != "cpu")
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    def slots(self, shape: torch.Size) -> tuple[Slot, ...]:
        """The momentum."""
        return (Slot("momentum", shape),)

    def update(self, w: Tensor, g: Tensor, state: list[Tensor], at: At) -> None:
        """See `Method.update`."""
        momentum = state[0].lerp_(g, 1.0 - self.config.momentum)
        sums = torch.lerp(g, momentum, self.config.momentum) if self.config.nesterov else momentum
        w.mul_(at.keep)
        heights = list(self.sections) or [w.shape[0]]
        for part, moved in zip(torch.split(w, heights), torch.split(sums, heights), strict=True):
            direction = orthogonal(moved, self.config.iterations, self.config.eps, self.dtype)
            part.add_(direction, alpha=-at.lr * self._scale(*moved.shape))

    def _scale(self, num_rows: int, num_columns: int) -> float:
        if self.config.scale == "match_rms":
            return 0.2 * math.sqrt(max(num_rows, num_columns))  # 0.2 is about the root mean square of AdamW's updates
        return math.sqrt(max(1.0, num_rows / num_columns))


def orthogonal(x: Tensor, iterations: int, eps: float, dtype: torch.dtype) -> Tensor:
    """About U V^T of `x` = U S V^T, in `dtype`: singular values between 0.7 and 1.2 after 5 iterations."""
    a, b, c = QUINTIC
    tall = x.shape[0] > x.shape[1]
    y = x.to(dtype, copy=True)
    y = y.T if tall else y
    y.div_(torch.linalg.vector_norm(y).clamp_(min=eps))
    for _ in range(iterations):
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.T if tall else y
