"""Byte streams cut at a separator, in bounded memory and between any two offsets.

A record belongs to the range in which it begins, so neighbouring ranges agree without knowing of each other: each looks for the first
separator at or before its own start, and reads its last record to the end although that lies beyond.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from gemel.data.read.files import Damaged
from gemel.data.read.reader import EXCERPT_BYTES

NEWLINE = b"\n"


class Record(NamedTuple):
    """What stands between two separators. `data` is only its beginning if it is too long, or if the file is damaged in it."""

    offset: int
    data: bytes
    num_bytes: int
    damage: Damaged | None = None


def records(chunks: Iterator[bytes], separator: bytes, max_bytes: int, start: int = 0, stop: int | None = None) -> Iterator[Record]:
    """The records that begin in [start, stop). `chunks` must begin `len(separator)` before `start`, or at 0 if that is the start."""
    found = _records(chunks, separator, max_bytes, start - len(separator) if start else 0, stop)
    if start:
        next(found, None)  # the end of a record that began earlier, empty if one begins exactly here
    yield from found


def _records(chunks: Iterator[bytes], separator: bytes, max_bytes: int, offset: int, stop: int | None) -> Iterator[Record]:
    width = len(separator)
    rest = b""  # of the record that begins at `offset`, as far as it has been read
    excerpt: bytes | None = None  # if that record is too long: its beginning; `rest` is then only what may begin a separator
    long_bytes = 0  # and how much of it has been thrown away
    try:
        for chunk in chunks:
            if width == 1:
                parts = chunk.split(separator)
                parts[0] = rest + parts[0]
            else:  # which may lie across the border of two chunks
                parts = (rest + chunk).split(separator)
            rest = parts.pop()
            for part in parts:
                if stop is not None and offset >= stop:
                    return
                num_bytes = long_bytes + len(part)
                if excerpt is not None:
                    yield Record(offset, excerpt, num_bytes)
                    excerpt, long_bytes = None, 0
                elif num_bytes > max_bytes:
                    yield Record(offset, part[:EXCERPT_BYTES], num_bytes)
                else:
                    yield Record(offset, part, num_bytes)
                offset += num_bytes + width
            if stop is not None and offset >= stop:
                return
            if len(rest) > max_bytes or excerpt is not None:
                excerpt = rest[:EXCERPT_BYTES] if excerpt is None else excerpt
                keep = len(rest) - width + 1 if width > 1 else len(rest)
                long_bytes += max(keep, 0)
                rest = rest[max(keep, 0) :]
    except Damaged as damage:
        yield Record(offset, excerpt or rest[:EXCERPT_BYTES], long_bytes + len(rest), damage)
        return
    if (rest or long_bytes) and (stop is None or offset < stop):
        yield Record(offset, rest if excerpt is None else excerpt, long_bytes + len(rest))
