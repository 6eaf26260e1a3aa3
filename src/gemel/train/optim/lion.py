"""Lion (Chen et al. 2023, arXiv 2302.06675).

Principle: every weight moves by exactly the rate, in the direction of the sign of an interpolation between momentum and gradient. Trades:
half of AdamW's state (4 bytes per weight in fp32) for a rate that is more delicate: 3 to 10 times less, with as much more decay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemel.config import optim
from gemel.train.optim.method import At, Slot


class Lion:
    """Sign of the interpolated momentum."""

    elementwise = True

    def __init__(self, config: optim.Lion):
        self.config = config

    def slots(self, shape: torch.Size) -> tuple[Slot, ...]:
        """The momentum."""
        return (Slot("momentum", shape),)

    def update(self, w: Tensor, g: Tensor, state: list[Tensor], at: At) -> None:
        """See `Method.update`."""
        (momentum,) = state
        direction, remember = self.config.betas
        w.mul_(at.keep).add_(torch.lerp(momentum, g, 1.0 - direction).sign_(), alpha=-at.lr)
        momentum.lerp_(g, 1.0 - remember)
