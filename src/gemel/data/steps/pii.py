"""Personal data in text, replaced: e-mail and internet addresses, telephone numbers, Chinese identity numbers, bank cards.

Each kind has a pattern for its form and, where it has one, a check of its content: the date, province and check digit of an identity number
(GB 11643-1999), the issuer and Luhn digit of a card (ISO/IEC 7812-1), an address that is publicly routed. Forms alone would take version
numbers for addresses and order numbers for cards.

No pattern can take more than linear time: each starts only where no character of its own kind stands before, and every repetition is
bounded. A scan for enough digits comes first, since most documents hold no number that is long enough for anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from itertools import groupby

from gemel.config.data.rules import PiiConfig, PiiRule
from gemel.data.document import Document, Dropped
from gemel.data.steps.counts import count

# Full-width forms are read like their ASCII twins; one character for one, so that places stay.
_FULL_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)} | {0x3000: 0x20}
_HAS_FULL_WIDTH = re.compile("[\uff0b\uff08\uff10-\uff19\uff20]")

_LONG_NUMBER = re.compile(r"[0-9](?:[ ().-]{0,2}[0-9]){6}", re.ASCII)
_FOUR_NUMBERS = re.compile(r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]")
_GROUPS = re.compile(r":[0-9A-Fa-f]{0,4}:")

_EMAIL = re.compile(
    r"(?<![A-Za-z0-9.!#$%&'*+/=?^_`{|}~-])"
    r"[A-Za-z0-9_][A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{0,63}"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}([A-Za-z]{2,24})(?![A-Za-z0-9-])"
)
_FILE_ENDINGS = ("png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "json", "html", "htm", "pdf", "mp4", "zip")  # logo@2x.png

_CHINA_ID = re.compile(r"(?<![0-9A-Za-z])[1-8][0-9]{5}[12][0-9]{3}[01][0-9][0-3][0-9]{4}[0-9Xx](?![0-9A-Za-z])")
_PROVINCE = re.compile("1[1-5]|2[1-3]|3[1-7]|4[1-6]|5[0-4]|6[1-5]|71|8[1-3]")
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)

_CARD = re.compile(r"(?<![0-9A-Za-z.])(?<![0-9][ -])[3-6][0-9]{3}(?:[ -]?[0-9]){9,15}(?![0-9A-Za-z]|[ -][0-9])")
_CARD_ISSUERS = (  # first digits, lengths
    (re.compile("4"), (13, 16, 19)),  # Visa
    (re.compile("5[1-5]"), (16,)),  # Mastercard
    (re.compile("3[47]"), (15,)),  # American Express
    (re.compile("3(?:0[0-5]|[68])"), (14,)),  # Diners Club
    (re.compile("35(?:2[89]|[3-8])"), (16,)),  # JCB
    (re.compile("6(?:011|4[4-9]|5)"), (16,)),  # Discover
    (re.compile("62"), (16, 17, 18, 19)),  # UnionPay
)

_IPV4 = re.compile(r"(?<![0-9A-Za-z.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9A-Za-z]|\.[0-9])")
_VERSION = re.compile(r"(?:\b(?:version|ver|release|build|section|chapter|firmware|driver)\.?|版本?|[A-Za-z]/)[ :：]{0,2}\Z", re.I)
_IPV6 = re.compile(r"(?<![0-9A-Za-z:.])[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:]{0,34}(?:[0-9A-Fa-f]|::)(?![0-9A-Za-z])")

_START, _END = r"(?<![0-9A-Za-z.+_-])", r"(?![0-9A-Za-z]|[.-][0-9])"
_PHONE = re.compile(
    "|".join(
        (
            # Chinese mobile, with or without +86, in one piece or as 3-4-4
            _START + r"(?:(?:\+|00)?86[ -]?)?1[3-9][0-9](?:[0-9]{8}|[ -][0-9]{4}[ -][0-9]{4})" + _END,
            # Chinese land line: area code, then 7 or 8 digits, separated or in brackets; perhaps an extension
            _START + r"(?:(?:\+|00)?86[ -]?)?(?:\(0[1-9][0-9]{1,2}\) ?|0[1-9][0-9]{1,2}[ -])[2-8][0-9]{6,7}(?:-[0-9]{1,5})?" + _END,
            # Chinese service numbers
            _START + r"[48]00[ -][0-9]{3}[ -]?[0-9]{4}" + _END,
            # North America: 3-3-4 with dashes, dots or brackets; spaces alone would take columns of numbers
            _START + r"(?:\+?1[ .-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[.-])[2-9][0-9]{2}[.-][0-9]{4}" + _END,
            # International: + and at least ten digits in one piece, or groups
            _START + r"\+[1-9][0-9]{9,14}" + _END,
            _START + r"\+[1-9][0-9]{0,2}[ .-]?(?:\([0-9]{1,4}\)|[0-9]{1,4})(?:[ .-][0-9]{2,8}){1,4}" + _END,
        )
    )
)


class Pii:
    """Replaces personal data and counts what it replaced."""

    def __init__(self, config: PiiConfig):
        self.config = config

    def __call__(self, documents: Sequence[Document]) -> Iterable[Document | Dropped]:
        """One answer per document, in order; none is dropped."""
        for document in documents:
            self._redact(document)
            yield document

    def _redact(self, document: Document) -> None:
        found = find(document.text, self.config.rules, self.config.public_only)
        if not found:
            return
        parts: list[str] = []
        behind = 0
        for start, end, rule in found:
            parts += (document.text[behind:start], self.config.replacement(rule))
            behind = end
            count(document, f"pii.{rule}")
        document.text = "".join(parts) + document.text[behind:]


def find(text: str, rules: Sequence[PiiRule], public_only: bool = True) -> list[tuple[int, int, PiiRule]]:
    """Where personal data stands, in order and without overlaps: start, end, rule. Of two rules for one place the stricter one counts."""
    if not text.isascii() and _HAS_FULL_WIDTH.search(text):
        text = text.translate(_FULL_WIDTH)
    has_number = _LONG_NUMBER.search(text) is not None
    finders: dict[PiiRule, Callable[[], Iterable[re.Match[str]]]] = {
        "email": lambda: _emails(text) if "@" in text else (),
        "china_id": lambda: filter(_is_china_id, _CHINA_ID.finditer(text)) if has_number else (),
        "bank_card": lambda: filter(_is_card, _CARD.finditer(text)) if has_number else (),
        "ipv6": lambda: (m for m in _IPV6.finditer(text) if _is_ipv6(m, public_only)) if _GROUPS.search(text) else (),
        "ipv4": lambda: (m for m in _IPV4.finditer(text) if _is_ipv4(m, public_only)) if _FOUR_NUMBERS.search(text) else (),
        "phone": lambda: filter(_is_phone, _PHONE.finditer(text)) if has_number else (),
    }
    found: list[tuple[int, int, PiiRule]] = []
    taken = bytearray(len(text))
    for rule, matches in finders.items():
        for start, end in [match.span() for match in matches()] if rule in rules else ():
            if 1 not in taken[start:end]:
                taken[start:end] = b"\1" * (end - start)
                found.append((start, end, rule))
    return sorted(found)


def _emails(text: str) -> Iterable[re.Match[str]]:
    return (match for match in _EMAIL.finditer(text) if match[1].lower() not in _FILE_ENDINGS)


def _is_china_id(match: re.Match[str]) -> bool:
    number = match[0]
    try:
        date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    check = "10X98765432"[sum(int(digit) * weight for digit, weight in zip(number, _ID_WEIGHTS, strict=False)) % 11]
    return _PROVINCE.match(number) is not None and number[6:8] in ("18", "19", "20") and number[17].upper() == check


def _is_card(match: re.Match[str]) -> bool:
    number = "".join(c for c in match[0] if c.isdigit())
    if not any(start.match(number) and len(number) in lengths for start, lengths in _CARD_ISSUERS):
        return False
    groups = [len(list(group)) for is_digit, group in groupby(match[0], str.isdigit) if is_digit]
    if len(groups) > 1 and groups not in ([4, 6, 5], [4, 6, 4]) and (set(groups[:-1]) != {4} or groups[-1] > 4):
        return False
    doubled = (int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(number)))
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def _is_phone(match: re.Match[str]) -> bool:
    """Numbers with a country code have 8 to 15 digits (ITU-T E.164); an extension may follow in China."""
    number = match[0]
    return not number.startswith("+") or number.startswith("+86") or 8 <= sum(c.isdigit() for c in number) <= 15


def _is_ipv4(match: re.Match[str], public_only: bool) -> bool:
    try:
        address = IPv4Address(match[0])
    except AddressValueError:
        return False
    # 1.2.3.4 is a version, a section, or one of the well-known servers; nobody's own.
    if max(address.packed) < 10 or _VERSION.search(match.string, max(0, match.start() - 12), match.start()):
        return False
    return address.is_global or not public_only


def _is_ipv6(match: re.Match[str], public_only: bool) -> bool:
    try:
        address = IPv6Address(match[0])
    except AddressValueError:
        return False
    # Global unicast is 2000::/3 (RFC 4291); anything else that parses is more likely a::b in a program.
    if int(address) >> 125 == 1:
        return address.is_global or not public_only
    return not public_only and (address.is_loopback or address.is_link_local or int(address) >> 121 == 0b1111110)
