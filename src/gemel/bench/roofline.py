"""What a step of the engine must cost at the very least on a given machine: the roofline (Williams, Waterman and Patterson 2009).

Each part of a step takes as long as the slower of two things: reading its bytes at the machine's read bandwidth, or doing its
multiplications at the machine's peak in the arithmetic that they are done in. Norms, activations, sampling and all writes are left out:
what they take is part of the distance that a measurement shows. Caches are not modelled, so a model small enough to live in one can beat
its roofline. Keys and values in a block that several sequences share are read once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

from gemel.config.model import ModelConfig, SwiGLU
from gemel.engine.request import Scheduled, StepPlan

# The matrix products of a step in the order in which they are done; attention comes after the first.
PRODUCTS = ("qkv", "out", "gate_up", "down", "head")
PARTS = ("qkv", "attention", "out", "gate_up", "down", "head")


@dataclass(frozen=True, slots=True)
class Rates:
    """A machine, reduced to a few numbers: bytes read per second, and operations (multiply and add are two) per second by arithmetic."""

    read_bytes_per_s: float
    flops_per_s: Mapping[str, float]

    def seconds(self, read_bytes: float, flops: float, arithmetic: str) -> float:
        """The time below which neither rate lets it go."""
        return max(read_bytes / self.read_bytes_per_s, flops / self.flops_per_s[arithmetic])


@dataclass(frozen=True, slots=True)
class Format:
    """How numbers are stored: bits of one, and bits that each row of a matrix and each group of `group` numbers takes besides (scales)."""

    bits: float
    row_bits: float = 0
    group_bits: float = 0
    group: int = 1

    def bytes(self, rows: int, columns: int) -> float:
        """Bytes of a matrix."""
        return rows * (columns * (self.bits + self.group_bits / self.group) + self.row_bits) / 8


# Weights as Gemel stores them. Scales of rows are fp32, those of groups fp16.
WEIGHTS = {
    "float32": Format(32),
    "bfloat16": Format(16),
    "float16": Format(16),
    "int8": Format(8, row_bits=32),
    "int4": Format(4, group_bits=16, group=32),
}


@dataclass(frozen=True, slots=True)
class Matrices:
    """All matrices of one kind: how many weights, the bytes they take, and the arithmetic that they are multiplied in."""

    num_weights: int
    read_bytes: float
    arithmetic: str


@dataclass(frozen=True, slots=True)
class Storage:
    """What a loaded model keeps in memory. `products` has every name of `PRODUCTS`.

    `embedding_bytes` is 0 where the head's matrix serves as the embedding.
    """

    products: Mapping[str, Matrices]
    embedding_bytes: float
    kv_bytes_per_token: float
    kv_arithmetic: str

    @property
    def weight_bytes(self) -> float:
        """All matrices and the embedding."""
        return self.embedding_bytes + sum(matrices.read_bytes for matrices in self.products.values())

    @property
    def arithmetics(self) -> tuple[str, ...]:
        """Every arithmetic whose peak a plan needs."""
        return tuple(sorted({self.kv_arithmetic, *(matrices.arithmetic for matrices in self.products.values())}))


def shapes(config: ModelConfig) -> dict[str, tuple[int, int, int]]:
    """Of each product: how many matrices, their rows, their columns."""
    heads = config.num_heads + 2 * config.num_kv_heads
    matrices = 2 if isinstance(config.ffn, SwiGLU) else 1
    return {
        "qkv": (config.num_layers, heads * config.head_width, config.width),
        "out": (config.num_layers, config.width, config.num_heads * config.head_width),
        "gate_up": (config.num_layers, matrices * config.ffn_width, config.width),
        "down": (config.num_layers, config.width, config.ffn_width),
        "head": (1, config.vocab_size, config.width),
    }


def uniform(config: ModelConfig, weights: str, kv_bytes_per_element: float, arithmetic: str) -> Storage:
    """The storage of a model that has all its matrices in one format of `WEIGHTS`; the embedding is the head's matrix if that is tied."""
    products = {
        name: Matrices(count * rows * columns, count * WEIGHTS[weights].bytes(rows, columns), arithmetic)
        for name, (count, rows, columns) in shapes(config).items()
    }
    embedding_bytes = 0.0 if config.tied_head else products["head"].read_bytes
    return Storage(products, embedding_bytes, config.kv_elements_per_token * kv_bytes_per_element, arithmetic)


class StepCost:
    """Seconds that a step takes at best, of a model stored as `storage` says, with key/value blocks of `block_tokens`."""

    def __init__(self, config: ModelConfig, storage: Storage, rates: Rates, block_tokens: int):
        self.config, self.storage, self.rates, self.block_tokens = config, storage, rates, block_tokens
        self._windows = Counter(config.window(layer) for layer in range(config.num_layers))

    def step_s(self, plan: StepPlan) -> float:
        """The whole step, its parts one after the other."""
        return sum(self.parts_s(plan).values())

    def parts_s(self, plan: StepPlan) -> dict[str, float]:
        """Seconds of each of `PARTS`: matrices meet every token of the step but for the head, which meets rows that are sampled from."""
        num_sampled = sum(item.samples for item in plan.work)
        parts = {name: self._product_s(name, num_sampled if name == "head" else plan.num_tokens) for name in PRODUCTS}
        parts["attention"] = self._attention_s(plan)
        return {name: parts[name] for name in PARTS}

    def parts_bytes(self, plan: StepPlan) -> dict[str, float]:
        """Bytes that each of `PARTS` has to read."""
        products = {name: matrices.read_bytes for name, matrices in self.storage.products.items()}
        if not any(item.samples for item in plan.work):
            products["head"] = 0.0
        return {name: self._attention_bytes(plan) if name == "attention" else products[name] for name in PARTS}

    def _product_s(self, name: str, num_rows: int) -> float:
        matrices = self.storage.products[name]
        return self.rates.seconds(matrices.read_bytes, 2 * matrices.num_weights * num_rows, matrices.arithmetic) if num_rows else 0.0

    def _attention_s(self, plan: StepPlan) -> float:
        pair_flops = 4 * self.config.num_heads * self.config.head_width
        pairs = sum(num_layers * _pairs(item, window) for window, num_layers in self._windows.items() for item in plan.work)
        return self.rates.seconds(self._attention_bytes(plan), pair_flops * pairs, self.storage.kv_arithmetic)

    def _attention_bytes(self, plan: StepPlan) -> float:
        layer_bytes = self.storage.kv_bytes_per_token / self.config.num_layers
        shared = self._shared_tokens(plan)
        keys = 0
        for window, num_layers in self._windows.items():
            keys += num_layers * (sum(_keys_read(item, window) for item in plan.work) - (shared if window is None else 0))
        return layer_bytes * keys

    def _shared_tokens(self, plan: StepPlan) -> int:
        """Cached tokens that would be counted again because another sequence of the step has the same block.

        Only whole blocks are shared, and only before a chunk's end.
        """
        blocks = Counter(
            chain.from_iterable(item.sequence.blocks[: (item.start + item.num_new) // self.block_tokens] for item in plan.work)
        )
        return (blocks.total() - len(blocks)) * self.block_tokens


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
