"""The one seam between training and serving: who looks at whom.

The model computes queries, keys and values for a flat run of tokens and hands them over; an `Attend` knows which earlier tokens belong to
which. Here: documents packed end to end. The engine has one that reads keys and values from pages.

T tokens, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

from torch import Tensor

from gemel import ops
from gemel.config.model import Alibi, ModelConfig


class Attend(Protocol):
    """Causal attention within whatever the tokens of this run belong to."""

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Attention outputs [T, N, H] of `layer`. Queries and keys are rotated already, if the model rotates."""
        ...


class PackedAttend:
    """Documents packed end to end, each seeing only itself; differentiable.

    `starts` are the document bounds: document d is tokens starts[d] to starts[d + 1], and the last entry is T. A document's result is
    bitwise the one that it has alone.
    """

    def __init__(self, config: ModelConfig, starts: tuple[int, ...]):
        assert starts[0] == 0 and all(a < b for a, b in pairwise(starts)), f"not document bounds: {starts}"
        self._starts = starts
        self._windows = [config.window(layer) for layer in range(config.num_layers)]
        self._slopes_N = ops.alibi_slopes(config.num_heads) if isinstance(config.positions, Alibi) else None

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Attention outputs [T, N, H]; T must be the last bound."""
        assert len(q_TNH) == self._starts[-1], f"{len(q_TNH)} tokens given, documents end at {self._starts[-1]}"
        return ops.packed_attention(q_TNH, k_TKH, v_TKH, self._starts, self._windows[layer], self._slopes_N)
