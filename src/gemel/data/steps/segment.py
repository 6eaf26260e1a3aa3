"""One pass over the text: code points to words, lines and paragraphs, as arrays, for many documents at once.

Rules about quality, n-gram models and text classifiers all start by cutting text into words. Done in Python, once per rule, this is where
the time of a cleaning run goes. Here a batch of documents becomes one array of code points, one table says what each code point is, and
words are the places where that changes: every later question is arithmetic on arrays, at the speed of memory.

A word is a run of letters, digits and marks, with apostrophes, dots and commas inside (`don't`, `3.14`); in scripts written without spaces
(Han, kana, Thai ...) every character is a word of its own. A run of one repeated symbol (`...`, `###`) is a symbol, not a word.

Spans are compared by a polynomial hash modulo 2**64, the same wherever the span stands: with S the running sum of value[i] * B**i, the hash
of [a, b) is (S[b] - S[a]) * B**-a, stirred. Any span of characters or of words costs two look-ups.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from gemel.data.document import Document

Hashes = npt.NDArray[np.uint64]
Index = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

SPACE, WORD, UNSPACED, SYMBOL = range(4)  # what a code point is
_KIND, _LETTER, _JOINER, _SENTENCE_END = 3, 4, 8, 16  # bits of the table: the kind, and what else is true of it

_ASSIGNED = 0x32400  # the last code point of a living script is below; what lies above is a symbol
_UNSPACED_RANGES = (
    (0x0E01, 0x0E4E),  # Thai
    (0x0E81, 0x0ECD),  # Lao
    (0x0F40, 0x0FBC),  # Tibetan
    (0x1000, 0x103F),  # Burmese
    (0x1050, 0x109D),
    (0x1780, 0x17D3),  # Khmer
    (0x3005, 0x3007),  # 々〆〇
    (0x3041, 0x30FA),  # hiragana and katakana
    (0x30FC, 0x30FF),
    (0x3105, 0x312F),  # bopomofo
    (0x31A0, 0x31BF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),  # half-width katakana
    (0x20000, 0x323AF),
)
_JOINERS = "'’.,"
SENTENCE_ENDS = ".!?…。！？｡．؟۔।॥။"
CLOSERS = "\"'”’)]}»）」』】》〉"  # may follow the end of a sentence and still belong to it

_BASE = 0x9E3779B97F4A7C15 | 1  # odd, so that it can be inverted modulo 2**64
_CODE_POINTS = 0x110000


@lru_cache(maxsize=1)
def _flags() -> npt.NDArray[np.uint8]:
    table = np.full(_CODE_POINTS, SYMBOL, np.uint8)
    categories = [unicodedata.category(chr(point)) for point in range(_ASSIGNED)]
    for point, category in enumerate(categories):
        if category[0] in "LNM" or category == "Pc":
            table[point] = WORD | (_LETTER if category[0] == "L" else 0)
        elif category[0] in "ZC":
            table[point] = SPACE
    for first, last in _UNSPACED_RANGES:
        table[first : last + 1] = UNSPACED | _LETTER
    for characters, bit in ((_JOINERS, _JOINER), (SENTENCE_ENDS, _SENTENCE_END)):
        for character in characters:
            table[ord(character)] |= bit
    return table


@lru_cache(maxsize=1)
def _values() -> Hashes:
    """A random-looking number for every code point (splitmix64, Steele et al. 2014), so that similar words get unlike hashes."""
    x = (np.arange(1, _CODE_POINTS + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=4)
def _powers_table(size: int) -> tuple[Hashes, Hashes]:
    bases = (_BASE, pow(_BASE, -1, 1 << 64))
    up, down = (np.full(size, base, np.uint64) for base in bases)
    up[0] = down[0] = 1
    return np.cumprod(up), np.cumprod(down)


def _powers(size: int) -> tuple[Hashes, Hashes]:
    return _powers_table(1 << max(16, (size - 1).bit_length()))


class RunningHash:
    """Hashes of any spans of a sequence of numbers. Equal spans have equal hashes, wherever they stand and in whatever sequence."""

    def __init__(self, values: Hashes):
        up, self._down = _powers(len(values) + 1)
        self._sum = np.empty(len(values) + 1, np.uint64)
        self._sum[0] = 0
        np.cumsum(values * up[: len(values)], out=self._sum[1:])

    def spans(self, start: Index, end: Index) -> Hashes:
        """One hash for each [start, end)."""
        return _mix((self._sum[end] - self._sum[start]) * self._down[start])

    def windows(self, width: int) -> Hashes:
        """The hash of [i, i + width) for every i."""
        count = max(0, len(self._sum) - width)
        return _mix((self._sum[width:] - self._sum[:count]) * self._down[:count]) if count else np.empty(0, np.uint64)


def _mix(hashes: Hashes) -> Hashes:
    """Makes sums into something that cannot be summed up again, in place.

    Without it the hash of two words would be the sum of their letters' terms, and `w107 w61` would equal `w101 w67`.
    """
    hashes ^= hashes >> np.uint64(32)
    hashes *= np.uint64(0xD6E8FEB86659FD93)
    hashes ^= hashes >> np.uint64(32)
    return hashes


def batches(documents: Iterable[Document], characters: int = 1 << 18) -> Iterator[list[Document]]:
    """Runs of documents of about so many characters together: enough for arithmetic on arrays to pay, small enough for the cache."""
    batch: list[Document] = []
    room = characters
    for document in documents:
        if batch and len(document.text) > room:
            yield batch
            batch, room = [], characters
        batch.append(document)
        room -= len(document.text)
    if batch:
        yield batch


def hash_of(text: str) -> int:
    """The hash that a word of this spelling has in every `Segments`."""
    values = _values()[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)]
    return int(RunningHash(values).spans(np.array([0]), np.array([len(text)]))[0])


@dataclass(frozen=True)
class Spans:
    """Words, lines or paragraphs of all documents of a batch, in order: places in its code points, and how many each document has."""

    start: Index
    end: Index
    bounds: Index  # those of document d are [bounds[d], bounds[d + 1])

    def __len__(self) -> int:
        return len(self.start)

    @cached_property
    def length(self) -> Index:
        """In code points."""
        return self.end - self.start

    @cached_property
    def document(self) -> Index:
        """Which document each belongs to."""
        return np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))

    def total(self, values: npt.NDArray[np.generic] | None = None) -> npt.NDArray[np.float64]:
        """Per document the sum of one value per span; without values, how many spans there are."""
        if values is None:
            return np.diff(self.bounds).astype(np.float64)
        return sums(values, self.bounds)


def sums(values: npt.NDArray[np.generic], bounds: Index) -> npt.NDArray[np.float64]:
    """The sums of consecutive ranges, of which some may be empty (`np.add.reduceat` gets those wrong). Whole numbers stay exact."""
    running = np.zeros(len(values) + 1, np.float64 if values.dtype.kind == "f" else np.int64)
    np.cumsum(values, out=running[1:])
    return (running[bounds[1:]] - running[bounds[:-1]]).astype(np.float64)


class Segments:
    """A batch of texts as arrays. Everything that is not always needed is worked out when it is first asked for."""

    def __init__(self, texts: Sequence[str]):
        # Every document gets a line end of its own, so that no word or line reaches into the next one.
        joined = "\n".join(texts) + "\n" if texts else ""
        self.points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
        self.bounds = np.concatenate(([0], np.cumsum([len(text) + 1 for text in texts], dtype=np.int64)))
        self.flags = _flags()[self.points]
        self.kind = self.flags & np.uint8(_KIND)
        self._join()
        self.tokens, self.token_kind = self._cut()

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def _join(self) -> None:
        at = np.flatnonzero(self.flags & _JOINER)
        at = at[(at > 0) & (at < len(self.kind) - 1)]
        self.kind[at[(self.kind[at - 1] == WORD) & (self.kind[at + 1] == WORD)]] = WORD

    def _cut(self) -> tuple[Spans, npt.NDArray[np.uint8]]:
        kind, points = self.kind, self.points
        changed = np.empty(len(kind), np.bool_)
        changed[:1] = True
        np.not_equal(kind[1:], kind[:-1], out=changed[1:])
        edge = changed | (kind == UNSPACED)
        edge[1:] |= (kind[1:] == SYMBOL) & (points[1:] != points[:-1])
        edges = np.flatnonzero(edge)
        kinds = kind[edges]
        start, end = edges, np.append(edges[1:], len(kind))
        filled = kinds != SPACE
        start, end = start[filled], end[filled]
        return Spans(start, end, np.searchsorted(start, self.bounds)), kinds[filled]

    @cached_property
    def characters(self) -> RunningHash:
        """Hashes of spans of code points."""
        return RunningHash(_values()[self.points])

    @cached_property
    def words(self) -> Spans:
        """Tokens that are no symbols."""
        chosen = self.token_kind != SYMBOL
        running = np.concatenate(([0], np.cumsum(chosen)))
        return Spans(self.tokens.start[chosen], self.tokens.end[chosen], running[self.tokens.bounds])

    @cached_property
    def word_kind(self) -> npt.NDArray[np.uint8]:
        """`WORD` or `UNSPACED`, for each word."""
        kinds: npt.NDArray[np.uint8] = self.token_kind[self.token_kind != SYMBOL]
        return kinds

    @cached_property
    def word_hash(self) -> Hashes:
        """One number per word, the same for the same spelling."""
        return self.characters.spans(self.words.start, self.words.end)

    @cached_property
    def token_hash(self) -> Hashes:
        """One number per word or symbol."""
        return self.characters.spans(self.tokens.start, self.tokens.end)

    @cached_property
    def _all_lines(self) -> tuple[Index, Index]:
        ends = np.flatnonzero(self.points == ord("\n"))
        return np.concatenate(([0], ends[:-1] + 1)) if len(ends) else ends, ends

    @cached_property
    def _tokens_of_lines(self) -> tuple[Index, Index]:
        start, end = self._all_lines
        return np.searchsorted(self.tokens.start, start), np.searchsorted(self.tokens.start, end)

    @cached_property
    def _blank(self) -> Mask:
        first, last = self._tokens_of_lines
        blank: Mask = first == last
        return blank

    @cached_property
    def lines(self) -> Spans:
        """Lines that hold something, without the space around them."""
        first, last = (places[~self._blank] for places in self._tokens_of_lines)
        start = self.tokens.start[first]
        return Spans(start, self.tokens.end[last - 1], np.searchsorted(start, self.bounds))

    @cached_property
    def line_tokens(self) -> tuple[Index, Index]:
        """For each line, its first token and the one after its last."""
        first, last = self._tokens_of_lines
        return first[~self._blank], last[~self._blank]

    @cached_property
    def paragraphs(self) -> Spans:
        """Lines with no blank line between them."""
        lines = self.lines
        after_blank = np.concatenate(([True], self._blank[:-1]))[~self._blank]
        first_of_document = np.zeros(len(lines) + 1, np.bool_)
        first_of_document[lines.bounds] = True
        first = np.flatnonzero(after_blank | first_of_document[:-1])
        last = np.append(first[1:], len(lines)) - 1 if len(first) else first
        start = lines.start[first]
        return Spans(start, lines.end[last], np.searchsorted(start, self.bounds))

    def hash_lines(self, spans: Spans) -> Hashes:
        """One number per line or paragraph."""
        return self.characters.spans(spans.start, spans.end)

    @cached_property
    def letters(self) -> Index:
        """Running count of letters: `letters[b] - letters[a]` are in [a, b)."""
        return np.concatenate(([0], np.cumsum((self.flags & _LETTER) != 0)))

    @cached_property
    def unspaced(self) -> Index:
        """Running count of characters of scripts without spaces."""
        return np.concatenate(([0], np.cumsum(self.kind == UNSPACED)))

    @cached_property
    def sentence_ends(self) -> Index:
        """Places after which a sentence ends: full stops of Chinese always, others before space, closing marks or the end of the line."""
        ends = (self.flags & _SENTENCE_END) != 0
        at = np.flatnonzero(ends[:-1] & ~ends[1:])
        following = self.points[at + 1]
        wide = self.points[at] >= 0x3000
        closing = np.isin(following, np.array([ord(c) for c in CLOSERS], np.uint32))
        free = (self.kind[at] == SYMBOL) & ((self.kind[at + 1] == SPACE) | closing)
        found: Index = at[wide | free]
        return found
