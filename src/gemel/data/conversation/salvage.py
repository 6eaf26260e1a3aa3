"""From the bytes of a file to the objects in it, when the file is whole, and when it is not.

Files of fine-tuning data are made by hand and by scripts that die: a list without its end, a comma too many, lines of two files one after
the other, an object in the middle that was never finished. What is sound in them is as good as if the file were. So a file is first read as
what it should be, JSON or JSON lines; if that fails, objects are looked for one after the other, and what lies between two of them is lost
and says where it was.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gemel.data.read import files
from gemel.data.read.reader import Reading

MAX_LOST_CHARS = 4_000  # of what is lost, so much is kept to look at
MOST_BAD = 0.2  # of the characters beyond ASCII; with more that are not UTF-8, the file is not
_BLANK = re.compile(r"[\s,\[\]\ufeff\0]*")
_NEXT_OBJECT = re.compile(r"(?:(?<=[\[\],}\n])|(?<=\]\s)|(?<=,\s))\s*(?=\{)")
_STRING_OR_LAST_COMMA = re.compile(r'"(?:[^"\\]|\\.)*"|,(?=\s*[}\]])')
_WRAPPERS = ("data", "rows", "examples", "train", "items", "instances", "数据")
_decoder = json.JSONDecoder(strict=False)  # line ends and tabs within strings are wrong and harmless


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a file. `place` says where it stands; `repairs` names what had to be mended."""

    value: Any
    place: str
    repairs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Lost:
    """Something in a file that is no object, with a reason."""

    text: str
    place: str
    reason: str
    detail: str


def read(path: str) -> Iterator[Row | Lost]:
    """All objects of a file, compressed or not, in order, and everything else that is in it."""
    chunks: list[bytes] = []
    damage: files.Damaged | None = None
    try:
        for chunk in files.contents(path, Reading()):
            chunks.append(chunk)
    except files.Damaged as error:
        damage = error
    text, encoding, num_replaced = decode(b"".join(chunks))
    repairs = (f"repaired.{encoding}",) if encoding else ()
    for found in objects(text):
        if isinstance(found, Row) and repairs:
            yield Row(found.value, found.place, (*repairs, *found.repairs))
        else:
            yield found
    if num_replaced:
        yield Lost("", "file", "sft.not_utf8", f"{num_replaced} bytes that are neither UTF-8 nor GB 18030 became U+FFFD in the rows")
    if damage is not None:
        yield Lost("", "file", damage.reason.replace("read.", "sft."), str(damage))


def decode(data: bytes) -> tuple[str, str, int]:
    """The text, the encoding if it is not UTF-8, and how many characters could not be read.

    Most UTF-8 can be read as GB 18030, too, and is nonsense then. So one bad byte is no reason to try, but many are.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = data.decode("utf-16", "replace")
        return text, "utf-16", text.count("\ufffd")
    text = data.decode("utf-8-sig", "replace")
    num_bad = text.count("\ufffd") - data.count("\ufffd".encode())
    if num_bad > MOST_BAD * sum(not character.isascii() for character in text):
        try:
            return data.decode("gb18030"), "gb18030", 0
        except UnicodeDecodeError:
            pass
    return text, "", num_bad


def objects(text: str) -> Iterator[Row | Lost]:
    """The rows of a file's text, and what is lost between them."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        pass
    else:
        yield from _rows_of(whole)
        return
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip(" \t\r\ufeff")]
    if lines and _is_json_line(lines):
        for number, line in lines:
            yield from _line(line, f"line {number}")
    else:
        for found in _scan(text):
            yield Row(found.value, found.place, ("repaired.broken_list", *found.repairs)) if isinstance(found, Row) else found


def _rows_of(whole: Any) -> Iterator[Row | Lost]:
    """The rows of a sound file: a list, an object that holds one, or one object."""
    if isinstance(whole, dict):
        lists = [whole[key] for key in _WRAPPERS if isinstance(whole.get(key), list)]
        whole = lists[0] if len(lists) == 1 and all(isinstance(row, dict | list) for row in lists[0]) else [whole]
    if not isinstance(whole, list):
        yield Lost(
            json.dumps(whole, ensure_ascii=False)[:MAX_LOST_CHARS], "file", "sft.not_object", f"the file is a {type(whole).__name__}"
        )
        return
    for number, row in enumerate(whole, 1):
        if isinstance(row, dict | list):
            yield Row(row, f"row {number}")
        else:
            text = json.dumps(row, ensure_ascii=False)[:MAX_LOST_CHARS]
            yield Lost(text, f"row {number}", "sft.not_object", f"a {type(row).__name__}, not an object")


