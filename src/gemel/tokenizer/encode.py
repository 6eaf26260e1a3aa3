"""Encoding much text: many texts at once, as arrays, by the fastest library that is proven to agree with the reference.

`tokenizers` defines what a tokenizer.json means, and is slow. fastokens does the same work 10 to 40 times as fast, but it is another
implementation: of regular expressions, of Unicode, of all the switches in that file. So it is used only after it gave the same ids as the
reference here and now, with this tokenizer, on texts chosen to be awkward and on samples of the caller's own. If it cannot load the
tokenizer or differs in one id, the reference does the work, and `reason` says why.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers

from gemel.config.errors import RequestError, UnsupportedError
from gemel.tokenizer.tokenizer import Tokenizer

Ids = npt.NDArray[np.uint32]
Library = Literal["auto", "fastokens", "tokenizers"]

SAMPLE_CHARS = 2_000
MAX_SAMPLES = 1_000  # of the caller's texts; 2 MB at most, which the reference encodes in less than a second

_AWKWARD = (
    "",
    " ",
    "\n\n \t\r\n  \u3000\u00a0 x  ",
    "don't I'LL we'Ve 'tis ''s",
    "1 12 123 1234 12345 ３４５ Ⅻ ½ ٣٤",
    "Straße NAÏVE cafe\u0301 café ǅ ﬁ İstanbul ı K",
    "我们今天学习自然语言处理。你好，世界！「引号」……",
    "ひらがなとカタカナ 한국어 ไทย हिन्दी עברית العربية",
    "👩‍👩‍👧‍👦 🇨🇳 ☃️ \U0001f9d1\U0001f3fd\u200d\U0001f680",
    "\x00\x01\x1b[0m\x7f\u0085\u2028\u2029\ufeff\ufffd\ue000",
    "a\U0010ffff\U000f0000b\U00020000",
    "def f(x):\n\treturn {'a': [1, 2.5e-3], \"b\": x ** 2 != 0}  # ok\n\n\n",
    "https://example.org/a?b=c&d=%20#e <p class='x'>&amp;</p>",
    "a" * 300 + "!" * 300 + "字" * 300 + " " * 300 + "0" * 300,
)


class Encoder:
    """Encodes batches of texts with one tokenizer. `library` is what does it, `reason` why.

    Ids are those of `Tokenizer.encode(text, add_bos=False)`: no text becomes a special token.
    """

    def __init__(self, tokenizer: Tokenizer, samples: Sequence[str] = (), library: Library = "auto"):
        self._tokenizer = tokenizer
        self._is_special = np.zeros(len(tokenizer.bytes_of), dtype=bool)
        self._is_special[list(tokenizer.special_ids)] = True
        self._backend: _Backend = _Reference(tokenizer.library)
        self.library: str = "tokenizers"
        if library == "tokenizers":
            self.reason = "asked for"
            return
        try:
            fast = _Fast(tokenizer.library, self._backend)
            self.reason = _agreement(fast, self._backend, probes(tokenizer, samples))
        except (_Disagreement, UnsupportedError) as why:
            if library == "fastokens":
                raise UnsupportedError(f"library = 'fastokens': {why}; take 'auto', which uses tokenizers then") from None
            self.reason = str(why)
            return
        self._backend, self.library = fast, "fastokens"

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        """One array of ids per text, views into one buffer. Raises RequestError for a text that is not valid Unicode."""
        try:
            ids, ends = self._backend.encode(texts)
        except (UnicodeEncodeError, TypeError):  # how the two libraries refuse surrogates
            ids, ends = self._backend.encode([_checked(text, index) for index, text in enumerate(texts)])
        arrays = np.split(ids, ends[:-1]) if texts else []
        if self._is_special[ids].any():  # a vocabulary that holds a special token as a word, too; the careful way avoids it
            return [self._careful(text) if self._is_special[array].any() else array for text, array in zip(texts, arrays, strict=True)]
        return arrays

    def _careful(self, text: str) -> Ids:
        return np.array(self._tokenizer.encode(text, add_bos=False), dtype=np.uint32)


def probes(tokenizer: Tokenizer, samples: Sequence[str] = ()) -> list[str]:
    """Texts on which two encoders are compared: awkward ones, random ones of every script, special tokens, and pieces of `samples`."""
    draw = random.Random(0)
    pieces = [sample[start : start + SAMPLE_CHARS] for sample in samples for start in range(0, len(sample), SAMPLE_CHARS)]
    if len(pieces) > MAX_SAMPLES:
        pieces = draw.sample(pieces, MAX_SAMPLES)
    planes = (
        range(0x20, 0x7F),
        range(0xA0, 0x250),
        range(0x370, 0x600),
        range(0x4E00, 0x9FA6),
        range(0x20, 0xD800),
        range(0x1F300, 0x1FB00),
    )
    noise = ["".join(chr(draw.choice(draw.choice(planes[: 1 + n % 6]))) for _ in range(n % 97)) for n in range(300)]
    token_texts = [token.decode(errors="replace") for token in draw.sample(tokenizer.bytes_of, min(2_000, len(tokenizer.bytes_of)))]
    words = ["".join(draw.sample(token_texts, min(len(token_texts), 20))) for _ in range(100)]
    specials = [text for token in tokenizer.special_ids if (text := tokenizer.library.id_to_token(token))]
    return [*_AWKWARD, *noise, *words, *(f"a{text} {text}b" for text in specials[:200]), *pieces]


class _Backend(Protocol):
    def encode(self, texts: Sequence[str]) -> tuple[Ids, npt.NDArray[np.int64]]:
        """All ids one after the other, and where each text's end."""


