"""Near-duplicates: documents whose word n-grams overlap, found by MinHash signatures and locality-sensitive hashing.

A signature holds, for each of bands * rows random permutations of all n-grams, the smallest of a document's; two documents agree in one
place with a probability that is their Jaccard similarity (Broder 1997). A permutation here is the product with a random odd number mod
2^32, which permutes the odd numbers, of n-gram hashes made odd: one multiplication per n-gram, sixteen at a time in the processor's
registers. Documents that agree in a whole band meet under its key, and those that hang together through meetings are one cluster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gemel.config.data.dedup import MinHashConfig
from gemel.data.document import Document, Dropped
from gemel.data.step import Places
from gemel.data.steps import shingles
from gemel.data.steps.normal import groups
from gemel.data.steps.shingles import Hashes, Words

Signatures = npt.NDArray[np.uint32]

_BLOCK_NGRAMS = 1 << 16  # with as many products, 512 KB: within a core's second-level cache
_UNIT_BITS = 32  # of a place: unit of work above, number within it below

_KEYS = pa.schema([("key", pa.uint64()), ("place", pa.uint64())])
_PAIRS = pa.schema([("place", pa.uint64()), ("earlier", pa.uint64())])
_VERDICTS = pa.schema([("place", pa.uint64()), ("kept", pa.uint64()), ("copies", pa.uint32())])


class MinHash:
    """The step. Adds `minhash.copies` to the metadata of kept documents that others were dropped for; reason: `minhash.duplicate`."""

    def __init__(self, config: MinHashConfig):
        self._config = config
        rng = np.random.Generator(np.random.PCG64(config.seed))
        self._odd = rng.integers(0, 1 << 32, config.bands * config.rows, np.uint32) | np.uint32(1)
        self._band = rng.integers(0, 1 << 64, (config.bands, config.rows + 1), np.uint64) | np.uint64(1)

    def keys(self, documents: Sequence[Document], places: Places) -> pa.Table:
        """One row for each band of a document; none for a document without words."""
        texts = [document.text for document in documents]
        keys, whose = [np.zeros((0, self._config.bands), np.uint64)], [np.zeros(0, np.uint64)]
        for group in groups(texts):
            grams = shingles.words(texts[group], self._config.normalize).ngrams(self._config.ngram)
            some = np.diff(grams.starts) > 0
            keys.append(self._band_keys(self.signatures(grams)))
            whose.append(places[group][some])
        columns = np.concatenate(keys).ravel(), np.repeat(np.concatenate(whose), self._config.bands)
        return pa.table(list(columns), schema=_KEYS)

    def signatures(self, grams: Words) -> Signatures:
        """One row for each text that has n-grams: the smallest product of its n-grams with each of the odd numbers."""
        values = (grams.hashes >> np.uint64(32)).astype(np.uint32)
        values |= np.uint32(1)
        starts = grams.starts[:-1][np.diff(grams.starts) > 0]
        least = np.empty((len(self._odd), len(starts)), np.uint32)
        for first, last in _blocks(starts, len(values)):
            begin = starts[first]
            end = starts[last] if last < len(starts) else len(values)
            block, inner = values[begin:end], starts[first:last] - begin
            product = np.empty_like(block)
            for row, odd in zip(least, self._odd, strict=True):
                np.multiply(block, odd, out=product)
                np.minimum.reduceat(product, inner, out=row[first:last])
        return least.T

    def _band_keys(self, signatures: Signatures) -> Hashes:
        bands, rows = self._config.bands, self._config.rows
        parts = signatures.reshape(len(signatures), bands, rows).astype(np.uint64)
        sums = (parts * self._band[:, :rows]).sum(axis=2, dtype=np.uint64) + self._band[:, rows]
        return shingles.mix(sums)

    def resolve(self, rows: pa.Table) -> pa.Table:
        """Pairs of documents that meet under a key: each with the first that is there."""
        key, place = (rows[name].to_numpy() for name in ("key", "place"))
        again = np.zeros(len(key), np.bool_)
        again[1:] = key[1:] == key[:-1]
        first = np.maximum.accumulate(np.where(again, 0, np.arange(len(key))))
        place, earlier = place[again], place[first[again]]
        order = np.lexsort([earlier, place])
        place, earlier = place[order], earlier[order]
        new = place != earlier  # two bands of one document may have the same key, if hardly ever
        new[1:] &= (place[1:] != place[:-1]) | (earlier[1:] != earlier[:-1])
        return pa.table([place[new], earlier[new]], schema=_PAIRS)

    def conclude(self, findings: pa.Table) -> pa.Table:
        """For every document of a cluster, which one is kept: the first; and for that one, of how many copies."""
        pairs = np.stack([findings["place"].to_numpy(), findings["earlier"].to_numpy()])
        places, numbers = np.unique(pairs, return_inverse=True)
        roots = components(len(places), *numbers.reshape(2, -1))
        copies = np.bincount(roots, minlength=len(places))[roots]
        return pa.table([places, places[roots], copies.astype(np.uint32)], schema=_VERDICTS)

    def apply(self, documents: Sequence[Document], places: Places, verdicts: pa.Table) -> Iterable[Document | Dropped]:
        """Drop all documents of a cluster but the first."""
        known, kept, copies = (verdicts[name].to_numpy() for name in _VERDICTS.names)
        rows = np.searchsorted(known, places)
        for document, place, row in zip(documents, places.tolist(), rows.tolist(), strict=True):
            if row == len(known) or known[row] != place:
                yield document
            elif kept[row] == place:
                document.metadata["minhash"] = {"copies": int(copies[row])}
                yield document
            else:
                unit, number = divmod(int(kept[row]), 1 << _UNIT_BITS)
                yield Dropped(document, "minhash.duplicate", f"of document {number} of unit {unit}, one of {copies[row]} alike")


def components(count: int, left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The smallest node that each of `count` nodes is connected with by edges left[i] - right[i].

    Union-find in rounds over whole arrays: every root is hung under the smallest root that one of its edges leads to, then all paths are
    halved until they are flat (Shiloach & Vishkin 1982).
    """
    parent = np.arange(count)
    while len(left):
        high, low = np.maximum(left, right), np.minimum(left, right)
        np.minimum.at(parent, high, low)
        while not np.array_equal(parent, grand := parent[parent]):
            parent = grand
        left, right = parent[left], parent[right]
        open_ = left != right
        left, right = left[open_], right[open_]
    return parent


def _blocks(starts: npt.NDArray[np.int64], count: int) -> Iterator[tuple[int, int]]:
    """Ranges of texts with about `_BLOCK_NGRAMS` n-grams together."""
    first = 0
    while first < len(starts):
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + _BLOCK_NGRAMS, side="right")) - 1)
        last = len(starts) if count - starts[first] <= _BLOCK_NGRAMS else last
        yield first, last
        first = last
