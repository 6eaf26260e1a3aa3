"""AdamW (Kingma and Ba 2014, arXiv 1412.6980; Loshchilov and Hutter 2017, arXiv 1711.05101).

Principle: each weight moves by its mean gradient over the root of its mean squared gradient, so that all weights move at about the same
speed. Trades: two numbers of state per weight, 8 bytes in fp32, for needing little tuning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemel.config import optim
from gemel.ops import adamw
from gemel.ops.adamw import Part
from gemel.train.optim import noise
from gemel.train.optim.method import At, Slot


class AdamW:
    """One fused kernel of torch: one pass over memory instead of ten; or of ours, with unpacking and packing in the same pass."""

    elementwise = True

    def __init__(self, config: optim.AdamW):
        self.config = config

    def slots(self, shape: torch.Size) -> tuple[Slot, ...]:
        """The two moments."""
        return Slot("exp_avg", shape), Slot("exp_avg_sq", shape, signed=False)

    def update(self, w: Tensor, g: Tensor, state: list[Tensor], at: At) -> None:
        """See `Method.update`."""
        first, second = state
        torch._fused_adamw_(
            *([w], [g], [first], [second], []),
            [torch.full((), float(at.step), device=w.device)],
            lr=at.lr,
            beta1=self.config.betas[0],
            beta2=self.config.betas[1],
            weight_decay=at.weight_decay,
            eps=self.config.eps,
            amsgrad=False,
            maximize=False,
        )

    def update_stored(self, part: Part, at: At, l1: float) -> bool:
        """The same for numbers as they are stored, and L1 with it. False, and nothing changed, where no kernel can."""
        return adamw.step(
            part,
            lr=at.lr,
            betas=self.config.betas,
            eps=self.config.eps,
            step=at.step,
            weight_decay=at.weight_decay,
            l1=l1,
            table=noise.table(part.gradient.device),
        )
