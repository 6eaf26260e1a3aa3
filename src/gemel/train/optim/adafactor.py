"""Adafactor (Shazeer and Stern 2018, arXiv 1804.04235).

Principle: the squared gradients of a matrix are remembered only as means of its rows and of its columns, whose product over the mean of all
is the best approximation of rank one (in generalized Kullback-Leibler divergence). Updates are clipped by their root mean square, because a
second moment that is out of date makes them large. Trades: state of rows + columns numbers instead of 2 x rows x columns, for a second
moment that is less exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gemel.config import optim
from gemel.train.optim.method import At, Slot


class Adafactor:
    """Factored over the last two dimensions; vectors keep their second moments in full."""

    elementwise = False

    def __init__(self, config: optim.Adafactor):
        self.config = config

    def slots(self, shape: torch.Size) -> tuple[Slot, ...]:
        """Second moments as means of rows and columns, and a first moment if it was asked for."""
        if len(shape) > 1:
            second: tuple[Slot, ...] = Slot("rows", shape[:-1], small=True), Slot("columns", shape[:-2] + shape[-1:], small=True)
        else:
            second = (Slot("exp_avg_sq", shape, signed=False),)
        return second if self.config.beta1 is None else (*second, Slot("exp_avg", shape))

    def update(self, w: Tensor, g: Tensor, state: list[Tensor], at: At) -> None:
        """See `Method.update`."""
        config = self.config
        least_square, least_scale = config.eps
        lr = min(at.lr, 1.0 / math.sqrt(at.step)) if config.relative else at.lr
        scale = rms(w).clamp_(min=least_scale) * lr if config.relative else torch.full((), lr, device=w.device)
        fresh = at.step**-config.decay  # 1 at the first step, so that zeros at first need no correction
        if g.dim() > 1:
            rows, columns = state[:2]
            rows.lerp_(mean_square(g, -1).add_(least_square), fresh)
            columns.lerp_(mean_square(g, -2).add_(least_square), fresh)
            u = g * (rows / rows.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1)
            u.mul_(columns.rsqrt().unsqueeze(-2))
        else:
            second = state[0].lerp_(g.square().add_(least_square), fresh)
            u = g * second.rsqrt()
        u.div_(rms(u).div_(config.clip).clamp_(min=1.0))
        if config.beta1 is not None:
            u = state[-1].lerp_(u, 1.0 - config.beta1)
        w.mul_(at.keep).sub_(u * scale)


def mean_square(x: Tensor, dim: int) -> Tensor:
    """Mean of squares along `dim`, without a tensor of squares in memory."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=dim)
    return norm.square_().div_(x.shape[dim])


def rms(x: Tensor) -> Tensor:
    """Root mean square of all elements, a scalar tensor."""
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm / math.sqrt(x.numel())
