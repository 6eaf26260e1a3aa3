"""The feed-forward of a block. T tokens, D model width, F feed-forward width."""

from __future__ import annotations

from torch import Tensor, nn

from gemel import ops
from gemel.config import model as config
from gemel.model.leaves.linear import Linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one matrix, because two products of half the width cost more."""

    def __init__(self, width: int, ffn_width: int, bias: bool):
        super().__init__()
        self.gate_up = Linear(width, 2 * ffn_width, bias, sections=(ffn_width, ffn_width))
        self.down = Linear(ffn_width, width, bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        out_TD: Tensor = self.down(ops.swiglu(self.gate_up(x_TD)))
        return out_TD


class GELU(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, width: int, ffn_width: int, bias: bool):
        super().__init__()
        self.up = Linear(width, ffn_width, bias)
        self.down = Linear(ffn_width, width, bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        out_TD: Tensor = self.down(ops.gelu(self.up(x_TD)))
        return out_TD


def feed_forward(cfg: config.ModelConfig) -> SwiGLU | GELU:
    """The feed-forward that the configuration asks for."""
    match cfg.ffn:
        case config.SwiGLU():
            return SwiGLU(cfg.width, cfg.ffn_width, cfg.ffn_bias)
        case config.GELU():
            return GELU(cfg.width, cfg.ffn_width, cfg.ffn_bias)
