"""One layer of the decoder. T tokens, D model width."""

from __future__ import annotations

from torch import Tensor, nn

from gemel.config.model import ModelConfig
from gemel.model.attend import Attend
from gemel.model.attention import Attention, Rotation
from gemel.model.ffn import feed_forward
from gemel.model.norm import norm


class Block(nn.Module):
    """Attention, then feed-forward, each reading a normed copy of the residual stream and adding to it."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm = norm(config.norm, config.width)
        self.attn = Attention(config, layer)
        self.mlp_norm = norm(config.norm, config.width)
        self.mlp = feed_forward(config)

    def forward(self, x_TD: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """[T, D] to [T, D]."""
        x_TD = x_TD + self.attn(self.attn_norm(x_TD), rotation, attend)
        out_TD: Tensor = x_TD + self.mlp(self.mlp_norm(x_TD))
        return out_TD
