"""The serving side of the seam: keys and values live in blocks, new ones are written, then everything a token may see is read.

One step is one flat run of tokens, of which every sequence owns a stretch. Two shapes of work occur in it:

    a stretch of one token (decoding): sequences of similar length are gathered into one padded batch, with the query heads of a
    group folded into the query-length axis, so that few calls serve many sequences and each key is read once per group;
    a longer stretch (prefill, a chunk of it, speculation): attended by itself, with its own cached context before it.

What depends on the step but not on the layer is prepared once, in `PagedAttend.__init__`; layers differ at most in their window.
The cache is laid out [layer, key or value, K, block, token in block, H]: gathering whole blocks leaves each kv head's keys contiguous.

Shapes: T tokens, N query heads, K kv heads, G = N / K, H head width, L keys of the longest sequence in a batch, B sequences in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gemel import ops
from gemel.config.model import Alibi, ModelConfig
from gemel.engine.request import Scheduled

PADDING = 1.25  # the longest sequence of a decode batch has at most so many times the blocks of the shortest
SMALL_BATCH = 4  # but a batch of fewer sequences takes any: one call costs more than the padding
GATHER_BYTES = 8 * 2**20  # keys and values gathered for one decode batch; more would leave the CPU's cache before it is read


class KVCache:
    """Keys and values of all layers in `num_blocks` blocks of `block_tokens` tokens."""

    def __init__(self, config: ModelConfig, num_blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device):
        self.block_tokens = block_tokens
        shape = (config.num_layers, 2, config.num_kv_heads, num_blocks, block_tokens, config.head_width)
        self.data = _untouched_zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)
        self._scratch = [self.data.new_empty(0), self.data.new_empty(0)]

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_tokens: int, dtype: torch.dtype) -> int:
        """Memory of one block over all layers, in bytes."""
        return config.kv_elements_per_token * block_tokens * dtype.itemsize

    def rows(self, blocks: Seq[int]) -> Tensor:
        """Where these blocks lie when a side of a layer is seen as rows of one kv head's block each, [K * blocks]."""
        num_kv_heads, num_blocks = self.data.shape[2:4]
        first_K1 = torch.arange(num_kv_heads, device=self.data.device)[:, None] * num_blocks
        return (first_K1 + torch.tensor(blocks, device=self.data.device)).flatten()

    def gather(self, layer: int, side: int, rows: Tensor, num_sequences: int = 1) -> Tensor:
        """Blocks of one side (0 keys, 1 values) of a layer, [K, sequences, tokens, H]. Valid until the next call for the same side.

        The memory is reused: fresh memory of this size costs as much in page faults as the gathering itself.
        """
        source = self.data[layer, side].flatten(0, 1).flatten(1)
        num = len(rows) * source.shape[1]
        if self._scratch[side].numel() < num:
            self._scratch[side] = source.new_empty(num)
        gathered = torch.index_select(source, 0, rows, out=self._scratch[side][:num].view(len(rows), -1))
        return gathered.view(self.data.shape[2], num_sequences, -1, self.data.shape[5])

    def copy(self, pairs: Seq[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to), before a shared block is written."""
        if pairs:
            source, target = torch.tensor(pairs, device=self.data.device).T
            self.data[:, :, :, target] = self.data[:, :, :, source]


@dataclass(frozen=True, slots=True)
class _Stretch:
    """One sequence's part of the flat run: rows `first : first + num_new`, at positions `start : start + num_new`."""

    first: int
    start: int
    num_new: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class _DecodeBatch:
    """Sequences that decode one token each, padded to a common number of blocks."""

    rows_B: Tensor
    cache_rows: Tensor  # of the sequences' blocks, see KVCache.rows
    bias_KBGL: (
        Tensor | None
    )  # broadcast over K and G unless positions are ALiBi; added to scores: -inf where a key is not visible; None when all are


class PagedAttend:
    """Attention of one step over the cache. Built once per step, called once per layer."""

    def __init__(self, config: ModelConfig, cache: KVCache, work: Seq[Scheduled]):
        self.config, self.cache = config, cache
        self.group = config.num_heads // config.num_kv_heads
        self.gathered_blocks = GATHER_BYTES // (KVCache.bytes_per_block(config, cache.block_tokens, cache.data.dtype) // config.num_layers)
        self.slopes_N = ops.alibi_slopes(config.num_heads).to(cache.data.device) if isinstance(config.positions, Alibi) else None
        self.stretches = _stretches(work)
        self.slots_T = self._slots()
        self.decoding = [s for s in self.stretches if s.num_new == 1]
        self.longer = [s for s in self.stretches if s.num_new > 1]
        windows = {config.window(layer) for layer in range(config.num_layers)}
        self.batches = {window: self._decode_batches(window) for window in windows}
        self.biases = {window: [self._causal_bias(s, window) for s in self.longer] for window in windows}
        self.context_rows = [cache.rows(s.blocks) for s in self.longer]

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Write k and v of the step's tokens, then attend: q [T, N, H], k and v [T, K, H] -> [T, N, H]."""
        keys, values = self.cache.data[layer]
        keys.flatten(1, 2).index_copy_(1, self.slots_T, k_TKH.transpose(0, 1))
        values.flatten(1, 2).index_copy_(1, self.slots_T, v_TKH.transpose(0, 1))
        out_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
        window = self.config.window(layer)
        for batch in self.batches[window]:
            self._decode(layer, batch, q_TNH, out_TNH)
        for stretch, cache_rows, bias in zip(self.longer, self.context_rows, self.biases[window], strict=True):
            rows = slice(stretch.first, stretch.first + stretch.num_new)
            if stretch.start == 0:
                k_CKH, v_CKH = k_TKH[rows], v_TKH[rows]
            else:
                context = stretch.start + stretch.num_new
                k_CKH, v_CKH = (self.cache.gather(layer, side, cache_rows)[:, 0, :context].transpose(0, 1) for side in (0, 1))
            out_TNH[rows] = ops.attention(q_TNH[rows], k_CKH, v_CKH, window=window, bias=bias)
        return out_TNH

    def _decode(self, layer: int, batch: _DecodeBatch, q_TNH: Tensor, out_TNH: Tensor) -> None:
        num, folded = len(batch.rows_B), (self.config.num_kv_heads, self.group, self.config.head_width)
        q_KBGH = q_TNH.index_select(0, batch.rows_B).view(num, *folded).transpose(0, 1)
        k_KBLH = self.cache.gather(layer, 0, batch.cache_rows, num)
        score_KBGL = torch.matmul(q_KBGH * self.config.head_width**-0.5, k_KBLH.transpose(-1, -2))
        if batch.bias_KBGL is not None:
            score_KBGL += batch.bias_KBGL
        v_KBLH = self.cache.gather(layer, 1, batch.cache_rows, num)
        mixed_KBGH = torch.matmul(torch.softmax(score_KBGL, -1, dtype=torch.float32).to(v_KBLH.dtype), v_KBLH)
        out_TNH.index_copy_(0, batch.rows_B, mixed_KBGH.transpose(0, 1).reshape(num, self.config.num_heads, self.config.head_width))

    def _causal_bias(self, stretch: _Stretch, window: int | None) -> Tensor | None:
        return ops.causal_bias(stretch.num_new, stretch.start + stretch.num_new, self.cache.data, window, self.slopes_N)

    def _slots(self) -> Tensor:
        """Where each token of the step is written: block * block_tokens + offset."""
        size = self.cache.block_tokens
        return self._tensor([s.blocks[p // size] * size + p % size for s in self.stretches for p in range(s.start, s.start + s.num_new)])

    def _decode_batches(self, window: int | None) -> list[_DecodeBatch]:
        first_block = {s.first: self._first_visible(s, window) // self.cache.block_tokens for s in self.decoding}
        tables = sorted(((s, s.blocks[first_block[s.first] :]) for s in self.decoding), key=lambda pair: -len(pair[1]))
        batches: list[list[tuple[_Stretch, list[int]]]] = []
        for pair in tables:
            longest = len(batches[-1][0][1]) if batches else 0
            fits = batches and (len(batches[-1]) + 1) * longest <= self.gathered_blocks
            if fits and (len(batches[-1]) < SMALL_BATCH or longest <= PADDING * len(pair[1])):
                batches[-1].append(pair)
            else:
                batches.append([pair])
        return [self._decode_batch(batch, first_block, window) for batch in batches]

    def _decode_batch(self, batch: list[tuple[_Stretch, list[int]]], first_block: dict[int, int], window: int | None) -> _DecodeBatch:
        width = max(len(blocks) for _, blocks in batch)
        flat = [block for _, blocks in batch for block in blocks + blocks[-1:] * (width - len(blocks))]
        size = self.cache.block_tokens
        position_BL = self._tensor([first_block[s.first] * size for s, _ in batch])[:, None] + self._tensor(range(width * size))
        start_B1 = self._tensor([s.start for s, _ in batch])[:, None]
        visible_BL = (position_BL <= start_B1) & (position_BL >= self._tensor([self._first_visible(s, window) for s, _ in batch])[:, None])
        return _DecodeBatch(
            self._tensor([s.first for s, _ in batch]), self.cache.rows(flat), self._bias(visible_BL, start_B1 - position_BL)
        )

    def _bias(self, visible_BL: Tensor, distance_BL: Tensor) -> Tensor | None:
        if self.slopes_N is None and bool(visible_BL.all()):
            return None
        dtype = self.cache.data.dtype
        bias_1B1L = torch.zeros_like(visible_BL, dtype=dtype).masked_fill_(~visible_BL, -math.inf)[None, :, None]
        if self.slopes_N is not None:
            bias_1B1L = bias_1B1L - self.slopes_N.view(-1, 1, self.group, 1).to(dtype) * distance_BL[None, :, None].to(dtype)
        return bias_1B1L

    @staticmethod
    def _first_visible(stretch: _Stretch, window: int | None) -> int:
        return 0 if window is None else max(0, stretch.start - window + 1)

    def _tensor(self, values: Seq[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.cache.data.device)


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written: NumPy asks the system for zero pages where torch would fill them."""
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _stretches(work: Seq[Scheduled]) -> list[_Stretch]:
    out, first = [], 0
    for item in work:
        out.append(_Stretch(first, item.start, item.num_new, item.sequence.blocks))
        first += item.num_new
    return out
