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

import numpy as np
import numpy.typing as npt

from gemel.config.data.dedup import Normalize
from gemel.data.steps.normal import Normal, Offsets, normal

Hashes = npt.NDArray[np.uint64]

# So many characters at a time: what is made from them stays within a core's second-level cache, and the powers of R are few.
BLOCK_CHARS = 1 << 17

_R = 0x9E3779B97F4A7C15 | 1
_Q = 0xC2B2AE3D27D4EB4F  # the same for the words of an n-gram
_WORD = (1 << 64) - 1


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


def groups(texts: Sequence[str]) -> Iterator[slice]:
    """Neighbouring texts of about `BLOCK_CHARS` together: to take them one group at a time is several times faster than all at once."""
    start = chars = 0
    for number, text in enumerate(texts):
        if number > start and chars + len(text) > BLOCK_CHARS:
            yield slice(start, number)
            start, chars = number, 0
        chars += len(text)
    if start < len(texts):
        yield slice(start, len(texts))


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


def _hash_words(text: Normal) -> tuple[Hashes, Offsets]:
    places, starts = word_starts(text)
    powers, inverses = _powers(1 << max(BLOCK_CHARS, len(text.codes)).bit_length())
    sums = np.zeros(len(text.codes) + 1, np.uint64)
    terms = text.codes.astype(np.uint64)
    terms *= powers[: len(terms)]
    np.cumsum(terms, out=sums[1:])
    hashes = np.diff(sums[places], append=sums[-1:])
    hashes *= inverses[places]
    return hashes, starts


@functools.lru_cache(maxsize=2)
def _powers(count: int) -> tuple[Hashes, Hashes]:
    """R^i and R^-i for i < count, a power of two: every doubling multiplies what is there by one number."""
    tables = []
    for base in (_R, pow(_R, -1, 1 << 64)):
        table = np.ones(count, np.uint64)
        for k in range(count.bit_length() - 1):
            table[1 << k : 2 << k] = table[: 1 << k] * np.uint64(pow(base, 1 << k, 1 << 64))
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
