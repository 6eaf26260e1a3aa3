"""Inference on CPU: a weight in the layout that the native kernels read, in whatever format the leaf had.

Dense weights stay fp32 or bf16, low-bit ones keep their numbers; nothing is rounded by packing. Lowering a model puts these leaves in the
place of the others and points its program at them, so that every weight exists once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap

import torch
from torch import Tensor, nn

from gemel.config.errors import UnsupportedError
from gemel.model.leaves.linear import Leaf, Linear, ShardStyle, shard_sections, shard_weight
from gemel.model.leaves.lowbit import LowBitLinear
from gemel.ops.cpu import native

FORMATS = {torch.float32: native.F32, torch.bfloat16: native.BF16}


def unpackable(leaf: Leaf) -> str | None:
    """Why a leaf has no native form, or None if it has one."""
    if isinstance(leaf, LowBitLinear):
        return f"has {leaf.in_features} columns, not a multiple of 32" if leaf.in_features % 32 else None
    exactly: type = type(leaf)  # what derives from Linear computes something else
    if not isinstance(leaf, Linear) or exactly is not Linear:
        return f"is a {type(leaf).__name__}, which has no native form"
    return None if leaf.weight.dtype in FORMATS else f"is stored as {leaf.weight.dtype}"


def describe(leaf: Linear | LowBitLinear, paired: bool = False) -> native.Weight:
    """The native form of a leaf, without its numbers. `paired`: gate and up lie side by side."""
    weight = native.Weight(n=leaf.out_features, k=leaf.in_features, paired=paired)
    if isinstance(leaf, LowBitLinear):
        weight.format = native.I8 if leaf.bits == 8 else native.I4
        weight.group, weight.minima, weight.quantize = leaf.group, leaf.minimum is not None, leaf.activations == "int8"
    else:
        weight.format = FORMATS[leaf.weight.dtype]
    return weight


class Arena:
    """One stretch of memory for all packed weights, in large pages where the system has them: reading it misses fewer translations."""

    def __init__(self, num_bytes: int):
        memory = mmap.mmap(-1, max(num_bytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        self._free = torch.frombuffer(memory, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """The next piece, aligned to a cache line."""
        rounded = aligned(num_bytes)
        piece, self._free = self._free[:num_bytes], self._free[rounded:]
        return piece


def aligned(num_bytes: int) -> int:
    """Bytes in whole cache lines."""
    return -(-num_bytes // 64) * 64


class NativeLinear(nn.Module):
    """x W^T + b by native kernels. `weight` is what operations of a program point to."""

    bias: Tensor | None

    def __init__(self, leaf: Linear | LowBitLinear, library: ctypes.CDLL, paired: bool = False, arena: Arena | None = None):
        super().__init__()
        self._library, self._paired = library, paired
        self._pack(leaf, arena)

    def _pack(self, leaf: Linear | LowBitLinear, arena: Arena | None) -> None:
        self.in_features, self.out_features, self.sections = leaf.in_features, leaf.out_features, leaf.sections
        self.register_buffer("bias", None if leaf.bias is None else leaf.bias.detach().float(), persistent=False)
        self.weight = describe(leaf, self._paired)
        size = packed_bytes(self._library, self.weight)
        self._packed = (arena or Arena(size)).take(size)
        scales = minima = None
        if isinstance(leaf, LowBitLinear):
            values, scales = leaf.q.contiguous(), leaf.scale.float().contiguous()
            minima = None if leaf.minimum is None else leaf.minimum.float().contiguous()
        else:
            values = leaf.weight.detach().contiguous()
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in (values, scales, minima)]
        team = _team(self._library, torch.get_num_threads())
        self._library.gemel_pack(team, ctypes.byref(self.weight), *addresses, self._packed.data_ptr())
        self.weight.packed = self._packed.data_ptr()
        self.weight.bias = None if self.bias is None else self.bias.data_ptr()

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, in_features] to [T, out_features], computed in fp32."""
        x = x_TD.float().contiguous()
        y = torch.empty(*x.shape[:-1], self.out_features)
        team = _team(self._library, torch.get_num_threads())
        rows = x.numel() // self.in_features
        self._library.gemel_matmul(team, ctypes.byref(self.weight), x.data_ptr(), rows, y.data_ptr(), native.STORE)
        return y.to(x_TD.dtype)

    def plain(self) -> Tensor:
        """The weight that the products compute with, [out_features, in_features]."""
        values = torch.empty(self.out_features, self.in_features)
        self._library.gemel_unpack(ctypes.byref(self.weight), values.data_ptr())
        return values.bfloat16() if self.weight.format == native.BF16 else values

    def shard(self, style: ShardStyle, rank: int, size: int) -> None:
        """Keep part `rank` of `size`, packed anew. Low-bit weights are to be cut before they are packed."""
        if self.weight.format not in FORMATS.values():
            raise UnsupportedError("a packed low-bit weight cannot be cut; shard the model before it is lowered")
        weight, bias = shard_weight(self.plain(), self.bias, self.sections, style, rank, size)
        part = Linear(weight.shape[1], weight.shape[0], bias is not None, shard_sections(self.sections, style, size))
        part.weight = nn.Parameter(weight)
        part.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self._pack(part, None)

    def extra_repr(self) -> str:
        """Widths and format."""
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.weight.format}"


def packed_bytes(library: ctypes.CDLL, weight: native.Weight) -> int:
    """Memory of the packed weight."""
    return int(library.gemel_packed_bytes(ctypes.byref(weight)))


@functools.cache
def _team(library: ctypes.CDLL, threads: int) -> int:
    """Threads for products outside of programs, made once."""
    return int(library.gemel_team_new(threads))
