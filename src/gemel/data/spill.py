"""Documents on their way from one pass to the next, on disk, with their places.

Nothing may change on the way, so texts are stored as bytes in which even a lone surrogate survives, and metadata as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from gemel.data.document import Document
from gemel.data.manifest import Entry, Shard
from gemel.data.step import Places

SCHEMA = pa.schema([("place", pa.uint64()), *((name, pa.large_binary()) for name in ("text", "id", "source", "metadata"))])


class SpillWriter:
    """The documents that one unit of work passes on."""

    def __init__(self, output: Path, name: str):
        self._name = name
        self._shard = Shard(output, name)
        self._file = pa.ipc.new_file(self._shard, SCHEMA, options=pa.ipc.IpcWriteOptions(compression="lz4"))
        self._rows = 0

    def write(self, documents: Sequence[Document], places: Places) -> None:
        """Add a batch."""
        columns = [
            pa.array(places),
            pa.array([_bytes(document.text) for document in documents], pa.large_binary()),
            pa.array([_bytes(document.id) for document in documents], pa.large_binary()),
            pa.array([_bytes(document.source) for document in documents], pa.large_binary()),
            pa.array([dump(document.metadata) for document in documents], pa.large_binary()),
        ]
        self._file.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
        self._rows += len(documents)

    def commit(self) -> dict[str, Entry]:
        """Finish the file."""
        self._file.close()
        return {self._name: self._shard.commit(self._rows)}

    def abandon(self) -> None:
        """Leave no trace."""
        self._shard.abandon()


def read(path: Path) -> Iterator[tuple[list[Document], Places, float]]:
    """The batches that were written, and after each the part of the file that has been read."""
    with pa.memory_map(str(path)) as mapped:
        file = pa.ipc.open_file(mapped)
        for i in range(file.num_record_batches):
            batch = file.get_batch(i)
            rows = zip(*(column.to_pylist() for column in batch.columns[1:]), strict=True)
            documents = [Document(_text(text), _text(name), _text(source), load(meta)) for text, name, source, meta in rows]
            yield documents, np.asarray(batch.column(0).to_numpy()), (i + 1) / file.num_record_batches


def dump(metadata: dict[str, Any]) -> bytes:
    """Metadata as JSON, whatever its strings hold."""
    try:
        return orjson.dumps(metadata)
    except TypeError:
        return json.dumps(metadata, default=str).encode()


def load(data: bytes) -> dict[str, Any]:
    """The inverse of `dump`."""
    try:
        values: dict[str, Any] = orjson.loads(data)
    except orjson.JSONDecodeError:
        values = json.loads(data)
    return values


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")
