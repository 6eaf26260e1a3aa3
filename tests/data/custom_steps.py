"""Steps for recipes of tests, named by `kind = "custom"`: well behaved ones, and those that a pipeline must survive."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from gemel.data.document import Document, Dropped
from gemel.data.step import Places


class Upper:
    """Changes documents in place, and counts what it does."""

    def __call__(self, documents: Sequence[Document]) -> Iterable[Document | Dropped]:
        for document in documents:
            if document.text != document.text.upper():
                document.text = document.text.upper()
                counts = document.metadata.setdefault("counts", {})
                counts["upper"] = counts.get("upper", 0) + 1
            yield document


class Fails:
    """Raises on documents that hold a word, after having changed them."""

    def __init__(self, word: str):
        self.word = word

    def __call__(self, documents: Sequence[Document]) -> Iterable[Document | Dropped]:
        for document in documents:
            document.text += "!"
        for document in documents:
            if self.word in document.text:
                raise ValueError(f"cannot take {self.word}")
        return documents


class Loses:
    """Breaks its contract."""

    def __call__(self, documents: Sequence[Document]) -> Iterable[Document | Dropped]:
        return documents[1:]


class Dies:
    """Kills its process on documents that hold a word; as long as `once` is not there, which it makes."""

    def __init__(self, word: str, once: str = ""):
        self.word, self.once = word, once

    def __call__(self, documents: Sequence[Document]) -> Iterable[Document | Dropped]:
        for document in documents:
            if self.word in document.text and not (self.once and Path(self.once).exists()):
                if self.once:
                    Path(self.once).mkdir()
                os.kill(os.getpid(), signal.SIGKILL)
            yield document


class Sleeps:
    """Takes its time."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __call__(self, documents: Sequence[Document]) -> Iterable[Document | Dropped]:
        time.sleep(self.seconds)
        return documents


class FirstOfEach:
    """The smallest step that needs the whole corpus: of documents that begin with the same characters it keeps the first."""

    def __init__(self, num_chars: int):
        self.num_chars = num_chars

    def keys(self, documents: Sequence[Document], places: Places) -> pa.Table:
        keys = [xxhash.xxh3_64_intdigest(document.text[: self.num_chars].encode()) for document in documents]
        return pa.table({"key": pa.array(keys, pa.uint64()), "place": pa.array(places, pa.uint64())})

    def resolve(self, rows: pa.Table) -> pa.Table:
        keys = rows["key"].to_numpy()
        later = np.concatenate([[False], keys[1:] == keys[:-1]]) if len(keys) else np.zeros(0, bool)
        return rows.select(["place"]).filter(pa.array(later))

    def conclude(self, findings: pa.Table) -> pa.Table:
        return findings

    def apply(self, documents: Sequence[Document], places: Places, verdicts: pa.Table) -> Iterable[Document | Dropped]:
        later = set(verdicts["place"].to_pylist())
        for document, place in zip(documents, places.tolist(), strict=True):
            yield Dropped(document, "first.later", "begins as an earlier one") if place in later else document
