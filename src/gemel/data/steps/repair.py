"""What wrong decoding and careless conversion left behind in text, undone where that is certain.

Mojibake is UTF-8 that somebody read as another charset; ftfy (Speer 2019) finds the sequences that hardly ever mean themselves and decodes
them again. That search is slow and nearly all text is clean, so it is asked only about lines in which two characters stand together that a
charset of one byte each has beyond ASCII: no sequence of UTF-8 leaves less.
Full-width letters and digits are not touched: in Chinese and Japanese they are a choice, not an error.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from gemel.config.data.rules import RepairConfig
from gemel.config.errors import UnsupportedError
from gemel.data.document import Document, Dropped
from gemel.data.steps.counts import count

# All of C0 and C1 but tab and line feed, DEL, soft hyphen, zero-width space and no-break space, byte order mark, and code points that are
# no characters (lone surrogates, U+FFFE, U+FFFF). Joiners stay: they spell words in Persian and Hindi and draw emoji; so do direction
# marks.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u200b\u2060\ufeff\ud800-\udfff\ufffe\uffff]")
_SUSPECT = re.compile("[\x80-\u25ff\uf8ff\ufb01\ufb02]{2}")
_LINE_ENDS = re.compile("\r\n?|\u2028|\u2029|\x85")


class Repair:
    """Repairs texts; drops those in which too much was lost before."""

    def __init__(self, config: RepairConfig):
        self.config = config
        self._undo = _load_undo() if config.mojibake else None

    def __call__(self, documents: Sequence[Document]) -> Iterable[Document | Dropped]:
        """One answer per document, in order."""
        return map(self._repair, documents)

    def _repair(self, document: Document) -> Document | Dropped:
        lost = document.text.count("\ufffd")
        if lost > self.config.max_replacements * len(document.text):
            share = lost / len(document.text)
            return Dropped(document, "repair.undecodable", f"{share:.4g} > {self.config.max_replacements:.4g}")
        text = document.text
        if self._undo is not None and not text.isascii():
            text = self._changed(document, "repair.mojibake", text, self._undo(text))
        if self.config.control_characters:
            text = _LINE_ENDS.sub("\n", text)
            text, removed = _CONTROL.subn("", text)
            count(document, "repair.control_characters", removed)
        if self.config.normalise and not unicodedata.is_normalized("NFC", text):
            text = self._changed(document, "repair.normalised", text, unicodedata.normalize("NFC", text))
        document.text = text
        return document

    @staticmethod
    def _changed(document: Document, name: str, before: str, after: str) -> str:
        count(document, name, int(before != after))
        return after


def _load_undo() -> Callable[[str], str]:
    try:
        from ftfy import fix_encoding
        from ftfy.badness import is_bad
    except ImportError:
        raise UnsupportedError("mojibake = true needs ftfy: pip install 'gemel[data]', or set mojibake = false") from None

    def undo(text: str) -> str:
        if not _SUSPECT.search(text):
            return text
        # Line by line: one garbled quotation must not decide how the rest of the page is read.
        return "\n".join(fix_encoding(line) if _SUSPECT.search(line) and is_bad(line) else line for line in text.split("\n"))

    return undo
