"""Stochastic gradient descent with momentum (Polyak 1964; Sutskever et al. 2013).

Principle: a step along the sum of past gradients, older ones faded. Trades: 4 bytes of state per weight, or none without momentum, for
gradients having to be of equal scale everywhere, which those of transformers are not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemel.config import optim
from gemel.train.optim.method import At, Slot


class SGD:
    """Plain, heavy ball, or Nesterov."""

    elementwise = True

    def __init__(self, config: optim.SGD):
        self.config = config

    def slots(self, shape: torch.Size) -> tuple[Slot, ...]:
        """The momentum, if there is one."""
        return (Slot("momentum", shape),) if self.config.momentum else ()

    def update(self, w: Tensor, g: Tensor, state: list[Tensor], at: At) -> None:
        """See `Method.update`."""
        w.mul_(at.keep)
        if not state:
            w.add_(g, alpha=-at.lr)
            return
        momentum = state[0].mul_(self.config.momentum).add_(g)
        w.add_(torch.add(g, momentum, alpha=self.config.momentum) if self.config.nesterov else momentum, alpha=-at.lr)
