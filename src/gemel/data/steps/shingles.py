"""The hashed word n-grams of many texts at once.

A word is a run of characters between white space, or one character of a script without word spaces. Its hash is the polynomial sum(code[i]
* R^i) mod 2^64 over its code points, which running sums give for all words of an array in one pass: the difference of the sums at two
words' starts, divided by R^start (R is odd, so it has an inverse). An n-gram's hash is such a sum over the mixed hashes of its words.
Hashes are the same on every machine and in every batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gemel.config.data.dedup import Normalize
from gemel.data.steps.normal import BLOCK_CHARS, Normal, Offsets, normal

Hashes = npt.NDArray[np.uint64]

_R = 0x9E3779B97F4A7C15 | 1
_Q = 0xC2B2AE3D27D4EB4F  # the same for the words of an n-gram


@dataclass(frozen=True, slots=True)
class Words:
    """The hashed words of several texts. Text number i has `hashes[starts[i]:starts[i + 1]]`."""

    hashes: Hashes
    starts: Offsets  # one more than there are texts

    def ngrams(self, n: int) -> Words:
        """Every text's n-grams, in order; of a text with fewer words, the one that it is; of one without, none."""
        count = len(self.hashes)
        ends = np.repeat(self.starts[1:], np.diff(self.starts))  # of the text that each word is in
        place = np.arange(count)
        mixed = mix(self.hashes)
        sums = np.zeros(count, np.uint64)
        for k in range(min(n, count)):
            inside = place[k:] < ends[: count - k]
            sums[: count - k] += mixed[k:] * np.uint64(pow(_Q, k + 1, 1 << 64)) * inside
        first = np.zeros(count, np.bool_)
        first[self.starts[:-1][np.diff(self.starts) > 0]] = True
        keep = first | (place + n <= ends)
        kept = np.zeros(count + 1, np.int64)
        np.cumsum(keep, out=kept[1:])
        return Words(mix(sums[keep]), kept[self.starts])


def words(texts: Sequence[str], config: Normalize) -> Words:
    """The hashed words of each text after normalization."""
    hashes: list[Hashes] = []
    counts = np.zeros(len(texts) + 1, np.int64)
    for numbers, pieces in _blocks(texts):
        block, starts = _hash_words(normal(pieces, config))
        hashes.append(block)
        np.add.at(counts, np.asarray(numbers) + 1, np.diff(starts))
    return Words(np.concatenate(hashes) if hashes else np.zeros(0, np.uint64), np.cumsum(counts))


def mix(hashes: Hashes) -> Hashes:
    """Spread every bit over all others (MurmurHash3's finalizer)."""
    mixed = hashes ^ (hashes >> np.uint64(33))
    mixed *= np.uint64(0xFF51AFD7ED558CCD)
    mixed ^= mixed >> np.uint64(33)
    mixed *= np.uint64(0xC4CEB9FE1A85EC53)
    mixed ^= mixed >> np.uint64(33)
    return mixed


def word_starts(text: Normal) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where words start in `text.codes`, and for each text the number of its first word; the latter one more than there are texts."""
    written = text.codes != 0
    start = written.copy()
    start[1:] &= ~written[:-1] | text.alone[1:] | text.alone[:-1]
    firsts = text.starts[:-1][np.diff(text.starts) > 0]
    start[firsts] = written[firsts]
    places = np.flatnonzero(start)
    return places, np.searchsorted(places, text.starts)


def hash_texts(text: Normal) -> Hashes:
    """One hash for each text as a whole: the same words in the same order. Of a text without words, 0."""
    hashes, starts = _hash_words(text)
    some = np.diff(starts) > 0
    whole = np.zeros(len(some), np.uint64)
    whole[some] = mix(_polynomials(mix(hashes), starts[:-1][some], _Q))
    return whole


def _hash_words(text: Normal) -> tuple[Hashes, Offsets]:
    places, starts = word_starts(text)
    return _polynomials(text.codes, places, _R), starts


def _polynomials(values: npt.NDArray[np.unsignedinteger[Any]], starts: Offsets, base: int) -> Hashes:
    """sum(values[s + i] * base^i) mod 2^64 from each start s to the next; none may be empty."""
    powers, inverses = _powers(base, 1 << max(BLOCK_CHARS, len(values)).bit_length())
    terms = values.astype(np.uint64)
    terms *= powers[: len(terms)]
    sums = np.zeros(len(terms) + 1, np.uint64)
    np.cumsum(terms, out=sums[1:])
    hashes = np.diff(sums[starts], append=sums[-1:])
    hashes *= inverses[starts]
    return hashes


@functools.lru_cache(maxsize=4)
def _powers(base: int, count: int) -> tuple[Hashes, Hashes]:
    """base^i and base^-i mod 2^64 for i < count, a power of two: every doubling multiplies what is there by one number."""
    tables = []
    for factor in (base, pow(base, -1, 1 << 64)):
        table = np.ones(count, np.uint64)
        for k in range(count.bit_length() - 1):
            table[1 << k : 2 << k] = table[: 1 << k] * np.uint64(pow(factor, 1 << k, 1 << 64))
        tables.append(table)
    return tables[0], tables[1]


def _blocks(texts: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
    """Texts in blocks of about `BLOCK_CHARS`, with their numbers; longer ones in several pieces, cut at a space if there is one."""
    numbers: list[int] = []
    pieces: list[str] = []
    room = BLOCK_CHARS
    for number, text in enumerate(texts):
        for piece in (text,) if len(text) <= BLOCK_CHARS else _pieces(text):
            if pieces and len(piece) > room:
                yield numbers, pieces
                numbers, pieces, room = [], [], BLOCK_CHARS
            numbers.append(number)
            pieces.append(piece)
            room -= len(piece)
    if pieces:
        yield numbers, pieces


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > BLOCK_CHARS:
        stop = max(text.rfind(" ", start + 1, start + BLOCK_CHARS), text.rfind("\n", start + 1, start + BLOCK_CHARS))
        stop = stop if stop > start else start + BLOCK_CHARS
        yield text[start:stop]
        start = stop
    yield text[start:]
