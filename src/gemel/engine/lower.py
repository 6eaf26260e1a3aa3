"""Lowering: a model becomes a flat list of native operations, run by one call per step.

It is to the CPU what capturing a graph is to a GPU. The model stays the one definition of what is computed; here its parts are walked once,
in the order of `Model.forward`, and each becomes an operation that points at its weights. What cannot be expressed is named by `reason`
before anything is loaded, and then the same step runs in torch.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor, nn

from gemel import ops
from gemel.config.engine import EngineConfig
from gemel.config.errors import UnsupportedError
from gemel.config.model import Alibi, ModelConfig
from gemel.engine.logits import Logits
from gemel.engine.request import Scheduled, flatten
from gemel.model.attention import Attention
from gemel.model.block import Block
from gemel.model.ffn import SwiGLU
from gemel.model.leaves.linear import Leaf, Linear
from gemel.model.leaves.lowbit import LowBitLinear
from gemel.model.leaves.native import Arena, NativeLinear, aligned, describe, packed_bytes, unpackable
from gemel.model.model import Model
from gemel.model.norm import LayerNorm, RMSNorm
from gemel.ops.cpu import native
from gemel.ops.cpu.program import Listing, Program, Stretch
from gemel.ops.cpu.sampler import Sampler

TILE = 16  # tokens that lie together in a native page
KV_FORMATS = {"float32": native.F32, "bfloat16": native.BF16, "int8": native.I8}
TABLES = {torch.float32: native.F32, torch.bfloat16: native.BF16}


def reason(model: ModelConfig, config: EngineConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this model cannot run as a native program here, or None if it can."""
    library, variant = native.find()
    if config.kernels == "torch":
        return "kernels = 'torch' was set"
    if device.type != "cpu":
        return f"the native kernels are for the CPU, and the device is {device}"
    if library is None:
        return variant
    if dtype not in TABLES:
        return f"the native kernels compute in fp32 and bf16, and dtype is {str(dtype).removeprefix('torch.')}"
    if config.block_tokens % TILE:
        return f"native pages hold tiles of {TILE} tokens, and block_tokens is {config.block_tokens}"
    odd = [f"{name} = {width}" for name, width in _widths(model).items() if width % 2]
    return f"the native kernels take pairs of elements, and {', '.join(odd)} is odd" if odd else None


def unsupported_leaf(model: Model) -> str | None:
    """The first matrix that has no native form, or None."""
    for name, leaf in model.named_modules():
        if isinstance(leaf, Leaf) and (why := unpackable(leaf)):
            return f"{name} {why}"
    return None


def _widths(model: ModelConfig) -> dict[str, int]:
    return {"width": model.width, "head_width": model.head_width, "ffn_width": model.ffn_width}


