"""Many texts as one array of code points, with all that `Normalize` says does not count already taken out.

Everything that compares texts starts here, so "the same text" means one thing. A character is looked up in a table that holds what it
counts as and what it does to words; the tables are built once per setting, and no Python code runs per character. Characters that count as
white space become 0, which also is what they add to a sum of code points.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from gemel.config.data.dedup import Normalize

CodePoints = npt.NDArray[np.uint32]
Offsets = npt.NDArray[np.int64]

# So many characters at a time: what is made from them stays within a core's second-level cache, and the powers of R are few.
BLOCK_CHARS = 1 << 17

_LIMIT = 0x20000  # planes 0 and 1 are looked at one by one; beyond there are Han characters, and what nobody writes
_DROP = np.uint32(1 << 30)  # counts as nothing
_ALONE = np.uint32(1 << 31)  # a word by itself: the scripts without word spaces
_CODE = np.uint32((1 << 21) - 1)
_ZERO = ord("0")
_MARKS = range(0x300, 0x370)

# Han and its radicals, kana; Thai and Lao; Myanmar; Khmer; Han of planes 2 and 3.
_SCRIPTS_WITHOUT_SPACES = (
    range(0x2E80, 0x2FE0),
    range(0x3005, 0x3008),
    range(0x3021, 0x302A),
    range(0x3041, 0x3100),
    range(0x31F0, 0x3200),
    range(0x3400, 0x4DC0),
    range(0x4E00, 0xA000),
    range(0xF900, 0xFB00),
    range(0x0E00, 0x0F00),
    range(0x1000, 0x10A0),
    range(0x1780, 0x17DE),
    range(0x20000, 0x40000),
)


@dataclass(frozen=True, slots=True)
class Normal:
    """Texts after normalization. Text number i is `codes[starts[i]:starts[i + 1]]`; 0 is white space."""

    codes: CodePoints
    alone: npt.NDArray[np.bool_]  # which of them are words by themselves
    starts: Offsets  # one more than there are texts

    def sizes(self) -> Offsets:
        """How many characters each text has, white space not counted."""
        written = np.zeros(len(self.codes) + 1, np.int64)
        np.cumsum(self.codes != 0, out=written[1:])
        return np.diff(written[self.starts])

    def string(self, start: int, stop: int) -> str:
        """Part of it as text, with one space wherever there was white space."""
        text = self.codes[start:stop].tobytes().decode("utf-32-le", "surrogatepass")
        return " ".join(text.replace("\0", " ").split())

    def strings(self) -> list[str]:
        """Every text, with one space wherever there was white space, and none at its ends."""
        space = self.codes == 0
        keep = ~space
        keep[1:] |= space[1:] & ~space[:-1]  # the first of a run
        codes = np.where(space, np.uint32(ord(" ")), self.codes)[keep]
        kept = np.zeros(len(keep) + 1, np.int64)
        np.cumsum(keep, out=kept[1:])
        text = codes.tobytes().decode("utf-32-le", "surrogatepass")
        starts = kept[self.starts].tolist()
        return [text[start:stop].strip(" ") for start, stop in pairwise(starts)]


def normalized(texts: Sequence[str], config: Normalize) -> list[str]:
    """Every text as what it counts as."""
    return [text for group in groups(texts) for text in normal(texts[group], config).strings()]


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


def normal(texts: Sequence[str], config: Normalize) -> Normal:
    """All texts in one array."""
    table = _table(config)
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    starts = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    mapped = np.take(table, np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), "<u4"))
    drop = mapped >= _DROP
    drop &= mapped < _ALONE
    if config.numbers:
        zero = mapped == _ZERO
        again = zero[1:] & zero[:-1]
        firsts = starts[1:-1]
        again[firsts[(firsts > 0) & (firsts < len(mapped))] - 1] = False  # a text may begin with the digit that the one before ends with
        drop[1:] |= again
    if drop.any():
        keep = ~drop
        mapped = mapped[keep]
        kept = np.zeros(len(keep) + 1, np.int64)
        np.cumsum(keep, out=kept[1:])
        starts = kept[starts]
    return Normal(mapped & _CODE, mapped >= _ALONE, starts)


@functools.cache
def _table(config: Normalize) -> CodePoints:
    """What each character counts as: a code point, perhaps with `_ALONE`; 0; or `_DROP`."""
    table = np.arange(0x110000, dtype=np.uint32)
    table[:_LIMIT] = [_entry(chr(code), config) for code in range(_LIMIT)]
    alone = np.zeros(len(table), np.bool_)
    for script in _SCRIPTS_WITHOUT_SPACES:
        alone[script.start : script.stop] = True
    counts = (table > 0) & (table < _DROP)
    table[counts] |= np.where(alone[table[counts]], _ALONE, np.uint32(0))
    return table


def _entry(char: str, config: Normalize) -> int:
    wide = unicodedata.normalize("NFKC", char)
    char = wide if len(wide) == 1 else char
    category = unicodedata.category(char)
    if char.isspace() or category == "Cc" or (config.punctuation and category[0] in "PS"):
        return 0
    if category == "Cf" or (config.accents and ord(char) in _MARKS):
        return int(_DROP)
    if config.numbers and char.isdecimal():
        return _ZERO
    if config.accents:
        parts = unicodedata.normalize("NFD", char)
        char = parts[0] if all(ord(mark) in _MARKS for mark in parts[1:]) else char
    lower = char.lower() if config.case else char
    return ord(lower) if len(lower) == 1 else ord(char)
