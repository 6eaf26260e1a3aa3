"""Native drawing of tokens: what each draw asks, handed over in one call per step.

The rules, and the same draws by tensors, are in `gemel.engine.sample`; this is the binding's safe side.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gemel.ops.cpu import native


class Marked:
    """Tokens whose logits a request changes, each once: those with a bias, and those that occurred, with how often they came in the output.

    Sequences only grow, so a step counts what is new. `start`: tokens before that place of the sequence do not count.
    """

    __slots__ = ("_bias", "_counts", "_followed", "_place", "_tokens")

    def __init__(self, biases: Mapping[int, float], start: int):
        self._tokens, self._bias = array("i", biases), array("f", biases.values())
        self._counts = array("i", [-1]) * len(biases)
        self._place = {token: place for place, token in enumerate(biases)}
        self._followed = start

    def follow(self, tokens: Sequence[int], num_prompt: int) -> None:
        """Count what has been added to a sequence, of which the first `num_prompt` tokens are not output."""
        for i in range(self._followed, len(tokens)):
            place = self._place.setdefault(tokens[i], len(self._tokens))
            if place == len(self._tokens):
                self._tokens.append(tokens[i])
                self._bias.append(0.0)
                self._counts.append(-1)
            self._counts[place] = max(0, self._counts[place]) + (i >= num_prompt)
        self._followed = len(tokens)

    def put(self, draw: native.Draw) -> None:
        """Point a draw at the marks; they may move when more tokens are followed."""
        draw.marked, draw.num_marked = self._tokens.buffer_info()
        draw.counts, draw.bias = self._counts.buffer_info()[0], self._bias.buffer_info()[0]


class Drawn(NamedTuple):
    """A token, or -1 where none could be drawn, and what was asked about it: log-probabilities of it and of the likeliest, best first."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


class Sampler:
    """Draws from rows of `vocab_size` logits, with the threads of a team that `owner` keeps alive."""

    def __init__(self, library: ctypes.CDLL, team: int, vocab_size: int, owner: object):
        self._library, self._owner = library, owner
        self._handle = library.gemel_sampler_new(team, vocab_size)
        weakref.finalize(self, library.gemel_sampler_free, self._handle)

    def run(self, logits: int, draws: Sequence[native.Draw]) -> list[Drawn]:
        """One token per draw, from finite fp32 logits at this address, of which none is changed.

        Plain arrays of ctypes, because what comes before and after the call is a good part of it when there is one row: the step has just
        emptied the caches of everything else.
        """
        size = len(draws)
        most = max(0, *(draw.logprobs for draw in draws))
        tokens, logprobs = (ctypes.c_int32 * size)(), (ctypes.c_float * size)()
        likeliest, numbers = (ctypes.c_int32 * (size * most))(), (ctypes.c_float * (size * most))()
        self._library.gemel_sampler_run(
            self._handle, logits, size, (native.Draw * size)(*draws), tokens, logprobs, most, likeliest, numbers
        )
        out = []
        for i, draw in enumerate(draws):
            first, last = i * most, i * most + max(0, draw.logprobs)
            out.append(Drawn(tokens[i], logprobs[i], tuple(zip(likeliest[first:last], numbers[first:last], strict=True))))
        return out
