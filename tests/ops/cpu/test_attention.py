"""Attention over pages against float64, and its promise that a row's bits depend on nobody else in the step.

T tokens, N query heads, K kv heads, M = N + 2 K all heads, H head width.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from gemel import ops
from gemel.config.model import Rope
from gemel.ops.cpu import native
from gemel.ops.cpu.native import BF16, F32, I8
from tests.ops.cpu.conftest import OpenKernels
from tests.tolerance import assert_close

SOURCES = ("attention.cpp", "norm.cpp", "pages.cpp", "plan.cpp", "threads.cpp")
NAMES = ("gemel_team_new", "gemel_team_free", "gemel_pages_bytes", "gemel_pages_copy", "gemel_attend")
MAX_POSITIONS = 700
NAN = 0xFF  # a byte that makes fp32 and bf16 numbers, and the fp32 scales of int8, NaN


@pytest.fixture(scope="module", params=list(native.VARIANTS))
def kernels(request: pytest.FixtureRequest, open_kernels: OpenKernels) -> ctypes.CDLL:
    library = open_kernels(request.param, SOURCES, NAMES)
    library.variant = request.param
    return library


@pytest.fixture(scope="module")
def some_kernels(open_kernels: OpenKernels) -> ctypes.CDLL:
    return open_kernels("generic", SOURCES, NAMES)


@dataclass(frozen=True)
class Kind:
    """What one layer's attention is like."""

    num_heads: int
    num_kv_heads: int
    head_width: int
    block_tokens: int = 16
    window: int | None = None
    rotates: bool = True
    alibi: bool = False
    qk_norm: bool = False
    eps: float = 1e-5

    @property
    def width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_width

    def rotation(self) -> Tensor | None:
        return torch.cat(ops.rope_table(Rope(), self.head_width, MAX_POSITIONS), -1) if self.rotates else None

    def slopes(self) -> Tensor | None:
        return ops.alibi_slopes(self.num_heads) if self.alibi else None

    def norms(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        if not self.qk_norm:
            return None, None
        scales = 1 + 0.2 * torch.randn(2, self.head_width, generator=torch.Generator().manual_seed(5))
        return scales[0].clone(), scales[1].clone()


KINDS = {
    "grouped": Kind(6, 2, 16),
    "multi-head": Kind(3, 3, 64, block_tokens=32, rotates=False),
    "multi-query, alibi": Kind(5, 1, 8, block_tokens=64, rotates=False, alibi=True),
    "window": Kind(6, 2, 24, window=40),
    "narrow window, long blocks": Kind(2, 1, 32, block_tokens=128, window=5),
    "norms": Kind(14, 2, 80, block_tokens=128, qk_norm=True),
    "odd width": Kind(4, 2, 7, rotates=False, alibi=True),
}
FORMATS = {"fp32": F32, "bf16": BF16, "int8": I8}


@dataclass
class Sequence:
    """One sequence: all that its positions will ever ask, and which blocks it has."""

    qkv_TM: Tensor
    blocks: list[int]
    out_TD: list[Tensor] = field(default_factory=list)

    @property
    def done(self) -> int:
        return sum(map(len, self.out_TD))


class Cache:
    """Pages of one layer out of two, in memory full of garbage."""

    def __init__(self, kernels: ctypes.CDLL, kind: Kind, page_format: int, num_blocks: int, garbage: int = NAN):
        self.kernels, self.kind, self.layer = kernels, kind, 1
        self.pages = native.Pages(page_format, 2, kind.num_kv_heads, kind.head_width, kind.block_tokens, 0, num_blocks, None)
        size = kernels.gemel_pages_bytes(ctypes.byref(self.pages))
        memory = np.full(size + 64, garbage, np.uint8)
        self.data = memory[-memory.ctypes.data % 64 :][:size]
        self.pages.data = self.data.ctypes.data
        self.rotation, self.slopes, self.norms = kind.rotation(), kind.slopes(), kind.norms()

    def step(self, work: list[tuple[Sequence, int]], threads: int = 1) -> None:
        """Each sequence goes on by so many tokens."""
        kind, row, keep = self.kind, 0, []
        stretches = (native.Stretch * len(work))()
        for i, (sequence, count) in enumerate(work):
            table = np.array(sequence.blocks, np.int32)
            keep.append(table)
            stretches[i] = native.Stretch(row, sequence.done, count, 0, table.ctypes.data)
            row += count
        qkv_TM = torch.cat([s.qkv_TM[s.done : s.done + count] for s, count in work]).clone()
        out_TD = torch.full((row, kind.num_heads * kind.head_width), float("nan"))
        q_norm, k_norm = self.norms
        addresses = [None if x is None else x.data_ptr() for x in (q_norm, k_norm, self.rotation, self.slopes)]
        attention = native.Attention(self.layer, kind.num_heads, kind.window or 0, kind.eps, *addresses)
        team = self.kernels.gemel_team_new(threads)
        self.kernels.gemel_attend(
            team, ctypes.byref(attention), ctypes.byref(self.pages), len(work), stretches, qkv_TM.data_ptr(), row, out_TD.data_ptr()
        )
        self.kernels.gemel_team_free(team)
        for (sequence, _), out in zip(work, out_TD.split([count for _, count in work]), strict=True):
            sequence.out_TD.append(out)


def sequences(kind: Kind, lengths: list[int], seed: int = 0) -> list[Sequence]:
    """Random ones, their blocks scattered over the pool."""
    torch.manual_seed(seed)
    needed = [-(-length // kind.block_tokens) for length in lengths]
    order = torch.randperm(num_blocks(kind, lengths)).tolist()
    return [Sequence(torch.randn(length, kind.width), [order.pop() for _ in range(n)]) for length, n in zip(lengths, needed, strict=True)]


def num_blocks(kind: Kind, lengths: list[int]) -> int:
    return sum(-(-length // kind.block_tokens) for length in lengths) + 3


def run(cache: Cache, all_sequences: list[Sequence], steps: list[list[int]], threads: int = 1) -> list[Tensor]:
    """Steps say how many tokens each sequence goes on by. Returns each sequence's outputs, [T, N H]."""
    for counts in steps:
        cache.step([(s, count) for s, count in zip(all_sequences, counts, strict=True) if count], threads)
    return [torch.cat(s.out_TD) for s in all_sequences]


def reference(kind: Kind, page_format: int, qkv_TM: Tensor) -> Tensor:
    """The same in float64, from keys and values as the pages keep them."""
    n, k, width = kind.num_heads, kind.num_kv_heads, kind.head_width
    q_TNH, k_TKH, v_TKH = qkv_TM.view(-1, n + 2 * k, width).split([n, k, k], 1)
    q_norm, k_norm = kind.norms()
    if q_norm is not None and k_norm is not None:
        q_TNH, k_TKH = ops.rms_norm(q_TNH, q_norm, kind.eps), ops.rms_norm(k_TKH, k_norm, kind.eps)
    if kind.rotates:
        cos, sin = (table[: len(qkv_TM), None] for table in ops.rope_table(Rope(), width, MAX_POSITIONS))
        q_TNH, k_TKH = ops.rope(q_TNH, cos, sin), ops.rope(k_TKH, cos, sin)
    k_TKH, v_TKH = kept(k_TKH, page_format), kept(v_TKH, page_format)
    slopes = kind.slopes()
    out = ops.attention(
        q_TNH.double(), k_TKH.double(), v_TKH.double(), window=kind.window, slopes_N=None if slopes is None else slopes.double()
    )
    return out.flatten(1)


def kept(x_TKH: Tensor, page_format: int) -> Tensor:
    if page_format == BF16:
        return x_TKH.bfloat16()
    if page_format == I8:
        scale_TK1 = x_TKH.abs().amax(-1, keepdim=True) / 127
        return (x_TKH / scale_TK1).round().clamp(-127, 127) * scale_TK1
    return x_TKH


LENGTHS = [200, 47, 150, 33]
# A prefill in three parts, one at once, one that starts late, a few tokens at a time; decoding beside all of them.
STEPS = [[130, 0, 0, 3], [40, 20, 0, 1], [28, 1, 0, 7], [1, 1, 147, 18], [1, 24, 1, 1], [0, 1, 1, 0], [0, 0, 1, 3]]


@pytest.mark.parametrize("page_format", FORMATS)
@pytest.mark.parametrize("name", KINDS)
def test_agrees_with_float64(kernels, name, page_format):
    kind, form = KINDS[name], FORMATS[page_format]
    cache = Cache(kernels, kind, form, num_blocks(kind, LENGTHS))
    all_sequences = sequences(kind, LENGTHS)
    narrow = kernels.variant == "avx512" and form != F32
    for sequence, got in zip(all_sequences, run(cache, all_sequences, STEPS), strict=True):
        assert_close(got, reference(kind, form, sequence.qkv_TM[: len(got)]), "bf16_reorder" if narrow else "fp32_reference")
