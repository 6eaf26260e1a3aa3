"""Weights in every packed format, with what they mean in float64, and one product with them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gemel.ops.cpu import native

SOURCES = ("weights.cpp", "matmul.cpp", "threads.cpp", "norm.cpp")
NAMES = (
    *("gemel_packed_bytes", "gemel_pack", "gemel_unpack", "gemel_matmul"),
    *("gemel_team_new", "gemel_team_free"),
)

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Kind:
    """A format of weights; `group` along k, 0 for whole rows."""

    format: int
    group: int = 0
    minima: bool = False
    quantize: bool = False

    def __str__(self) -> str:
        name = ("f32", "bf16", "i8", "i4")[self.format] + (f"g{self.group}" if self.group else "")
        return name + ("m" if self.minima else "") + ("q" if self.quantize else "")


FULL = [Kind(native.F32), Kind(native.BF16)]
LOW = [Kind(native.I8), Kind(native.I8, 32), *(Kind(native.I4, group, minima) for group in (32, 64, 128) for minima in (False, True))]
ROUNDED = [Kind(kind.format, kind.group, kind.minima, quantize=True) for kind in LOW]


def aligned(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Memory that begins at a multiple of 64 bytes, filled with what no packer writes."""
    memory = np.full(num_bytes + 64, 0xA5, np.uint8)
    return memory[-memory.ctypes.data % 64 :][:num_bytes]


def round_bf16(x: Array) -> Array:
    """To nearest, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


@dataclass(frozen=True)
class Kernels:
    """One variant, compiled."""

    variant: str
    library: ctypes.CDLL


class Product:
    """A random weight [n, k] of some kind, packed by one library; `dense` is what it means."""

    def __init__(self, kernels: Kernels, kind: Kind, n: int, k: int, *, paired: bool = False, bias: bool = False, seed: int = 0) -> None:
        self.library, self.variant, self.kind, self.n, self.k = kernels.library, kernels.variant, kind, n, k
        random = np.random.default_rng(seed)
        self.bias = random.standard_normal(n, np.float32) if bias else None
        groups = k // kind.group if kind.group else 1
        scales = random.uniform(0.5, 1.5, (n, groups)).astype(np.float32) / 64
        minima = random.uniform(-0.2, 0.05, (n, groups)).astype(np.float32)
        if kind.group:  # what fits fp16; rounding itself is tested apart
            scales, minima = scales.astype(np.float16).astype(np.float32), minima.astype(np.float16).astype(np.float32)
        if kind.format in (native.F32, native.BF16):
            self.dense = random.standard_normal((n, k), np.float32)
            values = self.dense
            if kind.format == native.BF16:
                self.dense = round_bf16(self.dense)
                values = (self.dense.view(np.uint32) >> 16).astype(np.uint16)
        else:
            low, high = (-127, 128) if kind.format == native.I8 else (0, 16)
            whole = random.integers(low, high, (n, k))
            wide = scales.repeat(k // groups, 1)
            if kind.format == native.I8:
                values, self.dense = whole.astype(np.int8), wide * whole.astype(np.float32)
            else:
                values = (whole[:, ::2] | whole[:, 1::2] << 4).astype(np.uint8)
                # In float64, rounded once: products of fp16 with 4 bits are exact, so this is what a fused multiply-add gives as well.
                exact = wide.astype(np.float64) * whole + (minima.repeat(k // groups, 1) if kind.minima else -8.0 * wide)
                self.dense = exact.astype(np.float32)
        self.pack(values, scales, minima, paired=paired)

    def pack(self, values: npt.NDArray[np.generic], scales: Array, minima: Array, *, paired: bool = False) -> None:
        """Replace the packed weight."""
        kind, values = self.kind, np.ascontiguousarray(values)
        self.weight = native.Weight(kind.format, self.n, self.k, kind.group, kind.minima, kind.quantize, paired)
        if self.bias is not None:
            self.weight.bias = self.bias.ctypes.data
        self.packed = aligned(self.library.gemel_packed_bytes(ctypes.byref(self.weight)))
        pointers = (values.ctypes.data, scales.ctypes.data, minima.ctypes.data, self.packed.ctypes.data)
        self.library.gemel_pack(None, ctypes.byref(self.weight), *pointers)
        self.weight.packed = self.packed.ctypes.data

    def unpacked(self) -> Array:
        """What the library says the weight is."""
        values = np.full((self.n, self.k), np.nan, np.float32)
        self.library.gemel_unpack(ctypes.byref(self.weight), values.ctypes.data)
        return values

    def __call__(self, x: Array, epilogue: int = native.STORE, *, y: Array | None = None, threads: int = 1) -> Array:
        """epilogue(x W^T + bias), into a copy of `y` where that is given."""
        width = self.n // 2 if epilogue == native.SWIGLU else self.n
        out = np.full((len(x), width), np.nan, np.float32) if y is None else y.copy()
        x = np.ascontiguousarray(x)
        team = self.library.gemel_team_new(threads)
        self.library.gemel_matmul(team, ctypes.byref(self.weight), x.ctypes.data, len(x), out.ctypes.data, epilogue)
        self.library.gemel_team_free(team)
        return out

    def as_given(self, x: Array) -> npt.NDArray[np.float64]:
        """The activations that this product computes with: rounded as its form wants them."""
        if self.kind.format == native.BF16 and self.variant == "avx512":
            return round_bf16(x).astype(np.float64)
        if not self.kind.quantize:
            return x.astype(np.float64)
        groups = x.reshape(len(x), -1, 32)
        most = np.abs(groups).max(2, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            whole = np.where(most > 0, np.rint(groups * (np.float32(127) / most)), 0)
        return (whole.astype(np.float64) * (most / np.float32(127))).reshape(x.shape)
