"""Safetensors files, written tensor by tensor.

The library's writer takes all tensors of a file at once, and so has them all in memory. But a file is a header, which says what lies where,
and then bytes; and what lies where follows from names, shapes and types. So here the header comes first, and each tensor when it is there.
The bytes are those that the library would write.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

CODES = {  # in the library's order, of which later ones come first in a file, so that every tensor is aligned
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_ORDER = {dtype: -place for place, dtype in enumerate(CODES)}
_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """A tensor that a file will have."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Self:
        """Of a tensor, which need not have memory."""
        return cls(name, tuple(tensor.shape), tensor.dtype)

    @property
    def num_bytes(self) -> int:
        """That its elements take."""
        return math.prod(self.shape) * self.dtype.itemsize


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """As they lie in a file: who puts them in this order writes it from its beginning to its end."""
    return sorted(entries, key=lambda entry: (_ORDER[entry.dtype], entry.name))


class TensorFile:
    """A file that is being written; `put` everything that it was announced to have, in any order, before the context ends."""

    def __init__(self, path: Path, entries: Iterable[Entry], metadata: Mapping[str, str] | None = None):
        self._entries, position = {entry.name: entry for entry in in_order(entries)}, 0
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        starts = {}
        for name, entry in self._entries.items():
            starts[name], position = position, position + entry.num_bytes
            header[name] = {"dtype": CODES[entry.dtype], "shape": entry.shape, "data_offsets": (starts[name], position)}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        self._header = text + b" " * (-len(text) % _ALIGNMENT)
        self._starts = {name: 8 + len(self._header) + start for name, start in starts.items()}
        self._path, self._missing = path, set(self._entries)

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        self._file.write(len(self._header).to_bytes(8, "little") + self._header)
        return self

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one of the tensors; it may lie on any device, in any layout."""
        assert Entry.of(name, tensor) == self._entries[name] and name in self._missing, f"{name} is not what was announced"
        self._missing.remove(name)
        self._file.seek(self._starts[name])
        if tensor.numel():
            self._file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        assert error is not None or not self._missing, f"{sorted(self._missing)} were announced and never came"
