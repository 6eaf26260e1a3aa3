"""Special tokens in text: finding those that a chat template wrote, and hiding those that a person wrote.

Hiding replaces single characters by *stand-ins*: private-use characters that occur nowhere else in the input, one for
one, so that lengths, white space and everything around them stay as they are. `chat.py` says when and why.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from gemel.config.errors import RequestError

_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_WORD = re.compile(r"\w*")


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """One special token. `lstrip` and `rstrip`: it swallows white space before and after itself."""

    id: int
    text: str
    lstrip: bool = False
    rstrip: bool = False


class StandIns:
    """Private-use characters that do not occur in `taken`, handed out as they are needed."""

    def __init__(self, taken: str):
        self._taken = taken
        self._present = set(taken)
        self._fresh = (chr(code) for code in chain(*_PRIVATE_USE) if chr(code) not in self._present)
        self._of: dict[str, str] = {}
        self._real: dict[str, str] = {}

    def fresh(self) -> str:
        """A character that nothing else uses, neither itself nor as a JSON escape."""
        for character in self._fresh:
            if _escaped(character) not in self._taken:
                return character
        raise RequestError("the messages use every private-use character of Unicode; remove some", param="messages")

    def of(self, character: str) -> str:
        """The stand-in of `character`."""
        if character not in self._of:
            stand_in = self._of[character] = self.fresh()
            self._real[stand_in] = character
            self._real[_escaped(stand_in)] = _escaped(character)
        return self._of[character]

    def restore(self, text: str) -> str:
        """`text` with the real characters, also where a template wrote stand-ins as JSON escapes."""
        if not self._real:
            return text
        return re.sub("|".join(map(re.escape, self._real)), lambda match: self._real[match[0]], text)


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1]


class SpecialTokens:
    """All special tokens of a tokenizer, ready to be looked for."""

    def __init__(self, tokens: Mapping[str, SpecialToken]):
        self.tokens = tokens
        longest_first = sorted(tokens, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first))
        self._find = re.compile(pattern or r"(?!)")
        self._starts = re.compile(
            f"(?={pattern})" if pattern else r"(?!)", re.IGNORECASE
        )  # overlapping ones too; a template may change case
        self._ends = sorted({character for text in tokens for character in (text[0], text[-1])})
        self._joined = "\0" + "\0".join(longest_first) + "\0"
        self._longest = max(map(len, tokens), default=0)

    def split(self, text: str) -> Iterator[int | str]:
        """Ids of the special tokens in `text` and the stretches between them, in order."""
        done = 0
        for match in self._find.finditer(text):
            if match.start() < done:
                continue
            token = self.tokens[match[0]]
            start, end = match.span()
            while token.lstrip and start > done and text[start - 1].isspace():
                start -= 1
            while token.rstrip and end < len(text) and text[end].isspace():
                end += 1
            if start > done:
                yield text[done:start]
            yield token.id
            done = end
        if done < len(text):
            yield text[done:]

    def hide(self, text: str, stand_ins: StandIns, *, dense: bool, free: bool) -> str:
        """`text` with stand-ins where a special token could come from.

        `free` text is prose of any kind. Otherwise a single word (a name, a key of a schema) is left alone unless it contains a special
        token, because templates compare such words.
        """
        positions = {match.start() for match in self._starts.finditer(text)}
        if free or not _WORD.fullmatch(text):
            positions |= self._fragments(text, free)
            table = str.maketrans({character: stand_ins.of(character) for character in self._ends if character in text}) if dense else {}
        else:
            table = {}
        if positions:
            characters = list(text)
            for position in positions:
                characters[position] = stand_ins.of(characters[position])
            text = "".join(characters)
        return text.translate(table) if table else text

    def _fragments(self, text: str, free: bool) -> set[int]:
        """Positions in parts of special tokens: beginnings at the end of `text`, ends at its start, middles that are all of it (`free`)."""
        found = set()
        for body in {text, text.rstrip()}:
            tails = range(max(0, len(body) - self._longest + 1), len(body))
            found |= {start for start in tails if f"\0{body[start:]}" in self._joined}
        for body in {text, text.lstrip()}:
            heads = range(1, min(self._longest, len(body) + 1))
            found |= {len(text) - len(body) + end - 1 for end in heads if f"{body[:end]}\0" in self._joined}
        middle = text.strip()
        if free and 0 < len(middle) < self._longest and middle in self._joined:
            found.add(text.index(middle))
        return found