def _is_json_line(lines: list[tuple[int, str]]) -> bool:
    """Whether the file is JSON lines: most of the first ones are JSON on their own."""
    first = lines[:10]
    sound = 0
    for _, line in first:
        try:
            sound += isinstance(json.loads(line.strip("\ufeff \t\r,")), dict | list)
        except (ValueError, RecursionError):
            continue
    return sound * 2 > len(first)


def _line(line: str, place: str) -> Iterator[Row | Lost]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        for found in _scan(line):  # several objects, one that breaks off, a comma behind it
            yield Row(found.value, place, found.repairs) if isinstance(found, Row) else Lost(found.text, place, found.reason, found.detail)
        return
    if isinstance(value, dict | list):
        yield Row(value, place)
    else:
        yield Lost(line[:MAX_LOST_CHARS], place, "sft.not_object", f"a {type(value).__name__}, not an object")


def _scan(text: str) -> Iterator[Row | Lost]:
    """Objects one after the other, whatever stands between them."""
    at, keys, lines = 0, set[str](), _LineCounter(text)
    while True:
        at = _after_blank(text, at)
        if at == len(text):
            return
        place = f"line {lines.at(at)}"
        row, end, repairs = _object_at(text, at)
        if row is not None:
            keys.update(row)
            yield Row(row, place, repairs)
            at = end
            continue
        following = _next_object(text, at + 1, keys)
        lost = text[at:following]
        mended = _mend(lost)
        if mended is not None:
            keys.update(mended[0])
            yield Row(mended[0], place, (mended[1],))
        else:
            reason, detail = _why(lost, at_end=following == len(text))
            yield Lost(lost.strip()[:MAX_LOST_CHARS], place, reason, detail)
        at = following


def _after_blank(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    assert match is not None
    return match.end()


def _object_at(text: str, at: int) -> tuple[dict[str, Any] | None, int, tuple[str, ...]]:
    if text[at] != "{":
        return None, at, ()
    try:
        row, end = _decoder.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None, at, ()
    try:
        json.loads(text[at:end])
        repairs: tuple[str, ...] = ()
    except ValueError:
        repairs = ("repaired.control_characters",)
    return row, end, repairs


def _next_object(text: str, start: int, keys: set[str]) -> int:
    """Where the next sound object begins that looks like a row and not like a part of the broken one."""
    for match in _NEXT_OBJECT.finditer(text, start):
        row, _, _ = _object_at(text, match.end())
        if row and (not keys or sum(key in keys for key in row) * 2 >= len(row)):
            return match.end()
    return len(text)


def _mend(text: str) -> tuple[dict[str, Any], str] | None:
    """A broken object with a comma too many, or written as Python writes it."""
    text = text.strip().rstrip(",]").strip()
    if not text.startswith("{") or not text.endswith("}"):
        return None
    try:
        row = json.loads(_STRING_OR_LAST_COMMA.sub(lambda match: "" if match[0] == "," else match[0], text), strict=False)
        return (row, "repaired.trailing_comma") if isinstance(row, dict) else None
    except (ValueError, RecursionError):
        pass
    try:
        row = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return (row, "repaired.python_literal") if isinstance(row, dict) and all(isinstance(key, str) for key in row) else None


def _why(text: str, at_end: bool) -> tuple[str, str]:
    if not text.lstrip().startswith("{"):
        return "sft.not_object", f"text outside of any object: {text.strip()[:40]!r}"
    try:
        _decoder.raw_decode(text.lstrip())
    except ValueError as error:
        unfinished = at_end and (getattr(error, "pos", 0) >= len(text.strip()) - 1 or "Unterminated" in str(error))
        return ("sft.broken_off" if unfinished else "sft.broken_json"), str(error)
    except RecursionError:
        return "sft.too_deep", "nested deeper than Python can follow"
    return "sft.broken_json", "not like the other rows"


class _LineCounter:
    """Line numbers of growing positions, each counted once."""

    def __init__(self, text: str):
        self._text = text
        self._at, self._line = 0, 1

    def at(self, position: int) -> int:
        self._line += self._text.count("\n", self._at, position)
        self._at = position
        return self._line
