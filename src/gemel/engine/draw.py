"""What the native sampler is asked of one sequence, again and again: set once, and what changes from token to token."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq

from gemel.engine.request import Sequence
from gemel.ops.cpu import native
from gemel.ops.cpu.sampler import Marked


class Draws:
    """The draws of one sequence. `end_tokens` are impossible while it is too short to end."""

    def __init__(self, sequence: Sequence, seed: int, end_tokens: Seq[int]):
        params = sequence.request.params
        self._sequence, self._end_tokens = sequence, array("i", end_tokens)
        repeats = params.repetition_penalty != 1.0
        self._counts = repeats or bool(params.presence_penalty or params.frequency_penalty)
        # Only repetition looks at the prompt.
        self._marked = Marked(params.logit_bias, 0 if repeats else sequence.num_prompt) if self._counts or params.logit_bias else None
        self._draw = native.Draw(
            temperature=params.temperature,
            top_k=min(params.top_k, 2**31 - 1),
            logprobs=-1 if params.logprobs is None else params.logprobs,
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=seed % 2**64,
            stream=sequence.index,
            banned=self._end_tokens.buffer_info()[0],
        )

    def next(self, row: int, likeliest: int, largest: float) -> native.Draw:
        """The draw of the next token from a row of logits with this `largest`; the next call changes it."""
        sequence, draw = self._sequence, self._draw
        draw.row, draw.likeliest, draw.largest, draw.counter = row, likeliest, largest, sequence.num_output
        draw.num_banned = len(self._end_tokens) if sequence.num_output < sequence.request.params.min_tokens else 0
        if self._marked is not None:
            if self._counts:
                self._marked.follow(sequence.tokens, sequence.num_prompt)
            self._marked.put(draw)
        return draw
