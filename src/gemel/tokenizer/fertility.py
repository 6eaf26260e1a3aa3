"""How much a tokenizer says with one token, language by language.

A language that needs more tokens for the same text costs more to train on and to serve, and fills the context sooner. "Fertility" is tokens
per word (Rust et al. 2021, arXiv 2012.15613). Words are counted where a language separates them; of scripts that do not, every character
counts as one, so that their figure is tokens per character. Languages can be compared with each other by texts that say the same in all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from gemel.tokenizer.encode import Encoder
from gemel.tokenizer.tokenizer import Tokenizer

BATCH_CHARS = 2**20

# Thai to Khmer, kana, Han with their extensions: scripts that put no space between words
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_SAYS_SOMETHING = re.compile(r"\w")


@dataclass(frozen=True, slots=True)
class Fertility:
    """Counts over the texts of one language. `num_fallback` counts tokens that are less than a character, or unknown."""

    language: str
    num_texts: int = 0
    num_chars: int = 0
    num_bytes: int = 0
    num_words: int = 0
    num_tokens: int = 0
    num_fallback: int = 0

    @property
    def tokens_per_word(self) -> float:
        """Fertility proper."""
        return self.num_tokens / max(self.num_words, 1)

    @property
    def chars_per_token(self) -> float:
        """Characters that a token stands for."""
        return self.num_chars / max(self.num_tokens, 1)

    @property
    def bytes_per_token(self) -> float:
        """Compression ratio: bytes of UTF-8 that a token stands for."""
        return self.num_bytes / max(self.num_tokens, 1)

    @property
    def fallback_share(self) -> float:
        """Of all tokens, those that are less than a character, or unknown."""
        return self.num_fallback / max(self.num_tokens, 1)

    def as_json(self) -> dict[str, str | int | float]:
        """Counts and ratios as plain data."""
        counts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        ratios = ("tokens_per_word", "words_per_token", "chars_per_token", "bytes_per_token", "fallback_share")
        return counts | {name: round(getattr(self, name), 4) for name in ratios}

    @property
    def words_per_token(self) -> float:
        """Words that a token stands for."""
        return self.num_words / max(self.num_tokens, 1)


def measure(language: str, texts: Iterable[str], tokenizer: Tokenizer, encoder: Encoder) -> Fertility:
    """Encode all `texts` and count. `encoder` must be of `tokenizer`."""
    falls_back = _fallbacks(tokenizer)
    sums = np.zeros(len(Fertility.__dataclass_fields__) - 1, dtype=np.int64)
    for batch in _batches(texts):
        ids = encoder(batch)
        chars, utf8, words = sum(map(len, batch)), sum(len(text.encode()) for text in batch), sum(map(num_words, batch))
        fallback = sum(int(falls_back[array].sum()) for array in ids)
        sums += (len(batch), chars, utf8, words, sum(map(len, ids)), fallback)
    return Fertility(language, *sums.tolist())


def num_words(text: str) -> int:
    """Runs between white space that hold a letter or a digit; a character of a script without spaces is a word of its own."""
    rest, alone = _UNSPACED.subn(" ", text)
    return alone + sum(_SAYS_SOMETHING.search(run) is not None for run in rest.split())


def _fallbacks(tokenizer: Tokenizer) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """For every id, whether it is part of a character, or says that something is unknown."""
    table = np.zeros(len(tokenizer.bytes_of), dtype=np.bool_)
    for index, token in enumerate(tokenizer.bytes_of):
        try:
            token.decode()
        except UnicodeDecodeError:
            table[index] = True
    unknown = getattr(tokenizer.library.model, "unk_token", None)
    if unknown is not None and (unknown_id := tokenizer.token_id(unknown)) is not None:
        table[unknown_id] = True
    return table


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_chars = 0
    for text in texts:
        batch.append(text)
        num_chars += len(text)
        if num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