class NativeStep:
    """A lowered model and its pages of keys and values."""

    def __init__(self, model: Model, num_blocks: int, block_tokens: int, kv: str, threads: int):
        library, _ = native.find()
        assert library is not None
        self._library = library
        self.pages = _pages(model.config, num_blocks, block_tokens, kv)
        size = int(library.gemel_pages_bytes(ctypes.byref(self.pages)))
        # Zero pages of the system: they take no memory until they are written.
        self._memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = np.frombuffer(self._memory, np.uint8)
        self.pages.data = self._bytes.ctypes.data
        self.program = lower(model, library, self.pages, threads)
        self._sampler = Sampler(library, self.program.team, model.config.vocab_size, self.program)

    @staticmethod
    def bytes_per_block(model: ModelConfig, block_tokens: int, kv: str) -> int:
        """Memory of one block over all layers, in bytes."""
        library, _ = native.find()
        assert library is not None
        return int(library.gemel_pages_bytes(ctypes.byref(_pages(model, 1, block_tokens, kv))))

    def copy(self, pairs: Seq[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to), before a shared block is written."""
        if pairs:
            source, target = np.array(pairs, np.int32).T.copy()
            self._library.gemel_pages_copy(ctypes.byref(self.pages), len(pairs), source.ctypes.data, target.ctypes.data)

    def run(self, work: Seq[Scheduled]) -> Logits:
        """Compute the scheduled tokens. The logits are valid until the next step."""
        tokens, positions, sampled = (np.array(values, np.int32) for values in flatten(work))
        stretches = [Stretch(item.start, item.num_new, item.sequence.blocks) for item in work]
        logits_SV, largest_S, argmax_S = self.program.run(tokens, positions, stretches, sampled)
        return Logits(torch.from_numpy(logits_SV), argmax_S.tolist(), largest_S.tolist(), self._sampler)


def _pages(model: ModelConfig, num_blocks: int, block_tokens: int, kv: str) -> native.Pages:
    return native.Pages(KV_FORMATS[kv], model.num_layers, model.num_kv_heads, model.head_width, block_tokens, 0, num_blocks, None)


def lower(model: Model, library: ctypes.CDLL, pages: native.Pages, threads: int) -> Program:
    """The program of a model. Its matrices are packed on the way and the plain ones freed, so that every weight exists once."""
    return _Lowering(model, library).program(pages, threads)


class _Lowering:
    """Walks a model and writes its listing."""

    def __init__(self, model: Model, library: ctypes.CDLL):
        self.model, self.config, self.library = model, model.config, library
        self.listing = Listing()
        leaves = [leaf for leaf in model.modules() if isinstance(leaf, Linear | LowBitLinear)]
        self.arena = Arena(sum(aligned(packed_bytes(library, describe(leaf))) for leaf in leaves))
        self.rotation = self._fp32(model.rotary.table) if model.rotary is not None else None
        self.slopes = self._fp32(ops.alibi_slopes(self.config.num_heads)) if isinstance(self.config.positions, Alibi) else None

    def program(self, pages: native.Pages, threads: int) -> Program:
        config, listing = self.config, self.listing
        stream, normed = listing.slot(config.width), listing.slot(config.width)
        heads = config.num_heads + 2 * config.num_kv_heads
        qkv, mixed = listing.slot(heads * config.head_width), listing.slot(config.num_heads * config.head_width)
        hidden = listing.slot(config.ffn_width)
        self._embed(stream)
        for layer, block in enumerate(self.model.layers):
            assert isinstance(block, Block)
            self._norm(block.attn_norm, stream, normed)
            self._linear("qkv", block.attn, "qkv", normed, qkv)
            self._attend(layer, block.attn, qkv, mixed)
            self._linear("out", block.attn, "out", mixed, stream, native.ADD)
            self._norm(block.mlp_norm, stream, normed)
            if isinstance(block.mlp, SwiGLU):
                self._linear("gate_up", block.mlp, "gate_up", normed, hidden, native.SWIGLU)
            else:
                self._linear("up", block.mlp, "up", normed, hidden, native.GELU)
            self._linear("down", block.mlp, "down", hidden, stream, native.ADD)
        last, final = listing.slot(config.width, sampled=True), listing.slot(config.width, sampled=True)
        listing.add(native.SELECT, "norm", stream, last)
        self._norm(self.model.norm, last, final)
        listing.add(native.LOGITS, "head", final, final, weight=self._pack(self.model, "head"))
        return Program(self.library, listing, pages, threads, config.vocab_size)

    def _embed(self, to: int) -> None:
        table = self._dense(self.model.embed.weight)
        positions = None if self.model.positions is None else self._dense(self.model.positions.weight).data_ptr()
        self.listing.add(native.EMBED, "embed", to, to, table=table.data_ptr(), positions=positions, format=TABLES[table.dtype])
        if self.model.embed_norm is not None:
            self._norm(self.model.embed_norm, to, to)

    def _norm(self, norm: RMSNorm | LayerNorm, from_: int, to: int) -> None:
        scale = self._fp32(norm.weight).data_ptr()
        shift = self._fp32(norm.bias).data_ptr() if isinstance(norm, LayerNorm) else None
        self.listing.add(native.NORM, "norm", from_, to, scale=scale, shift=shift, eps=norm.eps)

    def _linear(self, label: str, owner: nn.Module, name: str, from_: int, to: int, epilogue: int = native.STORE) -> None:
        weight = self._pack(owner, name, paired=epilogue == native.SWIGLU)
        self.listing.add(native.LINEAR, label, from_, to, weight=weight, epilogue=epilogue)

    def _attend(self, layer: int, attention: Attention, from_: int, to: int) -> None:
        norms = [None if norm is None else self._fp32(norm.weight).data_ptr() for norm in (attention.q_norm, attention.k_norm)]
        tables = [None if table is None else table.data_ptr() for table in (self.rotation, self.slopes)]
        described = native.Attention(layer, self.config.num_heads, self.config.window(layer) or 0, self.config.norm.eps, *norms, *tables)
        self.listing.add(native.ATTEND, "attention", from_, to, attention=described)

    def _pack(self, owner: nn.Module, name: str, paired: bool = False) -> native.Weight:
        """Put the packed form of a leaf in its place."""
        leaf = getattr(owner, name)
        if not isinstance(leaf, Linear | LowBitLinear):
            raise UnsupportedError(f"a {type(leaf).__name__} has no native form; set kernels = 'torch'")
        packed = NativeLinear(leaf, self.library, paired, self.arena)
        setattr(owner, name, packed)
        self.listing.keep.append(packed)
        return packed.weight

    def _dense(self, table: Tensor) -> Tensor:
        """A table that is read where it lies."""
        table = table.detach()
        assert table.is_contiguous()
        self.listing.keep.append(table)
        return table

    def _fp32(self, values: Tensor) -> Tensor:
        """Small vectors, in the type that the kernels read them in."""
        return self._dense(values.detach().float().contiguous())
