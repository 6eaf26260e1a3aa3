"""The binding: finds the fastest compiled variant that this processor can run, and speaks to it through plain C.

Structures here mirror those of gemel.h field by field. Pointers are plain addresses; whoever passes one keeps its memory alive.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Iterable
from ctypes import Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

from gemel.ops import hardware

F32, BF16, I8, I4 = range(4)
STORE, ADD, SWIGLU, GELU = range(4)
EMBED, NORM, LINEAR, ATTEND, SELECT, LOGITS = range(6)

# Best first, with what each needs of the processor in the spelling of `hardware.isa`.
VARIANTS = {
    "avx512": ("avx512f", "avx512_bf16", "avx512_vnni"),
    "avx2": ("avx2", "fma", "f16c"),
    "generic": (),
}


class Weight(Structure):
    """gemel_weight."""

    _fields_ = [
        *((name, c_int32) for name in ("format", "n", "k", "group", "minima", "quantize", "paired", "reserved")),
        ("bias", c_void_p),
        ("packed", c_void_p),
    ]


class Pages(Structure):
    """gemel_pages."""

    _fields_ = [
        *((name, c_int32) for name in ("format", "layers", "heads", "width", "block_tokens", "reserved")),
        ("blocks", c_int64),
        ("data", c_void_p),
    ]


class Stretch(Structure):
    """gemel_stretch."""

    _fields_ = [*((name, c_int32) for name in ("row", "start", "count", "reserved")), ("blocks", c_void_p)]


class Attention(Structure):
    """gemel_attention."""

    _fields_ = [
        *((name, c_int32) for name in ("layer", "num_heads", "window")),
        ("eps", c_float),
        *((name, c_void_p) for name in ("q_norm", "k_norm", "rotation", "slopes")),
    ]


class Slot(Structure):
    """gemel_slot."""

    _fields_ = [("rows", c_int32), ("width", c_int32)]


class Op(Structure):
    """gemel_op."""

    _fields_ = [
        *((name, c_int32) for name in ("kind", "from_", "to", "label", "epilogue", "format")),
        ("eps", c_float),
        ("reserved", c_int32),
        *((name, c_void_p) for name in ("table", "positions", "scale", "shift")),
        ("weight", Weight),
        ("attention", Attention),
    ]


class Step(Structure):
    """gemel_step."""

    _fields_ = [
        *((name, c_int32) for name in ("num_tokens", "num_stretches", "num_sampled", "reserved")),
        *((name, c_void_p) for name in ("tokens", "positions", "sampled", "stretches", "logits", "largest", "argmax")),
    ]


class Draw(Structure):
    """gemel_draw."""

    _fields_ = [
        *((name, c_int32) for name in ("row", "likeliest")),
        *((name, c_float) for name in ("largest", "temperature")),
        *((name, c_int32) for name in ("top_k", "logprobs")),
        *((name, c_float) for name in ("repetition", "presence", "frequency")),
        *((name, c_int32) for name in ("num_marked", "num_banned", "reserved")),
        *((name, c_double) for name in ("top_p", "min_p")),
        *((name, c_uint64) for name in ("seed", "stream", "counter")),
        *((name, c_void_p) for name in ("marked", "counts", "bias", "banned")),
    ]


# name: (result, arguments)
_SIGNATURES = {
    "gemel_packed_bytes": (c_int64, [c_void_p]),
    "gemel_pack": (None, [c_void_p] * 6),
    "gemel_unpack": (None, [c_void_p] * 2),
    "gemel_team_new": (c_void_p, [c_int32]),
    "gemel_team_free": (None, [c_void_p]),
    "gemel_matmul": (None, [c_void_p, c_void_p, c_void_p, c_int32, c_void_p, c_int32]),
    "gemel_pages_bytes": (c_int64, [c_void_p]),
    "gemel_pages_copy": (None, [c_void_p, c_int32, c_void_p, c_void_p]),
    "gemel_attend": (None, [c_void_p, c_void_p, c_void_p, c_int32, c_void_p, c_void_p, c_int32, c_void_p]),
    "gemel_program_new": (c_void_p, [c_int32, c_int32, c_void_p, c_int32, c_void_p, c_void_p]),
    "gemel_program_free": (None, [c_void_p]),
    "gemel_program_run": (None, [c_void_p, c_void_p]),
    "gemel_program_team": (c_void_p, [c_void_p]),
    "gemel_program_profile": (None, [c_void_p, c_int32, c_void_p]),
    "gemel_sampler_new": (c_void_p, [c_void_p, c_int32]),
    "gemel_sampler_free": (None, [c_void_p]),
    "gemel_sampler_run": (None, [c_void_p, c_void_p, c_int32, c_void_p, c_void_p, c_void_p, c_int32, c_void_p, c_void_p]),
    "gemel_variant": (c_char_p, []),
}


def open_library(path: Path, names: Iterable[str] = tuple(_SIGNATURES)) -> ctypes.CDLL:
    """Load one variant and declare its functions. Calls release the interpreter's lock."""
    library = ctypes.CDLL(str(path))
    for name in names:
        function = getattr(library, name)
        function.restype, function.argtypes = _SIGNATURES[name]
    return library


@functools.cache
def find() -> tuple[ctypes.CDLL | None, str]:
    """The library for this processor, and its variant; or None and why there is none."""
    have = set(hardware.isa())
    folder = Path(__file__).parent
    compiled = [name for name in VARIANTS if (folder / f"{name}.so").exists()]
    if not compiled:
        return None, "the CPU kernels were not compiled at install: install a C++ compiler and reinstall gemel"
    runnable = [name for name in compiled if have.issuperset(VARIANTS[name])]
    if not runnable:
        return None, f"none of the compiled CPU kernels ({', '.join(compiled)}) runs on this {platform.machine()} processor"
    try:
        return open_library(folder / f"{runnable[0]}.so"), runnable[0]
    except (OSError, AttributeError) as error:
        return None, f"the CPU kernels could not be loaded ({error}): reinstall gemel"