class _Reference:
    def __init__(self, library: tokenizers.Tokenizer):
        self._library = library

    def encode(self, texts: Sequence[str]) -> tuple[Ids, npt.NDArray[np.int64]]:
        lists = [encoding.ids for encoding in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]
        ends = np.cumsum([len(ids) for ids in lists], dtype=np.int64)
        ids = np.fromiter((token for ids in lists for token in ids), dtype=np.uint32, count=int(ends[-1]) if lists else 0)
        return ids, ends


class _Fast:
    """fastokens. It refuses texts with bytes that a vocabulary lacks, where the reference leaves them out; `reference` gets these texts."""

    def __init__(self, library: tokenizers.Tokenizer, reference: _Backend):
        self._reference = reference
        try:
            import fastokens
        except ImportError:
            raise UnsupportedError("fastokens is not installed: pip install 'gemel[data]'") from None
        try:
            self._library = fastokens.Tokenizer.from_json_str(json.dumps(_one_split(json.loads(library.to_str()))))
        except Exception as error:  # the library raises what it likes
            raise UnsupportedError(f"fastokens cannot load this tokenizer: {error}") from None

    def encode(self, texts: Sequence[str]) -> tuple[Ids, npt.NDArray[np.int64]]:
        try:
            ids, offsets = self._library.encode_batch_flat(list(texts), add_special_tokens=False, split_special_tokens=True)
        except UnicodeEncodeError:
            raise
        except ValueError:
            if len(texts) == 1:
                return self._reference.encode(texts)
            halves = [self.encode(half) for half in (texts[: len(texts) // 2], texts[len(texts) // 2 :])]
            (first, ends), (second, later) = halves
            return np.concatenate([first, second]), np.concatenate([ends, later + len(first)])
        return np.frombuffer(ids, dtype="<u4"), np.frombuffer(offsets, dtype="<u8")[1:].astype(np.int64)


# GPT-2's split where digits were cut off before, one by one: white space then ends in front of a digit as it does at the end of a text.
_GPT2_DIGITS_APART = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_DIGITS_THEN_GPT2 = ({"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True})


def _one_split(state: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer, cut by one regular expression where it is cut in two steps: fastokens is five times as fast with one.

    Known are single digits, then GPT-2's split, as in SmolLM2 and StarCoder.
    """
    steps = (state["pre_tokenizer"] or {}).get("pretokenizers", [])
    if [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps] != list(_DIGITS_THEN_GPT2):
        return state
    split = {"type": "Split", "pattern": {"Regex": _GPT2_DIGITS_APART}, "behavior": "Isolated", "invert": False}
    return state | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, steps[1] | {"use_regex": False}]}}


class _Disagreement(Exception):
    """The two encoders differ, and on what."""


def _agreement(fast: _Backend, reference: _Backend, texts: Sequence[str]) -> str:
    """Why `fast` can be trusted, or _Disagreement."""
    try:
        got_ids, got_ends = fast.encode(texts)
    except Exception as error:
        raise _Disagreement(f"fastokens fails on a text: {error}") from None
    ids, ends = reference.encode(texts)
    starts = zip([0, *got_ends], got_ends, [0, *ends], ends, strict=False)
    for text, (got_start, got_end, start, end) in zip(texts, starts, strict=True):
        if not np.array_equal(got_ids[got_start:got_end], ids[start:end]):
            raise _Disagreement(f"fastokens differs from tokenizers on {json.dumps(text[:60], ensure_ascii=False)}")
    return f"fastokens gave the ids of tokenizers on {len(texts)} texts ({len(ids)} tokens)"


def _checked(text: str, index: int) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = f"U+{ord(text[error.start]):04X}"
        raise RequestError(f"text {index} has an unpaired surrogate ({surrogate}) at character {error.start}; send valid Unicode") from None
    return text
