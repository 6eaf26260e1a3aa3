"""Native attention by itself: pages full of random keys and values, and one new token for each sequence."""

from __future__ import annotations

import ctypes
from itertools import cycle

import torch

from gemel.bench.product import Team
from gemel.ops.cpu import native

FORMATS = {"float32": native.F32, "bfloat16": native.BF16, "int8": native.I8}
BLOCK_TOKENS = 16


class Paged:
    """A call is one layer's attention of `batch` sequences of `context` tokens, the last of them new. Layers take turns."""

    def __init__(self, team: Team, kv: str, batch: int, context: int, heads: int, kv_heads: int, width: int, num_layers: int):
        self._team, self._batch = team, batch
        blocks_each = -(-context // BLOCK_TOKENS)
        self._pages = native.Pages(FORMATS[kv], num_layers, kv_heads, width, BLOCK_TOKENS, 0, batch * blocks_each, None)
        size = int(team.library.gemel_pages_bytes(ctypes.byref(self._pages)))
        self._memory = torch.zeros(size, dtype=torch.uint8)
        self._pages.data = self._memory.data_ptr()
        tables = torch.randperm(batch * blocks_each, dtype=torch.int32).view(batch, blocks_each)
        self._qkv = torch.randn(batch, (heads + 2 * kv_heads) * width)
        self._out = torch.empty(batch, heads * width)
        self._tables = tables
        self._new = self._stretches([(row, context - 1, 1) for row in range(batch)])
        self._layers = [native.Attention(layer=layer, num_heads=heads, eps=1e-5) for layer in range(num_layers)]
        self._fill(context, (heads + 2 * kv_heads) * width, heads * width)
        self._next = cycle(self._layers)

    def _stretches(self, parts: list[tuple[int, int, int]]) -> ctypes.Array[native.Stretch]:
        """Stretches of (row, start, count), the sequence's number being its place in the list."""
        made = [native.Stretch(row, start, count, 0, self._tables[number].data_ptr()) for number, (row, start, count) in enumerate(parts)]
        return (native.Stretch * len(made))(*made)

    def _fill(self, context: int, qkv_width: int, out_width: int) -> None:
        """Write every key and value once, in every layer, as prompts do."""
        qkv, out = torch.randn(context, qkv_width), torch.empty(context, out_width)
        for number in range(self._batch):
            stretch = native.Stretch(0, 0, context, 0, self._tables[number].data_ptr())
            for layer in self._layers:
                self._attend(layer, (native.Stretch * 1)(stretch), qkv.clone(), out)

    def __call__(self) -> None:
        """Attend in the next layer."""
        self._attend(next(self._next), self._new, self._qkv, self._out)

    def _attend(self, layer: native.Attention, stretches: ctypes.Array[native.Stretch], qkv: torch.Tensor, out: torch.Tensor) -> None:
        pages, attention = ctypes.byref(self._pages), ctypes.byref(layer)
        arguments = (len(stretches), stretches, qkv.data_ptr(), len(qkv), out.data_ptr())
        self._team.library.gemel_attend(self._team.handle, attention, pages, *arguments)
