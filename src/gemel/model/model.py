"""The decoder: one definition for every family and every use.

    hidden_TD = model(tokens_T, positions_T, attend)
    logits_TV = model.head(hidden_TD[rows])

Tokens are a flat run without batch or padding; what belongs together is `attend`'s affair. The head is a separate call because only some
rows need it: one per sequence when generating, slices of all of them when learning.

T tokens, P positions, D model width, H head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemel import ops
from gemel.config.model import Learned, ModelConfig, Rope
from gemel.model.attend import Attend
from gemel.model.attention import Rotation
from gemel.model.block import Block
from gemel.model.leaves.linear import Linear
from gemel.model.norm import norm


class Rotary(nn.Module):
    """The rotation of every position, looked up once per run and shared by all layers.

    Cosines and sines lie side by side in one fp32 table [P, 2 H], so that one lookup fetches both. A position beyond the table is an error,
    not an extrapolation. The table is derived from the configuration and is not part of a checkpoint.
    """

    table: Tensor

    def __init__(self, rope: Rope, head_width: int, num_positions: int):
        super().__init__()
        self.register_buffer("table", torch.cat(ops.rope_table(rope, head_width, num_positions), -1), persistent=False)

    def forward(self, positions_T: Tensor, dtype: torch.dtype) -> Rotation:
        """Cosines and signed sines [T, 1, H]."""
        both_T1H = F.embedding(positions_T, self.table).to(dtype)[:, None]
        cos_T1H, sin_T1H = both_T1H.chunk(2, -1)
        return cos_T1H, sin_T1H


class Model(nn.Module):
    """Embedding, blocks, final norm, and the head beside them. The residual stream has the parameters' dtype."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.max_positions, config.width) if isinstance(config.positions, Learned) else None
        self.rotary = Rotary(config.positions, config.head_width, config.max_positions) if isinstance(config.positions, Rope) else None
        self.embed_norm = norm(config.norm, config.width) if config.embed_norm else None
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = norm(config.norm, config.width)
        self.head = Linear(config.width, config.vocab_size)
        if config.tied_head:
            self.head.weight = self.embed.weight

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """Token ids and their positions (int64, [T]) to hidden states after the final norm, [T, D]."""
        x_TD = self.through(self.layers, self.enter(tokens_T, positions_T), positions_T, attend)
        hidden_TD: Tensor = self.norm(x_TD)
        return hidden_TD

    def enter(self, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
        """The residual stream as it begins, [T, D]."""
        x_TD: Tensor = self.embed(tokens_T)
        if self.positions is not None:
            x_TD = x_TD + self.positions(positions_T)
        if self.embed_norm is not None:
            x_TD = self.embed_norm(x_TD)
        return x_TD

    def through(self, layers: Iterable[nn.Module], x_TD: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """The residual stream behind some of the layers."""
        rotation = None if self.rotary is None else self.rotary(positions_T, x_TD.dtype)
        for block in layers:
            x_TD = block(x_TD, rotation, attend)
        return x_TD
