"""Boilerplate: lines that stand in many documents are removed from all of them (after CCNet, Wenzek et al. 2020, there by paragraph).

Unlike exact duplicates, no copy is kept: a menu is not text, however often one has seen it. The table of frequent lines is small, because
few lines are frequent, so every unit of work gets all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gemel.config.data.dedup import LinesConfig
from gemel.data.document import Document, Dropped
from gemel.data.step import Places
from gemel.data.steps import exact, shingles
from gemel.data.steps.normal import groups, normal
from gemel.data.steps.shingles import Hashes

_KEYS = pa.schema([("key", pa.uint64()), ("place", pa.uint64())])
_VERDICTS = pa.schema([("key", pa.uint64()), ("documents", pa.uint64())])


class Lines:
    """The step. Counts `lines.line` for each that it removes; reason: `lines.short`, for what is left."""

    def __init__(self, config: LinesConfig):
        self._config = config

    def keys(self, documents: Sequence[Document], places: Places) -> pa.Table:
        """One row for each line that is long enough."""
        keys, long, counts = self._hash(documents)
        return pa.table([keys[long], np.repeat(places, counts)[long]], schema=_KEYS)

    def resolve(self, rows: pa.Table) -> pa.Table:
        """The lines of enough documents."""
        key, place = rows["key"].to_numpy(), rows["place"].to_numpy()
        other = np.ones(len(key), np.bool_)
        other[1:] = (key[1:] != key[:-1]) | (place[1:] != place[:-1])  # a document counts once, however often it has the line
        keys, documents = np.unique(key[other], return_counts=True)
        frequent = documents >= self._config.min_documents
        return pa.table([keys[frequent], documents[frequent].astype(np.uint64)], schema=_VERDICTS)

    def conclude(self, findings: pa.Table) -> pa.Table:
        """The findings in order."""
        return findings.sort_by("key")

    def apply(self, documents: Sequence[Document], places: Places, verdicts: pa.Table) -> Iterable[Document | Dropped]:  # noqa: ARG002
        """Remove frequent lines."""
        frequent = verdicts["key"].to_numpy()
        keys, long, counts = self._hash(documents)
        found = long & (np.searchsorted(frequent, keys, side="right") > np.searchsorted(frequent, keys))
        ends = np.cumsum(counts)
        for document, first, last in zip(documents, (ends - counts).tolist(), ends.tolist(), strict=True):
            numbers = np.flatnonzero(found[first:last]).tolist()
            yield exact.remove(document, "line", numbers, "lines", self._config.min_chars) if numbers else document

    def _hash(self, documents: Sequence[Document]) -> tuple[Hashes, npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """The hash of every line, whether it is long enough, and how many lines each document has."""
        lines = [exact.split(document.text, "line") for document in documents]
        texts = [line for document in lines for line in document]
        hashes, long = [np.zeros(0, np.uint64)], [np.zeros(0, np.bool_)]
        for group in groups(texts):
            text = normal(texts[group], self._config.normalize)
            hashes.append(shingles.hash_texts(text))
            long.append(text.sizes() >= self._config.min_line_chars)
        return np.concatenate(hashes), np.concatenate(long), np.fromiter(map(len, lines), np.int64, len(lines))
