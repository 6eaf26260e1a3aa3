"""From token ids to text, one step at a time.

A token is a run of bytes (`Tokenizer.token_bytes`), not of characters: one emoji may be spread over four tokens. So
text is made by joining bytes and decoding UTF-8 incrementally, which holds back the bytes of an unfinished character,
costs O(1) per token however long the sequence is, and gives by construction what decoding the whole gives. (The usual
way, decoding a window of ids twice per token and comparing, takes twice as long, and its window grows with every run of
invalid bytes.)
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable, Sequence

_new_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Text of one growing sequence.

    `push` never returns half a character: bytes that are no UTF-8 become U+FFFD as soon as that is certain, those of an
    unfinished character at `finish`. `skip` holds ids that have no text. So many leading spaces as `strip` says are dropped
    (SentencePiece writes one before the first word).
    """

    __slots__ = ("_bytes_of", "_decoder", "_skip", "_strip")

    def __init__(self, bytes_of: Sequence[bytes], skip: Collection[int] = (), strip: int = 0):
        self._bytes_of = bytes_of
        self._skip = skip
        self._strip = strip
        self._decoder = _new_decoder("replace")

    def push(self, tokens: Iterable[int]) -> str:
        """The text that `tokens` complete. Ids beyond the vocabulary (padding rows of the embedding) have no text."""
        bytes_of, skip = self._bytes_of, self._skip
        text = self._decoder.decode(b"".join([bytes_of[token] for token in tokens if token not in skip and token < len(bytes_of)]))
        return self._stripped(text) if self._strip else text

    def finish(self) -> str:
        """What is left: U+FFFD for an unfinished character, else nothing."""
        return self._decoder.decode(b"", final=True)

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text, self._strip = text[1:], self._strip - 1
        return text
