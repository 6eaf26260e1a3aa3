"""From the engine's tokens to text that callers see: detokenizing, stop strings, and the `Delta` that both front ends
deliver.

Stop strings are found character by character with one Knuth-Morris-Pratt automaton each, so the result depends on the
text alone, not on how tokens or steps cut it: the stop string that is complete first in reading order ends the text
before its own beginning. An automaton's state is also the number of characters at the end that may still become its
stop string; so many are held back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gemel.config.sampling import SamplingParams
from gemel.engine.request import FinishReason, Output, TokenLogprob
from gemel.tokenizer.stream import Detokenizer
from gemel.tokenizer.tokenizer import Tokenizer


@dataclass(slots=True)  # frozen would take ten times as long to make, once per token
class Delta:
    """What one step added to one output of a request. The last one of an output has a `finish_reason`.

    `text` may lag behind `tokens`: half characters and what may be the beginning of a stop string wait. `stop_reason` is the stop string
    or the id of the stop token that ended the output. `num_prompt` and `num_output` count tokens, the latter so far; `cached_tokens` of the
    prompt came from the prefix cache. `error` says what went wrong when `finish_reason` is ERROR.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    num_prompt: int
    num_output: int
    cached_tokens: int
    error: str | None = None
    cumulative_logprob: float | None = None


class _StopAutomaton:
    """How much of the end of the text so far is a beginning of `stop` (Knuth, Morris and Pratt 1977)."""

    __slots__ = ("_fallback", "matched", "stop")

    def __init__(self, stop: str):
        self.stop = stop
        self.matched = 0
        self._fallback = [0] * (len(stop) + 1)
        length = 0
        for index in range(1, len(stop)):
            while length and stop[index] != stop[length]:
                length = self._fallback[length]
            length += stop[index] == stop[length]
            self._fallback[index + 1] = length

    @property
    def pending(self) -> int:
        """Characters at the end of the text that may still become the stop string; a complete one counts with its own repetition only."""
        return self._fallback[self.matched] if self.matched == len(self.stop) else self.matched

    def step(self, character: str) -> bool:
        """Read one character; True when the stop string is complete."""
        self.matched = self.pending
        while self.matched and self.stop[self.matched] != character:
            self.matched = self._fallback[self.matched]
        self.matched += self.stop[self.matched] == character
        return self.matched == len(self.stop)


class TextStream:
    """Text of one output, cut at the first stop string.

    A stop string that is complete before `min_tokens` tokens does not count. Of two that are complete at the same
    character the longer one wins. After the end (`stop` is not None) no more tokens are taken.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = (), min_tokens: int = 0):
        self._detokenizer = detokenizer
        self._automata = [_StopAutomaton(text) for text in sorted(stop, key=len, reverse=True)]
        self._first_characters = frozenset(text[0] for text in stop)
        self._min_tokens = min_tokens
        self._held = ""
        self.stop: str | None = None
        self.num_tokens = 0

    def push(self, tokens: Sequence[int]) -> str:
        """The text that is certain after `tokens`. `num_tokens` tells how many were taken in all."""
        if not self._automata:
            self.num_tokens += len(tokens)
            return self._detokenizer.push(tokens)
        return "".join(self._push_one(token) for token in tokens if self.stop is None)

    def finish(self) -> str:
        """The rest, when the output has ended for another reason than a stop string."""
        if self.stop is not None:
            return ""
        text = self._read(self._detokenizer.finish())
        rest, self._held = self._held, ""
        return text + rest

    def _push_one(self, token: int) -> str:
        self.num_tokens += 1
        return self._read(self._detokenizer.push((token,)))

    def _read(self, new: str) -> str:
        """Append `new`; the text that can be given out now."""
        if not self._held and self._first_characters.isdisjoint(new):
            return new  # no stop string is going on and none begins: nearly always
        for position, character in enumerate(new):
            complete = [automaton.stop for automaton in self._automata if automaton.step(character)]
            if complete and self.num_tokens >= self._min_tokens:
                self.stop = complete[0]
                text = self._held + new[: position + 1]
                self._held = ""
                return text[: len(text) - len(self.stop)]
        text = self._held + new
        sure = len(text) - max((automaton.pending for automaton in self._automata), default=0)
        self._held = text[sure:]
        return text[:sure]


class RequestText:
    """All outputs of one request: turns what the engine says into deltas."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, num_prompt: int):
        self.num_prompt = num_prompt
        self._streams = [TextStream(tokenizer.detokenizer(), params.stop, params.min_tokens) for _ in range(params.n)]
        self._open = dict.fromkeys(range(params.n), False)  # index -> whether the engine has mentioned it

    @property
    def is_open(self) -> bool:
        """True while an output has not ended."""
        return bool(self._open)

    def take(self, output: Output) -> Delta | None:
        """The delta of `output`; None if that output has already ended.

        When the delta has a finish reason that `output` has not, a stop string ended it, and the engine has to be told (`Engine.stop`).
        """
        if output.index not in self._open:
            return None
        self._open[output.index] = True
        stream = self._streams[output.index]
        num_before = stream.num_tokens
        text = stream.push(output.tokens)
        if stream.stop is None and output.finish_reason is not None:
            text += stream.finish()
        num_taken = stream.num_tokens - num_before
        reason = output.finish_reason if stream.stop is None else FinishReason.STOP
        if reason is not None:
            del self._open[output.index]
        return Delta(
            output.index,
            text,
            output.tokens[:num_taken],
            output.logprobs[:num_taken],
            reason,
            output.stop_token if stream.stop is None else stream.stop,
            self.num_prompt,
            stream.num_tokens,
            output.cached_tokens,
            output.error,
            output.cumulative_logprob,
        )

    def end(self, reason: FinishReason, error: str | None = None, unmentioned: bool = False) -> list[Delta]:
        """Last deltas, with the text that was held back, of all outputs that are open, or of those that the engine never mentioned."""
        ended = [index for index, mentioned in self._open.items() if not (unmentioned and mentioned)]
        deltas = []
        for index in ended:
            del self._open[index]
            stream = self._streams[index]
            deltas.append(Delta(index, stream.finish(), (), (), reason, None, self.num_prompt, stream.num_tokens, 0, error))
        return deltas
