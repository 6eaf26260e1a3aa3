"""Causal attention within packed documents, forward and backward, with scores that only ever exist as tiles in registers (Dao 2023,
"FlashAttention-2", arXiv 2307.08691).

Documents are cut into tiles from their own beginnings, so a document's numbers are the same bits wherever it lies and whatever else is
packed. Tiles with the most work start first. Scores are in units of log2, since exp2 is what the hardware has.

The backward pass is two kernels: one holds a tile of queries and walks over keys, the other holds a tile of keys and walks over the queries
of all heads that share them. Each gradient is then summed by one program in one order; computing scores twice is the price of results that
repeat, and of no atomics.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemel.ops.causal import attention
from gemel.ops.triton.launch import cut, dense_tokens, on_device_of

LOG2_E = 1.4426950408889634
MAX_WIDTH = 256  # of a head; wider ones leave no room for tiles


class Tile(NamedTuple):
    """How many queries and keys meet at a time, and who computes that."""

    queries: int
    keys: int
    warps: int
    stages: int


def tile_for(width: int, itemsize: int, *, back: bool) -> Tile:
    """The largest tiles, for heads of this width (a power of 2), whose programs keep their numbers in registers, or all but a few.

    Found by compiling for compute capabilities 8.0 and 9.0 (`bench/gpu_ops.py --compile`); shared memory stays below the 99 KiB that
    the smallest GPUs have, but for 9.0, which has more. Products of fp32 are not done by tensor cores and need registers for both factors.
    """
    if itemsize == 4:
        small = Tile(32, 16, 4, 1) if back else Tile(32, 32, 4, 1)
        return small if width <= 64 else Tile(32, 32, 8, 1) if width <= 128 else Tile(16, 16, 8, 1)
    if back:
        return Tile(64, 64, 4, 2) if width <= 64 else Tile(64, 64, 8, 2) if width <= 128 else Tile(32, 32, 8, 1)
    return Tile(128, 64, 4, 3) if width <= 64 else Tile(128, 64, 8, 3) if width <= 128 else Tile(64, 32, 8, 2)


# --- scores -------------------------------------------------------------------------------------------------------------------------


@triton.jit
def _rows(ptr, tokens, end, ld, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers of one head of these tokens [tokens, BLOCK]; 0 beyond the document and beyond the width."""
    columns = tl.arange(0, BLOCK)
    at = tokens.to(tl.int64)[:, None] * ld + columns[None, :]
    return tl.load(ptr + at, mask=(tokens < end)[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def _store_rows(ptr, numbers, tokens, end, ld, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    at = tokens.to(tl.int64)[:, None] * ld + columns[None, :]
    tl.store(ptr + at, numbers.to(ptr.dtype.element_ty), mask=(tokens < end)[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def _bent(scores, distance, scale, slope, window, MASKED: tl.constexpr, ALIBI: tl.constexpr, WINDOWED: tl.constexpr):
    """Products scaled and penalized for distance; -inf where, in a tile that may have such places, the key is not seen."""
    scores = scores * scale
    if ALIBI:
        scores -= slope * distance
    if MASKED:
        seen = distance >= 0
        if WINDOWED:
            seen = seen & (distance < window)
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def _keys_of(begin, end, first, window, WINDOWED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Where a tile of queries begins and ends to walk over keys, and between them where all its queries begin and end to see all keys."""
    low, full_low = begin, begin
    full_high = begin + (first + 1 - begin) // KEYS * KEYS
    if WINDOWED:
        low = begin + tl.maximum(first - window + 1 - begin, 0) // KEYS * KEYS
        full_low = begin + tl.cdiv(tl.maximum(first + QUERIES - window - begin, 0), KEYS) * KEYS
        full_low = tl.minimum(full_low, full_high)
    return low, full_low, full_high, tl.minimum(first + QUERIES, end)


# --- forward ------------------------------------------------------------------------------------------------------------------------


@triton.jit
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    slopes_ptr,
    num_tokens,
    q_ld,
    k_ld,
    v_ld,
    out_ld,
    scale,
    window,
    GROUP: tl.constexpr,
    ALIBI: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    head, tile_ptr = tl.program_id(0), tiles_ptr + 3 * tl.program_id(1)
    begin, end, first = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    queries, slope = first + tl.arange(0, QUERIES), 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + head)
    k_ptr += head // GROUP * WIDTH
    v_ptr += head // GROUP * WIDTH
    q = _rows(q_ptr + head * WIDTH, queries, end, q_ld, WIDTH, BLOCK)
    out, total = tl.zeros([QUERIES, BLOCK], tl.float32), tl.zeros([QUERIES], tl.float32)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    bounds = _keys_of(begin, end, first, window, WINDOWED, QUERIES, KEYS)
    for phase in tl.static_range(0 if WINDOWED else 1, 3):
        for start in range(bounds[phase], bounds[phase + 1], KEYS):
            keys = start + tl.arange(0, KEYS)
            k = _rows(k_ptr, keys, end, k_ld, WIDTH, BLOCK)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            scores = _bent(scores, queries[:, None] - keys[None, :], scale, slope, window, phase != 1, ALIBI, WINDOWED)
            highest = tl.maximum(top, tl.max(scores, axis=1))
            base = tl.where(highest == float("-inf"), 0.0, highest)  # a query that has seen nothing yet
            shares, fade = tl.exp2(scores - base[:, None]), tl.exp2(top - base)
            total = total * fade + tl.sum(shares, axis=1)
            v = _rows(v_ptr, keys, end, v_ld, WIDTH, BLOCK)
            out = out * fade[:, None] + tl.dot(shares.to(v.dtype), v, input_precision=PRECISION)
            top = highest
    _store_rows(out_ptr + head * WIDTH, out / total[:, None], queries, end, out_ld, WIDTH, BLOCK)
    tl.store(lse_ptr + head.to(tl.int64) * num_tokens + queries, top + tl.log2(total), mask=queries < end)


# --- backward -----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _backward_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    d_out_ptr,
    lse_ptr,
    delta_ptr,
    d_q_ptr,
    tiles_ptr,
    slopes_ptr,
    num_tokens,
    q_ld,
    k_ld,
    v_ld,
    out_ld,
    d_out_ld,
    scale,
    window,
    to_q,
    GROUP: tl.constexpr,
    ALIBI: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The gradient of queries, and on the way, for the other kernel, the products of outputs and their gradients."""
    head, tile_ptr = tl.program_id(0), tiles_ptr + 3 * tl.program_id(1)
    begin, end, first = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    queries, slope = first + tl.arange(0, QUERIES), 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + head)
    k_ptr += head // GROUP * WIDTH
    v_ptr += head // GROUP * WIDTH
    d_out = _rows(d_out_ptr + head * WIDTH, queries, end, d_out_ld, WIDTH, BLOCK)
    out = _rows(out_ptr + head * WIDTH, queries, end, out_ld, WIDTH, BLOCK)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), axis=1)
    of_head = head.to(tl.int64) * num_tokens + queries
    tl.store(delta_ptr + of_head, delta, mask=queries < end)
    lse = tl.load(lse_ptr + of_head, mask=queries < end, other=float("inf"))  # beyond the document nobody has a share
    q = _rows(q_ptr + head * WIDTH, queries, end, q_ld, WIDTH, BLOCK)
    d_q = tl.zeros([QUERIES, BLOCK], tl.float32)
    bounds = _keys_of(begin, end, first, window, WINDOWED, QUERIES, KEYS)
    for phase in tl.static_range(0 if WINDOWED else 1, 3):
        for start in range(bounds[phase], bounds[phase + 1], KEYS):
            keys = start + tl.arange(0, KEYS)
            k = _rows(k_ptr, keys, end, k_ld, WIDTH, BLOCK)
            v = _rows(v_ptr, keys, end, v_ld, WIDTH, BLOCK)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            scores = _bent(scores, queries[:, None] - keys[None, :], scale, slope, window, phase != 1, ALIBI, WINDOWED)
            shares = tl.exp2(scores - lse[:, None])
            d_scores = shares * (tl.dot(d_out, tl.trans(v), input_precision=PRECISION) - delta[:, None])
            d_q += tl.dot(d_scores.to(k.dtype), k, input_precision=PRECISION)
    _store_rows(d_q_ptr + head * WIDTH, d_q * to_q, queries, end, out_ld, WIDTH, BLOCK)


@triton.jit
def _backward_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    lse_ptr,
    delta_ptr,
    d_k_ptr,
    d_v_ptr,
    tiles_ptr,
    slopes_ptr,
    num_tokens,
    q_ld,
    k_ld,
    v_ld,
    d_k_ld,
    d_out_ld,
    scale,
    window,
    to_k,
    GROUP: tl.constexpr,
    ALIBI: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The gradients of keys and values. Scores lie transposed, keys down, queries across."""
    kv_head, tile_ptr = tl.program_id(0), tiles_ptr + 3 * tl.program_id(1)
    end, first = tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    keys, slope = first + tl.arange(0, KEYS), 0.0
    k = _rows(k_ptr + kv_head * WIDTH, keys, end, k_ld, WIDTH, BLOCK)
    v = _rows(v_ptr + kv_head * WIDTH, keys, end, v_ld, WIDTH, BLOCK)
    d_k, d_v = tl.zeros([KEYS, BLOCK], tl.float32), tl.zeros([KEYS, BLOCK], tl.float32)
    bounds = _queries_of(end, first, window, WINDOWED, QUERIES, KEYS)
    for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
        if ALIBI:
            slope = tl.load(slopes_ptr + head)
        of_head = tl.cast(head, tl.int64) * num_tokens
        for phase in tl.static_range(0, 3 if WINDOWED else 2):
            for start in range(bounds[phase], bounds[phase + 1], QUERIES):
                queries = start + tl.arange(0, QUERIES)
                q = _rows(q_ptr + head * WIDTH, queries, end, q_ld, WIDTH, BLOCK)
                d_out = _rows(d_out_ptr + head * WIDTH, queries, end, d_out_ld, WIDTH, BLOCK)
                lse = tl.load(lse_ptr + of_head + queries, mask=queries < end, other=float("inf"))
                delta = tl.load(delta_ptr + of_head + queries, mask=queries < end, other=0.0)
                scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                scores = _bent(scores, queries[None, :] - keys[:, None], scale, slope, window, phase != 1, ALIBI, WINDOWED)
                shares = tl.exp2(scores - lse[None, :])
                d_v += tl.dot(shares.to(d_out.dtype), d_out, input_precision=PRECISION)
                d_scores = shares * (tl.dot(v, tl.trans(d_out), input_precision=PRECISION) - delta[None, :])
                d_k += tl.dot(d_scores.to(q.dtype), q, input_precision=PRECISION)
    _store_rows(d_k_ptr + kv_head * WIDTH, d_k * to_k, keys, end, d_k_ld, WIDTH, BLOCK)
    _store_rows(d_v_ptr + kv_head * WIDTH, d_v, keys, end, d_k_ld, WIDTH, BLOCK)


@triton.jit
def _queries_of(end, first, window, WINDOWED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """The same for a tile of keys that walks over queries. Those that lie beyond the document need no mask, as their shares are 0."""
    high = end
    if WINDOWED:
        high = tl.minimum(end, first + KEYS + window - 1)
    full_low = tl.minimum(first + tl.cdiv(KEYS, QUERIES) * QUERIES, high)
    full_high = high
    if WINDOWED:
        full_high = tl.minimum(tl.maximum(first + window // QUERIES * QUERIES, full_low), high)
    return first, full_low, full_high, high


# --- in torch -----------------------------------------------------------------------------------------------------------------------


def packed_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, starts: Sequence[int], window: int | None = None, slopes_N: Tensor | None = None
) -> Tensor:
    """Causal attention within documents that are packed end to end, see `gemel.ops.train.packed_attention`. Returns [T, N, H].

    Products of fp32 are done in TF32 where torch may do that.
    """
    if q_TNH.shape[-1] > MAX_WIDTH:
        return torch.cat([attention(q_TNH[a:b], k_TKH[a:b], v_TKH[a:b], window=window, slopes_N=slopes_N) for a, b in pairwise(starts)])
    if slopes_N is not None:
        slopes_N = slopes_N.to(q_TNH.device, torch.float32, non_blocking=True) * LOG2_E
    out_TNH: Tensor = _PackedAttention.apply(q_TNH, k_TKH, v_TKH, tuple(starts), window or 0, slopes_N)
    return out_TNH


class _PackedAttention(torch.autograd.Function):
    """Keeps queries, keys, values, outputs, and one number per query and head."""

    @staticmethod
    def forward(
        ctx: Any, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, starts: tuple[int, ...], window: int, slopes_N: Tensor | None
    ) -> Tensor:
        q_TNH, k_TKH, v_TKH = map(dense_tokens, (q_TNH, k_TKH, v_TKH))
        if q_TNH.untyped_storage().data_ptr() != v_TKH.untyped_storage().data_ptr():
            v_TKH = v_TKH.contiguous()  # rotated heads lie elsewhere; what values were cut from need not be kept for them alone
        out_TNH, lse_NT = _attend(q_TNH, k_TKH, v_TKH, starts, window, slopes_N)
        ctx.save_for_backward(q_TNH, k_TKH, v_TKH, out_TNH, lse_NT, slopes_N)
        ctx.starts, ctx.window = starts, window
        return out_TNH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_TNH: Tensor) -> tuple[Tensor | None, ...]:
        q_TNH, k_TKH, v_TKH, out_TNH, lse_NT, slopes_N = ctx.saved_tensors
        d_out_TNH = dense_tokens(d_out_TNH)
        gradients = _attend_back(q_TNH, k_TKH, v_TKH, out_TNH, lse_NT, slopes_N, d_out_TNH, ctx.starts, ctx.window)
        return *gradients, None, None, None


def _attend(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, starts: tuple[int, ...], window: int, slopes_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs [T, N, H], and base-2 logarithms of the sums of softmax [N, T]. `slopes_N` are those of base-2 scores; window 0 is none."""
    num_tokens, num_heads, width = q_TNH.shape
    how = _how(q_TNH, k_TKH, window, slopes_N)
    tile = tile_for(how["BLOCK"], q_TNH.itemsize, back=False)
    tiles = _tiles(starts, tile.queries, q_TNH.device, of_keys=False)
    out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    lse_NT = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=q_TNH.device)
    with on_device_of(q_TNH):
        _forward[num_heads, len(tiles)](
            *(q_TNH, k_TKH, v_TKH, out_TNH, lse_NT, tiles, slopes_N),
            *(num_tokens, q_TNH.stride(0), k_TKH.stride(0), v_TKH.stride(0), out_TNH.stride(0)),
            *(LOG2_E * width**-0.5, window),
            **how,
            **_sizes(tile),
        )
    return out_TNH, lse_NT


def _attend_back(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    out_TNH: Tensor,
    lse_NT: Tensor,
    slopes_N: Tensor | None,
    d_out_TNH: Tensor,
    starts: tuple[int, ...],
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values."""
    num_tokens, num_heads, width = q_TNH.shape
    how, scale = _how(q_TNH, k_TKH, window, slopes_N), width**-0.5
    tile = tile_for(how["BLOCK"], q_TNH.itemsize, back=True)
    d_q_TNH, d_k_TKH, d_v_TKH = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_TNH, k_TKH, v_TKH))
    delta_NT = torch.empty_like(lse_NT)
    ld = num_tokens, q_TNH.stride(0), k_TKH.stride(0), v_TKH.stride(0)
    last = d_out_TNH.stride(0), LOG2_E * scale, window, scale
    with on_device_of(q_TNH):
        tiles = _tiles(starts, tile.queries, q_TNH.device, of_keys=False)
        _backward_queries[num_heads, len(tiles)](
            *(q_TNH, k_TKH, v_TKH, out_TNH, d_out_TNH, lse_NT, delta_NT, d_q_TNH, tiles, slopes_N),
            *(*ld, out_TNH.stride(0), *last),
            **how,
            **_sizes(tile),
        )
        tiles = _tiles(starts, tile.keys, q_TNH.device, of_keys=True)
        _backward_keys[k_TKH.shape[1], len(tiles)](
            *(q_TNH, k_TKH, v_TKH, d_out_TNH, lse_NT, delta_NT, d_k_TKH, d_v_TKH, tiles, slopes_N),
            *(*ld, d_k_TKH.stride(0), *last),
            **how,
            **_sizes(tile),
        )
    return d_q_TNH, d_k_TKH, d_v_TKH


def _how(q_TNH: Tensor, k_TKH: Tensor, window: int, slopes_N: Tensor | None) -> dict[str, Any]:
    """What the kernels are compiled for."""
    narrow_products = q_TNH.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return {
        "GROUP": q_TNH.shape[1] // k_TKH.shape[1],
        "ALIBI": slopes_N is not None,
        "WINDOWED": window > 0,
        "PRECISION": "tf32" if narrow_products else "ieee",
        "WIDTH": q_TNH.shape[2],
        "BLOCK": max(triton.next_power_of_2(q_TNH.shape[2]), 16),
    }


def _sizes(tile: Tile) -> dict[str, int]:
    return {"QUERIES": tile.queries, "KEYS": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}


@functools.lru_cache(maxsize=64)
def _tiles(starts: tuple[int, ...], size: int, device: torch.device, *, of_keys: bool) -> Tensor:
    """Begin and end of the document, and first token, of each tile of `size` tokens [tiles, 3]. All layers of a step share them.

    In order of work: a query sees what is before it, a key is seen by what is behind it. The longest programs start first, so that the
    last to end are short.
    """
    bounds_D = torch.tensor(starts)
    which, part = cut(bounds_D.diff(), size)
    begin, end, first = bounds_D[which], bounds_D[which + 1], bounds_D[which] + part * size
    order = (end - first if of_keys else first - begin).argsort(descending=True, stable=True)
    return torch.stack((begin, end, first), 1)[order].int().to(device)
