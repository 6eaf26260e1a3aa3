"""Queries, keys and values of a block, and the product that mixes the heads' answers.

T tokens, D model width, N query heads, K key/value heads, M = N + 2 K all heads, H head width.
"""

from __future__ import annotations

from torch import Tensor, nn

from gemel import ops
from gemel.config.model import ModelConfig
from gemel.model.attend import Attend
from gemel.model.leaves.linear import Linear
from gemel.model.norm import RMSNorm

Rotation = tuple[Tensor, Tensor]  # cosines and signed sines, [T, 1, H] each


class Attention(nn.Module):
    """One matrix for queries, keys and values, lying in that order, so that one rotation turns queries and keys together."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_width = layer, config.head_width
        self.group = config.num_heads // config.num_kv_heads
        q_width, kv_width = config.num_heads * config.head_width, config.num_kv_heads * config.head_width
        self.qkv = Linear(config.width, q_width + 2 * kv_width, config.qkv_bias, sections=(q_width, kv_width, kv_width))
        self.out = Linear(q_width, config.width, config.out_bias)
        self.q_norm = RMSNorm(config.head_width, config.norm.eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_width, config.norm.eps) if config.qk_norm else None

    def forward(self, x_TD: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """[T, D] to [T, D]. Head counts come from the product's own width, so a part of the heads runs through the same lines."""
        qkv_TMH = self.qkv(x_TD).unflatten(-1, (-1, self.head_width))
        num_kv_heads = qkv_TMH.shape[1] // (self.group + 2)
        num_heads = num_kv_heads * self.group
        qk_TMH, v_TKH = qkv_TMH.split((num_heads + num_kv_heads, num_kv_heads), 1)
        if self.q_norm is not None and self.k_norm is not None:
            q_TNH, k_TKH = qk_TMH.split((num_heads, num_kv_heads), 1)
            q_TNH, k_TKH = self.q_norm(q_TNH), self.k_norm(k_TKH)
            if rotation is not None:
                q_TNH, k_TKH = ops.rope(q_TNH, *rotation), ops.rope(k_TKH, *rotation)
        else:
            if rotation is not None:
                qk_TMH = ops.rope(qk_TMH, *rotation)
            q_TNH, k_TKH = qk_TMH.split((num_heads, num_kv_heads), 1)
        out_TD: Tensor = self.out(attend(self.layer, q_TNH, k_TKH, v_TKH).flatten(1))
        return out_TD
