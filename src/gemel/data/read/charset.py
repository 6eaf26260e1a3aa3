"""Which characters the bytes of a web page stand for.

The order is the HTML standard's: byte order mark, what the server said, what the page says of itself. Labels mean what browsers think
(https://encoding.spec.whatwg.org/#names-and-labels): `latin-1` is windows-1252 and `gb2312` is GB 18030, because pages are made so that
browsers show them. Where nothing is said, or what is said is wrong, UTF-8 and GB 18030 are tried; a page that is neither is dropped.
"""

from __future__ import annotations

import codecs
import re

from gemel.data.document import Document, Dropped
from gemel.data.read.reader import printable

BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
LOOKED_AT_BYTES = 4096  # the standard says 1024; pages put scripts before their <meta>
DECLARED = re.compile(rb"""<(?:meta|\?xml)[^>]{0,512}?(?:charset|encoding)\s*=\s*["']?\s*([\w:.-]+)""", re.IGNORECASE)
LABELS = {
    **dict.fromkeys(("ascii", "us-ascii", "latin1", "latin-1", "iso-8859-1", "iso8859-1", "iso_8859-1", "l1"), "cp1252"),
    **dict.fromkeys(("gb2312", "gb_2312-80", "gbk", "x-gbk", "gb18030", "chinese"), "gb18030"),
    **dict.fromkeys(("big5", "big5-hkscs", "cn-big5", "x-x-big5"), "big5hkscs"),
    **dict.fromkeys(("shift_jis", "shift-jis", "sjis", "x-sjis", "windows-31j"), "cp932"),
    **dict.fromkeys(("euc-kr", "ks_c_5601-1987", "korean", "windows-949"), "cp949"),
    **dict.fromkeys(("iso-8859-9", "latin5", "l5"), "cp1254"),
    **dict.fromkeys(("utf-16", "utf-16le", "utf-16be", "unicode"), "utf-8"),  # it was read as ASCII so far, so it is not UTF-16
}
MOST_REPLACED = 0.01  # of the characters; with more, the label was wrong and the text is noise


def page(data: bytes, declared: str | None, document: Document) -> Document | Dropped:
    """Put the page's source into `document`. `declared` is the charset that the server named. Reasons: `read.empty`, `read.charset`."""
    if not data.strip():
        return Dropped(document, "read.empty", f"{len(data)} bytes, all blank")
    tried = []
    for name in _candidates(data, declared):
        text = data.decode(name, "replace")
        num_replaced = text.count("\ufffd")
        if num_replaced <= MOST_REPLACED * len(text) and "\0" not in text:
            document.text = text.removeprefix("\ufeff")
            if num_replaced:
                document.metadata.setdefault("counts", {})["read.replaced_characters"] = num_replaced
            return document
        tried.append(f"{name}: {num_replaced} of {len(text)} characters are not")
    document.text = printable(data)
    return Dropped(document, "read.charset", "; ".join(tried))


def _candidates(data: bytes, declared: str | None) -> list[str]:
    """Encodings to try, the likeliest first."""
    for mark, encoding in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return [encoding]
    said = [declared or ""] + [label.decode("ascii", "replace") for label in DECLARED.findall(data[:LOOKED_AT_BYTES])[:1]]
    names = [name for label in said if (name := _codec(label))]
    return list(dict.fromkeys([*names, "utf-8", "gb18030"]))


def _codec(label: str) -> str | None:
    label = label.strip().lower()
    try:
        found = codecs.lookup(LABELS.get(label, label))
    except (LookupError, ValueError):
        return None
    return found.name if found._is_text_encoding else None
