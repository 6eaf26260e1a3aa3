"""A native program: operations over slots, run for one step with one call.

This is the binding's safe side. It keeps everything alive that the native code points to, and turns a step's plain numbers into arrays.
What the operations are is decided by whoever lowers a model (`gemel.engine.lower`).
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gemel.ops.cpu import native

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
STRETCH = np.dtype([("row", "i4"), ("start", "i4"), ("count", "i4"), ("reserved", "i4"), ("blocks", "i8")])


@dataclass
class Listing:
    """A program while it is written: its slots and operations, the labels of their times, and what their pointers point to."""

    slots: list[native.Slot] = field(default_factory=list)
    ops: list[native.Op] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    keep: list[object] = field(default_factory=list)

    def slot(self, width: int, *, sampled: bool = False) -> int:
        """A new matrix of fp32 with one row per token, or per sampled row."""
        self.slots.append(native.Slot(int(sampled), width))
        return len(self.slots) - 1

    def add(self, kind: int, label: str, from_: int, to: int, **fields: object) -> None:
        """Append an operation; its time counts under `label`."""
        if label not in self.labels:
            self.labels.append(label)
        self.ops.append(native.Op(kind=kind, from_=from_, to=to, label=self.labels.index(label), **fields))


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows of the flat run that belong to one sequence: how many, from which position, in which blocks."""

    start: int
    count: int
    blocks: Sequence[int]


class Program:
    """A listing bound to pages of keys and values and to a team of threads of its own."""

    def __init__(self, library: ctypes.CDLL, listing: Listing, pages: native.Pages, threads: int, vocab_size: int):
        self._library, self._listing = library, listing
        slots = (native.Slot * len(listing.slots))(*listing.slots)
        ops = (native.Op * len(listing.ops))(*listing.ops)
        self._handle = library.gemel_program_new(threads, len(slots), slots, len(ops), ops, ctypes.byref(pages))
        weakref.finalize(self, library.gemel_program_free, self._handle)
        self._vocab_size = vocab_size
        self._logits = np.empty((0, vocab_size), np.float32)

    def run(self, tokens: Ints, positions: Ints, stretches: Sequence[Stretch], sampled: Ints) -> tuple[Floats, Floats, Ints]:
        """One step.

        `tokens` and `positions` [T] are the flat run, of which `stretches` own consecutive rows; `sampled` [S] are the rows that yield
        logits. Returns logits [S, V], the largest of each row [S] (NaN when one of the row is not finite), and its token [S]. The logits
        are valid until the next call: fresh memory of that size would cost more in page faults than it takes to fill it.
        """
        num_sampled = len(sampled)
        if len(self._logits) < num_sampled:
            self._logits = np.empty((num_sampled, self._vocab_size), np.float32)
        table, numbers = _tables(stretches)
        largest, argmax = np.empty(num_sampled, np.float32), np.empty(num_sampled, np.int32)
        arrays = (tokens, positions, sampled, numbers, self._logits, largest, argmax)
        step = native.Step(len(tokens), len(numbers), num_sampled, 0, *(array.ctypes.data for array in arrays))
        self._library.gemel_program_run(self._handle, ctypes.byref(step))
        del table
        return self._logits[:num_sampled], largest, argmax

    @property
    def team(self) -> int:
        """The address of its threads, which live as long as the program; to be used between two steps."""
        return int(self._library.gemel_program_team(self._handle))

    def profile(self) -> dict[str, float]:
        """Seconds that the steps since the last call took, per label."""
        seconds = (ctypes.c_double * len(self._listing.labels))()
        self._library.gemel_program_profile(self._handle, len(seconds), seconds)
        return dict(zip(self._listing.labels, seconds, strict=True))


def _tables(stretches: Sequence[Stretch]) -> tuple[Ints, npt.NDArray[np.void]]:
    """All block tables one after the other, and the stretches that point into them."""
    flat: list[int] = []
    rows: list[tuple[int, int, int, int, int]] = []
    first = 0
    for stretch in stretches:
        rows.append((first, stretch.start, stretch.count, 0, len(flat)))
        flat += stretch.blocks
        first += stretch.count
    table = np.array(flat, np.int32)
    numbers = np.array(rows, STRETCH)
    numbers["blocks"] = numbers["blocks"] * table.itemsize + table.ctypes.data
    return table, numbers
