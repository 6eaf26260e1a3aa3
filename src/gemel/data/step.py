"""The two verbs of this room: steps that look at documents one by one, and steps that must compare them all.

Both are pure: what they return depends on what they are given and on their configuration, never on how documents were cut into batches, on
which process looks at them, or on what it saw before. So any part can be redone anywhere, and the output is the same to the byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gemel.data.document import Document, Dropped

Places = npt.NDArray[np.uint64]  # where documents stand in the whole input, in its order: unit of work * 2**32 + number within it


class Step(Protocol):
    """Changes documents or drops them. May keep models and tables that it loads, but no memory of documents."""

    def __call__(self, documents: Sequence[Document]) -> Iterable[Document | Dropped]:
        """One answer per document, in order. Documents may be changed in place."""


class CorpusStep(Protocol):
    """Compares documents with all others, by keys that meet: three passes over small tables on disk, then one over the documents.

    keys -> (shuffle by hash range, sort by key and place) -> resolve, one range at a time -> conclude -> apply
    """

    def keys(self, documents: Sequence[Document], places: Places) -> pa.Table:
        """Rows that shall meet: `key` (uint64, spread evenly over its range), `place` (uint64), and whatever else `resolve` wants."""

    def resolve(self, rows: pa.Table) -> pa.Table:
        """What follows from all rows of one range of keys, sorted by key, then place. May be empty."""

    def conclude(self, findings: pa.Table) -> pa.Table:
        """What `apply` wants to know, from the findings of all ranges. With a column `place`, each unit of work gets its own rows only."""

    def apply(self, documents: Sequence[Document], places: Places, verdicts: pa.Table) -> Iterable[Document | Dropped]:
        """One answer per document, in order."""


@runtime_checkable
class Reporting(Protocol):
    """A corpus step whose verdicts are of interest by themselves: the manifest keeps their report."""

    def report(self, verdicts: pa.Table) -> dict[str, dict[str, float]]:
        """Figures by the name of what they are of, few of them, and of all the same."""
