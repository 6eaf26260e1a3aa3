"""Documents to files: JSON lines and Parquet, in datatrove's form {text, id, metadata} with `source` beside it."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import orjson

from gemel.config.data.pipeline import JsonlOutput, ParquetOutput
from gemel.data.document import Document, Dropped
from gemel.data.manifest import Entry, Shard

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ROW_GROUP_CHARS = 16 * 2**20
NOT_UTF8 = "write.not_utf8"
ZSTD_OPTIONS: dict[int, int] = {zstd.CompressionParameter.compression_level: 3, zstd.CompressionParameter.checksum_flag: 1}


class Writer(Protocol):
    """One file of the output in the making."""

    def write(self, documents: Sequence[Document]) -> Mapping[int, Dropped]:
        """Take documents; those that cannot be written come back, by their index."""

    def commit(self) -> tuple[dict[str, Entry], int | None]:
        """Finish: the files and, if they hold tokens, how many. No file if nothing was written."""

    def abandon(self) -> None:
        """Leave no trace."""


class Compressor(Protocol):
    """The common face of zlib's and zstd's compressors."""

    def compress(self, data: bytes) -> bytes:
        """Some output."""

    def flush(self) -> bytes:
        """The rest of it."""


class _Plain:
    def compress(self, data: bytes) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


def compressor(name: str) -> Compressor:
    """A stream whose bytes depend on its input alone: no names, no times."""
    if name == "gz":
        return zlib.compressobj(6, wbits=31)
    return zstd.ZstdCompressor(options=ZSTD_OPTIONS) if name == "zst" else _Plain()


def encode(row: dict[str, Any]) -> bytes:
    """A line of JSON. Raises `ValueError` if a text in it cannot be written in UTF-8."""
    try:
        return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # integers of more than 64 bits, or lone surrogates
        return (json.dumps(row, ensure_ascii=False, separators=(",", ":"), default=str) + "\n").encode("utf-8")


def _row(document: Document) -> dict[str, Any]:
    return {"text": document.text, "id": document.id, "source": document.source, "metadata": document.metadata}


def _unwritable(document: Document) -> Dropped:
    text, name, source = (_escaped(value) for value in (document.text, document.id, document.source))
    return Dropped(Document(text, name, source, {"as_json": json.dumps(document.metadata, default=str)}), NOT_UTF8, "lone surrogates")


def _escaped(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


class Lines:
    """A file of JSON lines, made when the first line comes."""

    def __init__(self, output: Path, name: str, compression: str):
        self._output, self._name = output, name + ".jsonl" + ("" if compression == "none" else f".{compression}")
        self._compression = compression
        self._shard: Shard | None = None
        self._rows = 0

    def write(self, lines: Sequence[bytes]) -> None:
        """Add lines, with their line ends."""
        if not lines:
            return
        if self._shard is None:
            self._shard = Shard(self._output, self._name)
            self._compressor = compressor(self._compression)
        self._shard.write(self._compressor.compress(b"".join(lines)))
        self._rows += len(lines)

    def commit(self) -> dict[str, Entry]:
        """Finish the file, if there is one."""
        if self._shard is None:
            return {}
        self._shard.write(self._compressor.flush())
        return {self._name: self._shard.commit(self._rows)}

    def abandon(self) -> None:
        """Leave no trace."""
        if self._shard is not None:
            self._shard.abandon()


class JsonlWriter:
    """Kept documents as JSON lines."""

    def __init__(self, output: Path, name: str, config: JsonlOutput):
        self._lines = Lines(output, name, config.compression)

    def write(self, documents: Sequence[Document]) -> Mapping[int, Dropped]:
        """As `Writer.write`."""
        lines: list[bytes] = []
        bad: dict[int, Dropped] = {}
        for i, document in enumerate(documents):
            try:
                lines.append(encode(_row(document)))
            except ValueError:
                bad[i] = _unwritable(document)
        self._lines.write(lines)
        return bad

    def commit(self) -> tuple[dict[str, Entry], int | None]:
        """As `Writer.commit`."""
        return self._lines.commit(), None

    def abandon(self) -> None:
        """As `Writer.abandon`."""
        self._lines.abandon()


class DroppedWriter:
    """Dropped documents as JSON lines, with what dropped them. The form does not depend on the output's, so `inspect` reads one form."""

    def __init__(self, output: Path, name: str):
        self._lines = Lines(output, name, "zst")

    def write(self, step: str, dropped: Sequence[Dropped]) -> None:
        """Add documents that a step dropped."""
        self._lines.write([self._encode(step, drop) for drop in dropped])

    def _encode(self, step: str, drop: Dropped) -> bytes:
        try:
            return encode({"reason": drop.reason, "detail": drop.detail, "step": step, **_row(drop.document)})
        except ValueError:
            document = _unwritable(drop.document).document
            return encode({"reason": drop.reason, "detail": _escaped(drop.detail), "step": step, **_row(document)})

    def commit(self) -> dict[str, Entry]:
        """As `Lines.commit`."""
        return self._lines.commit()

    def abandon(self) -> None:
        """As `Lines.abandon`."""
        self._lines.abandon()


class ParquetWriter:
    """Kept documents as Parquet. Row groups are cut by characters, so that one fits into memory however long documents are."""

    def __init__(self, output: Path, name: str, config: ParquetOutput):
        self._output, self._name, self._compression = output, name + ".parquet", config.compression
        self._shard: Shard | None = None
        self._columns: tuple[list[str], list[str], list[str], list[str]] = ([], [], [], [])
        self._chars = self._rows = 0

    def write(self, documents: Sequence[Document]) -> Mapping[int, Dropped]:
        """As `Writer.write`."""
        bad: dict[int, Dropped] = {}
        for i, document in enumerate(documents):
            try:
                row = (document.text, document.id, document.source, encode(document.metadata)[:-1].decode())
                for value in row[:3]:
                    value.isascii() or value.encode()
            except ValueError:
                bad[i] = _unwritable(document)
                continue
            for column, value in zip(self._columns, row, strict=True):
                column.append(value)
            self._chars += len(document.text)
            if self._chars >= ROW_GROUP_CHARS:
                self._write_group()
        return bad

    def _write_group(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = dict(zip(("text", "id", "source", "metadata"), self._columns, strict=True))
        table = pa.table({name: pa.array(values, pa.large_string()) for name, values in columns.items()})
        if self._shard is None:
            self._shard = Shard(self._output, self._name)
            self._file = pq.ParquetWriter(self._shard, table.schema, compression=self._compression)
        self._file.write_table(table)
        self._rows += table.num_rows
        self._columns, self._chars = ([], [], [], []), 0

    def commit(self) -> tuple[dict[str, Entry], int | None]:
        """As `Writer.commit`."""
        if self._columns[0]:
            self._write_group()
        if self._shard is None:
            return {}, None
        self._file.close()
        return {self._name: self._shard.commit(self._rows)}, None

    def abandon(self) -> None:
        """As `Writer.abandon`."""
        if self._shard is not None:
            self._shard.abandon()
