"""Norms as modules: they own the scale, `ops` owns the arithmetic. T tokens, D width (of the model or of a head)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemel import ops
from gemel.config import model as config


class RMSNorm(nn.Module):
    """A scale, no shift."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Same shape and dtype as the input."""
        return ops.rms_norm(x_TD, self.weight, self.eps)


class LayerNorm(nn.Module):
    """A scale and a shift."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Same shape and dtype as the input."""
        return ops.layer_norm(x_TD, self.weight, self.bias, self.eps)


def norm(kind: config.Norm, width: int) -> RMSNorm | LayerNorm:
    """The norm that the configuration asks for."""
    match kind:
        case config.RMSNorm(eps=eps):
            return RMSNorm(width, eps)
        case config.LayerNorm(eps=eps):
            return LayerNorm(width, eps)
