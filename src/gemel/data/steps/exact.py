"""Exact duplicates: of documents by text or URL, and of paragraphs and lines within and between documents.

Two texts are the same if their normalized forms have the same 128-bit hash (XXH3). A corpus of 10^12 lines holds a false pair with a
probability of 10^-15, so texts need not be kept to be compared. What is first in the order of the input is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from gemel.config.data.dedup import ExactConfig, ExactPartsConfig
from gemel.data.document import Document, Dropped
from gemel.data.step import Places
from gemel.data.steps.normal import normalized
from gemel.data.steps.shingles import Hashes

_BETWEEN_PARAGRAPHS = re.compile(r"\n(?:[^\S\n]*\n)+")
_PORTS = {"http": 80, "https": 443}

_DOCUMENT_KEYS = pa.schema([("key", pa.uint64()), ("place", pa.uint64()), ("low", pa.uint64()), ("name", pa.large_string())])
_DOCUMENT_VERDICTS = pa.schema([("place", pa.uint64()), ("kept", pa.large_string())])
_PART_KEYS = pa.schema([("key", pa.uint64()), ("place", pa.uint64()), ("low", pa.uint64()), ("part", pa.uint32())])
_PART_VERDICTS = pa.schema([("place", pa.uint64()), ("part", pa.uint32())])


class Exact:
    """Whole documents. Reasons: `exact.document`, `exact.url`; the detail is the id of the document that is kept."""

    def __init__(self, config: ExactConfig):
        self._config = config

    def keys(self, documents: Sequence[Document], places: Places) -> pa.Table:
        """One row for each document; by URL, none for a document without one."""
        if self._config.by == "url":
            urls = [normalized_url(document) for document in documents]
            rows = np.array([url is not None for url in urls], np.bool_)
            hashes = hash128(url for url in urls if url is not None)
        else:
            rows = np.ones(len(documents), np.bool_)
            hashes = hash128(normalized([document.text for document in documents], self._config.normalize))
        names = [document.id.encode("utf-8", "replace").decode() for document, row in zip(documents, rows, strict=True) if row]
        return pa.table([hashes[:, 0], places[rows], hashes[:, 1], names], schema=_DOCUMENT_KEYS)

    def resolve(self, rows: pa.Table) -> pa.Table:
        """Every document but the first of those with one hash, and the id of that first."""
        order, first = _groups(rows, "place")
        again = first != np.arange(len(first))
        place = rows["place"].to_numpy()[order[again]]
        return pa.table([place, rows["name"].take(order[first[again]])], schema=_DOCUMENT_VERDICTS)

    def conclude(self, findings: pa.Table) -> pa.Table:
        """The findings in order."""
        return findings.sort_by("place")

    def apply(self, documents: Sequence[Document], places: Places, verdicts: pa.Table) -> Iterable[Document | Dropped]:
        """Drop what is not the first."""
        place = verdicts["place"].to_numpy()
        rows = np.searchsorted(place, places)
        found = np.searchsorted(place, places, side="right") > rows
        for document, row, dropped in zip(documents, rows.tolist(), found.tolist(), strict=True):
            yield Dropped(document, f"exact.{self._config.by}", f"same as {verdicts['kept'][row]}") if dropped else document


class ExactParts:
    """Paragraphs or lines. Counts `exact.paragraph` or `exact.line` for each that it removes; reason: `exact.short`, for what is left."""

    def __init__(self, config: ExactPartsConfig):
        self._config = config

    def keys(self, documents: Sequence[Document], places: Places) -> pa.Table:
        """One row for each part that is long enough."""
        parts = [split(document.text, self._config.by) for document in documents]
        counts = np.fromiter(map(len, parts), np.int64, len(parts))
        texts = normalized([part for document in parts for part in document], self._config.normalize)
        long = np.fromiter((len(text) >= self._config.min_part_chars for text in texts), np.bool_, len(texts))
        hashes = hash128(text for text, row in zip(texts, long.tolist(), strict=True) if row)
        part = np.arange(len(texts)) - np.repeat(np.cumsum(counts) - counts, counts)
        columns = [hashes[:, 0], np.repeat(places, counts)[long], hashes[:, 1], part[long].astype(np.uint32)]
        return pa.table(columns, schema=_PART_KEYS)

    def resolve(self, rows: pa.Table) -> pa.Table:
        """Every part but the first of those with one hash."""
        order, first = _groups(rows, "place", "part")
        return rows.select(_PART_VERDICTS.names).take(order[first != np.arange(len(first))])

    def conclude(self, findings: pa.Table) -> pa.Table:
        """The findings in order."""
        return findings.sort_by([("place", "ascending"), ("part", "ascending")])

    def apply(self, documents: Sequence[Document], places: Places, verdicts: pa.Table) -> Iterable[Document | Dropped]:
        """Remove the parts."""
        place, part = verdicts["place"].to_numpy(), verdicts["part"].to_numpy()
        firsts, lasts = np.searchsorted(place, places), np.searchsorted(place, places, side="right")
        for document, first, last in zip(documents, firsts.tolist(), lasts.tolist(), strict=True):
            yield (
                remove(document, self._config.by, part[first:last].tolist(), "exact", self._config.min_chars) if last > first else document
            )


def split(text: str, by: str) -> list[str]:
    """Its lines, or its paragraphs, which are separated by empty lines."""
    return text.split("\n") if by == "line" else _BETWEEN_PARAGRAPHS.split(text)


def remove(document: Document, by: str, numbers: Iterable[int], step: str, min_chars: int) -> Document | Dropped:
    """The document without some of its parts, counted as `step.by`; dropped as `step.short` if less than `min_chars` is left."""
    removed = set(numbers)
    parts = [part for number, part in enumerate(split(document.text, by)) if number not in removed]
    left = ("\n" if by == "line" else "\n\n").join(parts).strip("\n")
    if len(left) < min_chars:
        detail = f"{len(left)} of {len(document.text)} characters left without {len(removed)} repeated {by}s; limit {min_chars}"
        return Dropped(document, f"{step}.short", detail)
    document.text = left
    counts = document.metadata.setdefault("counts", {})
    counts[f"{step}.{by}"] = counts.get(f"{step}.{by}", 0) + len(removed)
    return document


def hash128(texts: Iterable[str]) -> Hashes:
    """XXH3 of each text in UTF-8: high and low half."""
    digests = b"".join(xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass")) for text in texts)
    return np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 2)


def normalized_url(document: Document) -> str | None:
    """The document's address without what does not change where it leads, None if it has none that can be read.

    Scheme, `www.`, case of the host, default port, fragment, escapes of plain characters, trailing slashes and the order of the query
    do not count.
    """
    url = str(document.metadata.get("url") or document.id).strip()
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https", "ftp") or not host:
        return None
    kept_port = "" if port in (None, _PORTS.get(parts.scheme)) else f":{port}"
    query = "&".join(sorted(filter(None, parts.query.split("&"))))
    return f"{host.removeprefix('www.')}{kept_port}{unquote(parts.path).rstrip('/')}?{query}"


def _groups(rows: pa.Table, *order: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row numbers sorted by hash, then as `order` says; and for each of these, the position in them of the first with its hash."""
    key, low = rows["key"].to_numpy(), rows["low"].to_numpy()
    sorted_ = np.lexsort([rows[name].to_numpy() for name in reversed(order)] + [low, key])
    key, low = key[sorted_], low[sorted_]
    new = np.ones(len(key), np.bool_)
    new[1:] = (key[1:] != key[:-1]) | (low[1:] != low[:-1])
    return sorted_, np.maximum.accumulate(np.where(new, np.arange(len(key)), 0))
