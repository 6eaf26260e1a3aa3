"""Native drawing of tokens: what each draw asks, handed over in one call per step.

The rules, and the same draws by tensors, are in `gemel.engine.sample`; this is the binding's safe side.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from gemel.ops.cpu import native

DRAWN = np.dtype([("token", "i4"), ("logprob", "f4")])


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


class Sampler:
    """Draws from rows of `vocab_size` logits, with the threads of a team that `owner` keeps alive."""

    def __init__(self, library: ctypes.CDLL, team: int, vocab_size: int, owner: object):
        self._library, self._owner = library, owner
        self._handle = library.gemel_sampler_new(team, vocab_size)
        weakref.finalize(self, library.gemel_sampler_free, self._handle)

    def run(
        self, logits_SV: npt.NDArray[np.float32], draws: Sequence[native.Draw], most: int
    ) -> tuple[npt.NDArray[np.void], npt.NDArray[np.void]]:
        """Draw R tokens from finite rows, of which none is changed.

        Returns `DRAWN`s: [R] those that were drawn, token -1 where none could be; and [R, most] the likeliest, best first, of which a draw
        has as many as its `logprobs`.
        """
        asked = (native.Draw * len(draws))(*draws)
        drawn, likeliest = np.empty(len(draws), DRAWN), np.empty((len(draws), most), DRAWN)
        self._library.gemel_sampler_run(
            self._handle, logits_SV.ctypes.data, len(draws), asked, drawn.ctypes.data, most, likeliest.ctypes.data
        )
        return drawn, likeliest
