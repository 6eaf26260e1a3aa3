"""A request, its sequences, and what the engine says about them. Token ids only: no text, no torch.

A `Request` is what a caller adds. It becomes one or more `Sequence`s (`n` samples, or beams), the unit that the scheduler advances. A
sequence has one notion of progress: `num_computed` tokens have their keys and values in the cache, and every step moves that number towards
`len(tokens)`. Prefill, chunked prefill, a cache hit, decoding and recomputation after preemption are all that same movement.

    0 <= num_computed < len(tokens)      while the sequence lives: the last token is always still to be computed

What is made anew for every step or token (`Scheduled`, `Output`, `TokenLogprob`, `EngineStats`) is a named tuple or a plain dataclass: a
frozen one takes ten times as long to make. Nobody changes them all the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from gemel.config.sampling import SamplingParams


class Status(StrEnum):
    """Where a sequence is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(StrEnum):
    """Why a sequence ended. ABORT and ERROR never carry a complete answer."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Request:
    """One call: prompt token ids and how to continue them.

    `priority`: smaller runs first and is preempted last. `salt` keeps this request's cached blocks apart from those of other salts.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    salt: str = ""


@dataclass(eq=False, slots=True)
class Sequence:
    """One line of tokens that grows. The scheduler owns `status`, `num_computed` and `blocks`; nobody else writes them.

    `index` tells the n outputs of a request apart. `arrival` orders requests of equal priority (a counter, not a clock).
    `max_total` is the length at which the sequence must end, prompt and output together.
    `cached_tokens` is how many prompt tokens came from the prefix cache when it was first admitted.
    """

    request: Request
    index: int
    arrival: int
    tokens: list[int]
    max_total: int
    status: Status = Status.WAITING
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    num_preemptions: int = 0
    cumulative_logprob: float = 0.0

    @property
    def num_prompt(self) -> int:
        """Tokens that the caller gave."""
        return len(self.request.prompt)

    @property
    def num_output(self) -> int:
        """Tokens that were generated."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def output(self) -> list[int]:
        """The generated tokens."""
        return self.tokens[self.num_prompt :]

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts the most urgent first."""
        return (self.request.priority, self.arrival, self.index)


class Scheduled(NamedTuple):
    """A sequence's share of one step: compute `num_new` tokens from position `start` on.

    When `start + num_new` reaches the end of the tokens, the step yields logits for the next one (`samples`).
    """

    sequence: Sequence
    start: int
    num_new: int
    samples: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step does, decided without touching a tensor. `copies` are (from, to) block ids, to be copied before the step runs."""

    work: tuple[Scheduled, ...]
    copies: tuple[tuple[int, int], ...]
    preempted: tuple[Sequence, ...]

    @property
    def num_tokens(self) -> int:
        """Length of the flat run of tokens."""
        return sum(item.num_new for item in self.work)


def flatten(work: Iterable[Scheduled]) -> tuple[list[int], list[int], list[int]]:
    """The flat run of a step: its tokens, their positions, and the rows that sample."""
    tokens: list[int] = []
    positions: list[int] = []
    sampled: list[int] = []
    for item in work:
        end = item.start + item.num_new
        tokens += item.sequence.tokens[item.start : end]
        positions += range(item.start, end)
        if item.samples:
            sampled.append(len(tokens) - 1)
    return tokens, positions, sampled


class TokenLogprob(NamedTuple):
    """Log-probability of the chosen token under the model, and of the likeliest ones as (token, logprob), best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Output:
    """What a step added to one sequence of a request. The last one of a sequence has a `finish_reason`.

    `index` is the number of the output within the request (for beams: its rank). `stop_token` is the token that ended it, if one did; it is
    not among `tokens`. `num_output` counts all tokens of the output so far. `cached_tokens` of the prompt came from the prefix cache.
    `cumulative_logprob` is None unless log-probabilities or beams were asked for. `error` says what went wrong when `finish_reason` is
    ERROR.
    """

    request_id: str
    index: int
    tokens: tuple[int, ...]
    num_output: int
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    cached_tokens: int = 0
    cumulative_logprob: float | None = None
    error: str | None = None


@dataclass(slots=True)
class EngineStats:
    """A snapshot for metrics and the live panel. Counters only grow; gauges are marked.

    `prefix_misses` counts prompt tokens that had to be computed, by reason: "cold" (no such prefix was ever cached),
    "evicted" (it was, and had to make room), "partial" (the tail that does not fill a block, or the last token, which
    is always computed), "off" (the cache is disabled).
    """

    waiting: int  # gauge: sequences
    running: int  # gauge: sequences
    blocks_total: int
    blocks_used: int  # gauge: referenced by a sequence
    blocks_cached: int  # gauge: unreferenced but reusable
    steps: int
    prompt_tokens: int
    output_tokens: int
    prefix_hit_tokens: int
    prefix_misses: dict[str, int]
    preemptions: int
    finished: dict[str, int]
