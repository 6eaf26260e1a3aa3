"""Keys that meet on disk: rows from all units of work, divided by ranges of their key, each range then sorted on its own.

Nothing here is larger than one unit's keys, or one range of all keys. A unit writes one file, whatever the number of ranges: an Arrow file
knows where each of its batches lies, and batch i holds range i, so that a reader of one range touches only its own part of each file.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gemel.data.manifest import Entry, Shard

SPILL_BYTES = 64 * 2**20
UNIT_BITS = 32  # a place is unit * 2**32 + number within the unit
OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


class KeyWriter:
    """The keys of one unit of work. When they grow large they are written as a run of batches, one for each range; then comes the next."""

    def __init__(self, output: Path, name: str, num_ranges: int):
        self._output, self._name, self._num_ranges = output, name, num_ranges
        self._tables: list[pa.Table] = []
        self._bytes = self._rows = 0
        self._shard: Shard | None = None

    def write(self, table: pa.Table) -> None:
        """Add rows."""
        types = {name: table.schema.field(name).type for name in ("key", "place") if name in table.column_names}
        if types != {"key": pa.uint64(), "place": pa.uint64()}:
            raise TypeError(f"keys() must return columns key and place of uint64, not {table.schema}")
        self._tables.append(table)
        self._bytes += table.nbytes
        if self._bytes > SPILL_BYTES:
            self._write_run()

    def _write_run(self) -> None:
        table = pa.concat_tables(self._tables).combine_chunks()
        ranges = range_of(table["key"].to_numpy(), self._num_ranges)
        table = table.take(np.argsort(ranges, kind="stable"))
        if self._shard is None:
            self._shard = Shard(self._output, self._name)
            self._file = pa.ipc.new_file(self._shard, table.schema, options=OPTIONS)
        _write_batches(self._file, table, np.bincount(ranges, minlength=self._num_ranges))
        self._rows += table.num_rows
        self._tables, self._bytes = [], 0

    def commit(self) -> dict[str, Entry]:
        """Finish the file. There is none if `write` was never called."""
        if self._tables:
            self._write_run()
        if self._shard is None:
            return {}
        self._file.close()
        return {self._name: self._shard.commit(self._rows)}

    def abandon(self) -> None:
        """Leave no trace."""
        if self._shard is not None:
            self._shard.abandon()


def range_of(keys: npt.NDArray[np.uint64], num_ranges: int) -> npt.NDArray[np.int64]:
    """Which of the equal ranges of 64-bit numbers each key lies in."""
    return ((keys >> np.uint64(32)) * np.uint64(num_ranges) >> np.uint64(32)).astype(np.int64)


def _write_batches(file: pa.ipc.RecordBatchFileWriter, table: pa.Table, counts: npt.NDArray[np.int64]) -> None:
    """Consecutive parts of a table as one batch each, empty ones included."""
    start = 0
    for count in counts.tolist():
        part = table.slice(start, count).combine_chunks()
        columns = [column.chunk(0) if column.num_chunks else pa.array([], column.type) for column in part.columns]
        file.write_batch(pa.RecordBatch.from_arrays(columns, schema=table.schema))
        start += count


def read_range(paths: Iterable[Path], number: int, num_ranges: int) -> pa.Table | None:
    """All rows of one range, sorted by key, then place. None if there are no files."""
    batches = []
    for path in paths:
        with pa.memory_map(str(path)) as mapped:
            file = pa.ipc.open_file(mapped)
            batches += [file.get_batch(i) for i in range(number, file.num_record_batches, num_ranges)]
    if not batches:
        return None
    table = pa.Table.from_batches(batches).combine_chunks()
    order = np.lexsort((table["place"].to_numpy(), table["key"].to_numpy()))  # stable, so equal rows stay in the order of the input
    return table.take(order)


def write_table(output: Path, name: str, table: pa.Table, num_units: int = 0) -> dict[str, Entry]:
    """A table as a file. With `num_units` and a column `place`, its rows are sorted and divided so that each unit can read its own."""
    if num_units and "place" in table.column_names:
        places = table["place"].to_numpy()
        table = table.take(np.argsort(places, kind="stable"))
        counts = np.bincount((places >> np.uint64(UNIT_BITS)).astype(np.int64), minlength=num_units)
        assert len(counts) == num_units, "a verdict is on a place that no unit has"
    else:
        counts = np.array([table.num_rows])
    shard = Shard(output, name)
    with pa.ipc.new_file(shard, table.schema, options=OPTIONS) as file:
        _write_batches(file, table, counts)
    return {name: shard.commit(table.num_rows)}


def read_table(path: Path, unit: int | None = None) -> pa.Table:
    """A table that `write_table` wrote: all of it, or what concerns one unit."""
    with pa.memory_map(str(path)) as mapped:
        file = pa.ipc.open_file(mapped)
        by_unit = unit is not None and "place" in file.schema.names
        return pa.Table.from_batches([file.get_batch(unit)]) if by_unit else file.read_all()
