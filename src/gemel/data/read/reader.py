"""What all readers are: they say into which pieces an input may be cut, and read one piece.

A piece must mean the same documents whoever reads it and whatever else is read: that is what makes a lost piece repeatable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from gemel.data.document import Document, Dropped

EXCERPT_BYTES = 4096  # what is kept of something that is too long to keep


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a file: of whatever begins at `start` or later, but before `stop`. Bytes, or row groups of a Parquet file.

    `weight_bytes` is how much of the stored input it is, for cutting the work evenly and for progress.
    """

    path: str
    start: int
    stop: int
    weight_bytes: int


@dataclass(slots=True)
class Reading:
    """What a reader has done so far, for whoever watches: bytes taken from storage, and records that were never meant to be documents."""

    num_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


class Reader(Protocol):
    """One input of a recipe."""

    def pieces(self) -> Sequence[Piece]:
        """The whole input, in order. Errors: `ConfigError` if there is none."""

    def read(self, piece: Piece, reading: Reading) -> Iterator[Document | Dropped]:
        """The documents of a piece, in order."""


def cut(path: str, size_bytes: int, unit_bytes: int) -> list[Piece]:
    """A file in equal parts of at most `unit_bytes`; one empty part of an empty file, so that it is not forgotten."""
    num = max(1, -(-size_bytes // unit_bytes))
    edges = [size_bytes * i // num for i in range(num + 1)]
    return [Piece(path, start, stop, stop - start) for start, stop in pairwise(edges)]


def printable(data: bytes) -> str:
    """Any bytes as text; those that are not UTF-8 are written as \\xNN."""
    return data.decode("utf-8", "backslashreplace")
