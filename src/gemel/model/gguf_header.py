"""The header of a GGUF file: metadata, and where each tensor lies.

`gguf.GGUFReader` makes several numpy objects per element of a tokenizer's lists, which takes seconds; here long lists are stepped over,
because none of them is needed to build a model, and the whole header takes some tens of milliseconds. Names of types and sizes of blocks
are the package's own.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGMLQuantizationType, GGUFValueType, Keys
from gguf.gguf_reader import READER_SUPPORTED_VERSIONS

_LONG_ARRAY = 1000
_SCALARS = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: struct.Struct("<I"),
    GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.UINT64: struct.Struct("<Q"),
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
    GGUFValueType.BOOL: struct.Struct("<?"),
}
_U32, _U64 = _SCALARS[GGUFValueType.UINT32], _SCALARS[GGUFValueType.UINT64]


@dataclass(frozen=True)
class Span:
    """One tensor: its type, its shape with the longest stride first, and the bytes of the file that it takes."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_header(path: Path) -> tuple[dict[str, object], dict[str, Span]]:
    """Metadata without its long lists, and tensors, by name. Raises ValueError, struct.error or OSError if the file is not whole."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data)
        if cursor.take(_U32) != GGUF_MAGIC:
            raise ValueError("the first four bytes are not GGUF")
        if (version := cursor.take(_U32)) not in READER_SUPPORTED_VERSIONS:
            raise ValueError(f"version {version}; {READER_SUPPORTED_VERSIONS} in little-endian order are read")
        num_tensors, num_keys = cursor.take(_U64), cursor.take(_U64)
        fields = {cursor.string(): cursor.value(GGUFValueType(cursor.take(_U32))) for _ in range(num_keys)}
        entries = [cursor.tensor() for _ in range(num_tensors)]
        alignment = fields.get(Keys.General.ALIGNMENT, GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            raise ValueError(f"{Keys.General.ALIGNMENT} = {alignment!r}")
        first = -(-cursor.at // alignment) * alignment
        spans = {name: Span(kind, shape, first + start, num_bytes) for name, kind, shape, start, num_bytes in entries}
        if len(spans) < len(entries):
            raise ValueError("two tensors have the same name")
        for name, span in spans.items():
            if span.start % 8 or span.start + span.num_bytes > len(data):
                raise ValueError(f"{name} is bytes {span.start} to {span.start + span.num_bytes} of {len(data)}")
    return {name: value for name, value in fields.items() if value is not None}, spans


class _Cursor:
    """Reads from the front to the back."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, scalar: struct.Struct) -> int:
        """One number."""
        value: int = scalar.unpack_from(self.data, self.at)[0]
        self.at += scalar.size
        return value

    def string(self) -> str:
        """A length and that many bytes of UTF-8."""
        num_bytes = self.take(_U64)
        start, self.at = self.at, self.at + num_bytes
        if self.at > len(self.data):
            raise ValueError(f"a text ends at byte {self.at} of {len(self.data)}")
        return self.data[start : self.at].decode("utf-8")

    def value(self, kind: GGUFValueType) -> object:
        """A value of that type; None for a list that is stepped over."""
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.FLOAT32:
            return float(str(np.float32(self.take(_SCALARS[kind]))))  # the shortest decimal that is this fp32 is the one that was meant
        if kind != GGUFValueType.ARRAY:
            return self.take(_SCALARS[kind])
        kind, count = GGUFValueType(self.take(_U32)), self.take(_U64)
        if count <= _LONG_ARRAY or kind == GGUFValueType.ARRAY:
            return [self.value(kind) for _ in range(count)]
        if kind == GGUFValueType.STRING:
            self._skip_strings(count)
        else:
            self.at += count * _SCALARS[kind].size
        return None

    def _skip_strings(self, count: int) -> None:
        length, data, at = _U64.unpack_from, self.data, self.at
        for _ in range(count):
            at += 8 + length(data, at)[0]
        self.at = at

    def tensor(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int, int]:
        """Name, type, shape, start relative to the first tensor, and size in bytes."""
        name = self.string()
        shape = tuple(self.take(_U64) for _ in range(self.take(_U32)))[::-1]
        kind, start = GGMLQuantizationType(self.take(_U32)), self.take(_U64)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise ValueError(f"{name} of type {kind.name} has the shape {list(shape)}, not rows of whole blocks of {block}")
        num_elements = 1
        for size in shape:
            num_elements *= size
        return name, kind, shape, start, num_elements // block * block_bytes
