"""Documents that are rows with named fields: JSON lines, and Parquet.

Both forms that are common are understood as they are: flat rows whose other fields become metadata, and datatrove's {text, id, metadata}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import orjson

from gemel.config.data.pipeline import JsonlInput, ParquetInput, RowInput
from gemel.data.document import Document, Dropped
from gemel.data.read import files
from gemel.data.read.lines import NEWLINE, Record, records
from gemel.data.read.reader import EXCERPT_BYTES, Piece, Reading, cut, printable

BLANKS = b" \t\r\n"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ROWS_AT_ONCE = 64  # of a Parquet row group; few, because a row may be large


def document(row: dict[str, Any], config: RowInput, place: str) -> Document | Dropped:
    """One row as a document. `place` names it if the row does not."""
    text = row.pop(config.text_field, None)
    name = row.pop(config.id_field, None)
    source = row.pop(config.source_field, None) if config.source_field in row else None
    metadata = row.pop("metadata", None)
    if isinstance(metadata, str):
        metadata = _object(metadata)
    if isinstance(metadata, dict):
        row = {**metadata, **row}
    elif metadata is not None:
        row["metadata"] = metadata
    made = Document(
        text if isinstance(text, str) else "",
        place if name is None else str(name),
        source if isinstance(source, str) else config.source or config.kind,  # type: ignore[attr-defined]
        row,
    )
    if made.text and not made.text.isspace():
        return made
    if isinstance(text, bytes):
        made.text = printable(text)
        return Dropped(made, "read.not_utf8", f"text_field = {config.text_field!r}")
    if isinstance(text, str):
        return Dropped(made, "read.empty", f"{len(text)} characters, all blank")
    what = "no such field" if text is None else f"it is a {type(text).__name__}"
    return Dropped(made, "read.no_text", f"text_field = {config.text_field!r}: {what}")


def _object(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


class JsonlReader:
    """Lines of JSON. Plain files are cut anywhere, compressed ones are read whole."""

    def __init__(self, config: JsonlInput):
        self.config = config

    def pieces(self) -> list[Piece]:
        """As `Reader.pieces`."""
        found = files.find(self.config.paths, (".jsonl", ".ndjson", ".json"))
        sizes = [(file, file.size_bytes + 1 if file.compressed else self.config.unit_bytes) for file in found]
        return [piece for file, most in sizes for piece in cut(file.path, file.size_bytes, most)]

    def read(self, piece: Piece, reading: Reading) -> Iterator[Document | Dropped]:
        """As `Reader.read`."""
        plain = not piece.path.endswith(files.COMPRESSIONS)
        chunks = files.contents(piece.path, reading, max(piece.start - 1, 0))
        stop = piece.stop if plain else None
        for record in records(chunks, NEWLINE, self.config.max_document_bytes, piece.start, stop):
            data = record.data
            if record.offset == 0 and data.startswith(BYTE_ORDER_MARK):
                data = data[len(BYTE_ORDER_MARK) :]
            if record.damage is None and record.num_bytes <= self.config.max_document_bytes:
                try:
                    row = orjson.loads(data)
                except orjson.JSONDecodeError as error:
                    if not data.strip(BLANKS):
                        continue
                    row = _second_try(data, error)
                if isinstance(row, dict):
                    yield document(row, self.config, f"{piece.path}:{record.offset}")
                    continue
                reason, detail = row if isinstance(row, tuple) else ("read.not_object", f"a {type(row).__name__}, not an object")
            else:
                reason, detail = _too_much(record, self.config.max_document_bytes)
            name = f"{piece.path}:{record.offset}"
            yield Dropped(Document(printable(data), name, self.config.source or self.config.kind), reason, detail)


def _too_much(record: Record, max_bytes: int) -> tuple[str, str]:
    if record.damage is not None:
        return record.damage.reason, str(record.damage)
    return "read.line_too_long", f"{record.num_bytes} bytes, max_document_bytes = {max_bytes}"


def _second_try(data: bytes, error: orjson.JSONDecodeError) -> Any:
    """Python's own parser, which takes NaN as Python's own writer leaves it; or a reason and a detail."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as wrong:
        return "read.not_utf8", f"byte {wrong.start} is 0x{data[wrong.start]:02x}"
    try:
        row = json.loads(text)
        orjson.dumps(row)  # a lone surrogate cannot be written in UTF-8 again
        return row
    except (ValueError, TypeError, RecursionError):
        return "read.bad_json", str(error)


class ParquetReader:
    """Rows of Parquet files, by row group."""

    def __init__(self, config: ParquetInput):
        self.config = config

    def pieces(self) -> list[Piece]:
        """As `Reader.pieces`. A file whose footer cannot be read is one piece, and found out when it is read."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        made: list[Piece] = []
        for file in files.find(self.config.paths, (".parquet",)):
            try:
                with files.open_raw(file.path) as raw:
                    meta = pq.ParquetFile(raw).metadata
            except (pa.ArrowException, OSError):
                made.append(Piece(file.path, 0, 1, file.size_bytes))
                continue
            weights = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
            scale = file.size_bytes / max(sum(weights), 1)
            made += [Piece(file.path, i, i + 1, int(weight * scale)) for i, weight in enumerate(weights)]
        return made

    def read(self, piece: Piece, reading: Reading) -> Iterator[Document | Dropped]:
        """As `Reader.read`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        number = 0
        try:
            with files.open_raw(piece.path) as raw, pq.ParquetFile(raw) as file:
                groups = list(range(piece.start, piece.stop))
                num_rows = sum(file.metadata.row_group(i).num_rows for i in groups)
                for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=groups):
                    for row in _rows(batch):
                        yield self._bounded(document(row, self.config, f"{piece.path}:{piece.start}:{number}"))
                        number += 1
                    reading.num_bytes += piece.weight_bytes * batch.num_rows // num_rows
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, FileNotFoundError | PermissionError):
                raise
            broken = Document("", f"{piece.path}:{piece.start}", self.config.source or self.config.kind)
            yield Dropped(broken, "read.corrupt", f"row group {piece.start}, after {number} rows: {error}")

    def _bounded(self, made: Document | Dropped) -> Document | Dropped:
        most = self.config.max_document_bytes
        if isinstance(made, Dropped) or len(made.text) * 4 <= most:  # no character takes more than four bytes
            return made
        num_bytes = len(made.text.encode())
        if num_bytes <= most:
            return made
        made.text = made.text[:EXCERPT_BYTES]
        return Dropped(made, "read.too_long", f"{num_bytes} bytes, max_document_bytes = {most}")


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a record batch as plain JSON values; text that is not UTF-8 stays bytes."""
    import pyarrow as pa

    columns = []
    for column in batch.columns:
        try:
            values = column.to_pylist()
        except UnicodeDecodeError:
            values = [value and _decoded(value) for value in column.cast(pa.large_binary()).to_pylist()]
        if pa.types.is_nested(column.type) or not _plain_type(column.type):
            values = [_plain(value) for value in values]
        columns.append(values)
    for values in zip(*columns, strict=True):
        yield {name: value for name, value in zip(batch.schema.names, values, strict=True) if value is not None}


def _plain_type(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_large_string(kind) or pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _decoded(data: bytes) -> str | bytes:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def _plain(value: Any) -> Any:
    """A value of Arrow's richer types in JSON's: dates in ISO 8601, bytes and decimals as text, NaN and infinities as nothing."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return printable(value)
    if value is None or isinstance(value, str | int):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
