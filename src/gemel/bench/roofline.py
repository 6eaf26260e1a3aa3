"""What a step of the engine must cost at the very least on a given machine: the roofline (Williams, Waterman and Patterson 2009).

Each of the three parts of a step takes as long as the slower of two things: reading its bytes at the machine's read bandwidth, or doing
its multiplications at the machine's matrix peak. Norms, activations, sampling and all writes are left out: what they take is part of the
distance that a measurement shows. Caches are not modelled, so a model small enough to live in one can beat its roofline.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from gemel.config.model import ModelConfig, SwiGLU
from gemel.engine.request import Scheduled, StepPlan


@dataclass(frozen=True, slots=True)
class Rates:
    """A machine, reduced to two numbers: bytes read per second and floating-point operations (multiply and add are two) per second."""

    read_bytes_per_s: float
    flops_per_s: float

    def seconds(self, read_bytes: float, flops: float) -> float:
        """The time below which neither rate lets it go."""
        return max(read_bytes / self.read_bytes_per_s, flops / self.flops_per_s)


class StepCost:
    """Seconds that a step takes at best. `element_bytes` is the width of a weight and of a cached key or value element."""

    def __init__(self, config: ModelConfig, element_bytes: int, rates: Rates):
        self.config, self.element_bytes, self.rates = config, element_bytes, rates
        matrices = 3 if isinstance(config.ffn, SwiGLU) else 2
        attention = 2 * config.width * config.head_width * (config.num_heads + config.num_kv_heads)
        self.body_weights = config.num_layers * (attention + matrices * config.width * config.ffn_width)
        self.head_weights = config.width * config.vocab_size
        self._windows = Counter(config.window(layer) for layer in range(config.num_layers))

    @property
    def weight_bytes(self) -> int:
        """Matrices of all layers, the head, and the embedding where it is not the head."""
        embeddings = self.head_weights if self.config.tied_head else 2 * self.head_weights
        return (self.body_weights + embeddings) * self.element_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return self.config.kv_elements_per_token * self.element_bytes

    def step_s(self, plan: StepPlan) -> float:
        """Layers' matrices, then the head for rows that are sampled from, then attention of every sequence over its own context."""
        num_rows = sum(item.samples for item in plan.work)
        body = self.rates.seconds(self.body_weights * self.element_bytes, 2 * self.body_weights * plan.num_tokens)
        head = self.rates.seconds(self.head_weights * self.element_bytes, 2 * self.head_weights * num_rows) if num_rows else 0.0
        return body + head + sum(self._attention_s(item) for item in plan.work)

    def _attention_s(self, item: Scheduled) -> float:
        layer_kv_bytes = self.kv_bytes_per_token / self.config.num_layers
        layer_pair_flops = 4 * self.config.num_heads * self.config.head_width
        read_bytes = flops = 0.0
        for window, num_layers in self._windows.items():
            read_bytes += num_layers * layer_kv_bytes * _keys_read(item, window)
            flops += num_layers * layer_pair_flops * _pairs(item, window)
        return self.rates.seconds(read_bytes, flops)


def _keys_read(item: Scheduled, window: int | None) -> int:
    """Cached tokens that a chunk looks at: all before its end, or the windows of its first to its last token."""
    end = item.start + item.num_new
    return end if window is None else min(end, window + item.num_new - 1)


def _pairs(item: Scheduled, window: int | None) -> int:
    """(query, key) pairs of a chunk: the token at position p sees p + 1 keys, or its window."""

    def upto(length: int) -> int:
        full = length if window is None else min(length, window)
        return full * (full + 1) // 2 + (length - full) * (window or 0)

    return upto(item.start + item.num_new) - upto(item.start)
