"""Beam search over sequences that share blocks.

The beams of a request advance in lockstep: each step yields, for every beam, the likeliest continuations; the best
`width` of all of them become the next beams. A beam that continues in several ways is forked, which shares its
blocks; a beam that does not continue is dropped. Beams may be computed in different steps (a token budget, a
preemption), so their candidates are kept until all are there.

A hypothesis that ends is scored log-probability / length ** length_penalty, the end token included in both. The
search ends when `width` hypotheses have ended and no beam that still runs could beat the worst of them at its present
length, which is the rule of the reference implementation in `transformers` (early_stopping=False).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemel.config.sampling import SamplingParams
from gemel.engine.request import FinishReason, Sequence

Candidates = list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished output: its tokens without the one that ended it."""

    tokens: tuple[int, ...]
    logprob: float
    score: float
    finish_reason: FinishReason
    stop_token: int | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """`parent` goes on with `token`, its log-probability so far becoming `logprob`."""

    parent: Sequence
    token: int
    logprob: float


@dataclass(slots=True)
class BeamSearch:
    """The state of one request's search."""

    params: SamplingParams
    end_tokens: tuple[int, ...]
    max_output: int
    beams: list[Sequence]
    candidates: dict[Sequence, Candidates] = field(default_factory=dict)
    finished: list[Hypothesis] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Beams kept, and hypotheses sought."""
        return self.params.beam_width or 1

    def offer(self, beam: Sequence, candidates: Candidates) -> bool:
        """Take a beam's continuations, best first; True when every beam has given its own."""
        self.candidates[beam] = candidates
        return all(b in self.candidates for b in self.beams)

    def advance(self) -> list[Move]:
        """Choose the next beams. An empty list means that the search is over."""
        ranked = sorted(
            (Move(beam, token, beam.cumulative_logprob + logprob) for beam in self.beams for token, logprob in self.candidates[beam]),
            key=lambda move: -move.logprob,
        )[: 2 * self.width]
        self.candidates.clear()
        length = self.beams[0].num_output + 1
        moves: list[Move] = []
        for rank, move in enumerate(ranked):
            if move.token in self.end_tokens:
                if rank < self.width:
                    self._end(move, length, FinishReason.STOP)
            elif len(moves) < self.width:
                moves.append(move)
        if length >= self.max_output:
            for move in moves:
                self._end(move, length, FinishReason.LENGTH)
            return []
        if len(self.finished) == self.width and moves and self._score(moves[0].logprob, length) <= self.finished[-1].score:
            return []
        return moves

    def best(self) -> list[Hypothesis]:
        """The n best hypotheses, best first."""
        return self.finished[: self.params.n]

    def _end(self, move: Move, length: int, reason: FinishReason) -> None:
        stopped = reason is FinishReason.STOP
        tokens = (*move.parent.output, *(() if stopped else (move.token,)))
        score = self._score(move.logprob, length)
        self.finished.append(Hypothesis(tokens, move.logprob, score, reason, move.token if stopped else None))
        self.finished.sort(key=lambda h: -h.score)
        del self.finished[self.width :]

    def _score(self, logprob: float, length: int) -> float:
        return logprob / float(length**self.params.length_penalty)


def continuations(logits_RV: Tensor, width: int) -> list[Candidates]:
    """Of each of R beams, the 2 * width likeliest next tokens and their log-probabilities: enough for `width` that go
    on after `width` that end.

    A row that is not finite yields none. `logits_RV` are fp32, after bias, penalties and bans.
    """
    values, ids = torch.log_softmax(logits_RV, -1).topk(min(2 * width, logits_RV.shape[-1]), dim=-1)
    finite = torch.isfinite(logits_RV.amax(-1)).tolist()
    rows = zip(finite, ids.tolist(), values.tolist(), strict=True)
    return [list(zip(row_ids, row_values, strict=True)) if ok else [] for ok, row_ids, row_values in rows]
