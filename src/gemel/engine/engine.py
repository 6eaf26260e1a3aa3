"""The engine: requests in, tokens out, one `step` at a time.

    plan = scheduler.schedule()        which sequences advance by how much; no tensors
    logits = runner.run(plan)          one flat run through the model
    outputs = advance(plan, logits)    choose tokens, fork, finish

It knows token ids only. It is not thread-safe: one thread calls everything but `stats` (`gemel.llm.online` owns such a thread).
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from gemel.config.engine import EngineConfig
from gemel.config.errors import RequestError
from gemel.engine import lower, place
from gemel.engine.beam import BeamSearch, Move, continuations
from gemel.engine.blocks import BlockPool
from gemel.engine.logits import Logits
from gemel.engine.place import Derived
from gemel.engine.request import EngineStats, FinishReason, Output, Request, Sequence, StepPlan, TokenLogprob
from gemel.engine.runner import Runner
from gemel.engine.sample import Row, adjust, sample
from gemel.engine.schedule import Scheduler
from gemel.model.build import LoadedModel, load, peek


@dataclass(slots=True)
class _Job:
    """A request that is being worked on."""

    request: Request
    live: dict[int, Row]  # by index of the output
    unforked: int  # samples beyond the first that still wait for the prompt to be computed
    beam: BeamSearch | None = None


@dataclass(slots=True)
class _Counters:
    steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(map(str, FinishReason), 0))


class Engine:
    """Continuous batching over one model.

    `derived` lists the values that were worked out at start-up, with their reasons.
    """

    def __init__(self, loaded: LoadedModel, config: EngineConfig):
        self.config = config
        self.model_config = loaded.config
        self.max_context = min(config.max_context or loaded.config.max_positions, loaded.config.max_positions)
        self.vocab_size = loaded.config.vocab_size
        self.eos_token_ids = loaded.eos_token_ids
        self.runner = Runner(loaded, config, self.max_context)
        self.pool = BlockPool(self.runner.num_blocks, config.block_tokens, config.prefix_cache, config.cache_salt)
        self.scheduler = Scheduler(config, self.pool, self.max_context)
        self.derived: tuple[Derived, ...] = self.runner.derived
        self._jobs: dict[str, _Job] = {}
        self._arrivals = itertools.count()
        self._counters = _Counters()

    @classmethod
    def load(cls, path: str | Path, config: EngineConfig | None = None) -> Self:
        """Load a checkpoint (Hugging Face directory or GGUF file) and start an engine on it."""
        config = config or EngineConfig()
        found = peek(path)
        # Matrices of few bits have no type of their own; what is left beside them is small and loses nothing that matters in bf16.
        stored = torch.bfloat16 if found.low_bit else found.stored
        where = place.choose(config, stored, lambda device, dtype: lower.reason(found.config, config, device, dtype) is None)
        torch.set_num_threads(where.threads)
        loaded = load(
            path,
            dtype=where.dtype,
            device=str(where.device),
            max_context=config.max_context,
            weights=config.weights,
            group=config.weight_group or 32,
            activations=config.activations,
        )
        engine = cls(loaded, config)
        engine.derived = (*where.derived, *engine.derived)
        return engine

    @property
    def has_work(self) -> bool:
        """True while a step could do something."""
        return self.scheduler.has_work

    @property
    def num_steps(self) -> int:
        """Steps that ran so far; a step without work does not count."""
        return self._counters.steps

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError when it can never be served, CapacityError when the queue is full."""
        max_output = self._validate(request)
        params = request.params
        first = Sequence(request, 0, next(self._arrivals), list(request.prompt), len(request.prompt) + max_output)
        end_tokens = (*(() if params.ignore_eos else self.eos_token_ids), *params.stop_token_ids)
        row = Row(first, secrets.randbits(64) if params.seed is None else params.seed, end_tokens)
        job = _Job(request, {0: row}, params.n - 1)
        if params.beam_width is not None:
            job.unforked = 0
            job.beam = BeamSearch(params, end_tokens, max_output, [first])
        self.scheduler.add(first, time.monotonic())
        self._jobs[request.id] = job

    def abort(self, request_id: str) -> None:
        """End a request and free everything it holds. Unknown or finished ids are ignored: a client may cancel just
        as the last token comes.
        """
        if job := self._jobs.pop(request_id, None):
            for row in job.live.values():
                self.scheduler.abort(row.sequence)
            self._counters.finished[FinishReason.ABORT] += 1

    def stop(self, request_id: str, index: int) -> None:
        """End one output of a request as complete: its text has reached a stop string."""
        job = self._jobs.get(request_id)
        if job and (row := job.live.get(index)):
            self._retire(row.sequence, FinishReason.STOP)

    def step(self) -> list[Output]:
        """Advance every scheduled sequence; returns what was added to each. An error in a step ends the requests in it and no others."""
        plan = self.scheduler.schedule(time.monotonic())
        if not plan.work:
            return []
        self._counters.steps += 1
        try:
            logits = self.runner.run(plan)
        except Exception as error:
            return self._fail(plan, error)
        self.scheduler.commit(plan)
        self._counters.prompt_tokens += sum(
            min(num_new, sequence.num_prompt - start) for sequence, start, num_new, _ in plan.work if start < sequence.num_prompt
        )
        return self._advance([item.sequence for item in plan.work if item.samples], logits)

    def stats(self) -> EngineStats:
        """A snapshot of queue, memory and counters. Any thread may ask; amid a step, one number may be ahead of another."""
        pool, counters = self.pool, self._counters
        return EngineStats(
            waiting=len(self.scheduler.waiting),
            running=len(self.scheduler.running),
            blocks_total=pool.num_blocks,
            blocks_used=pool.num_used,
            blocks_cached=pool.num_cached,
            steps=counters.steps,
            prompt_tokens=counters.prompt_tokens,
            output_tokens=counters.output_tokens,
            prefix_hit_tokens=pool.prefix_hit_tokens,
            prefix_misses=dict(pool.prefix_misses),
            preemptions=self.scheduler.num_preemptions,
            finished=dict(counters.finished),
        )

    def check(self) -> None:
        """Assert the invariants of scheduler and blocks; when nothing is left to do, that nothing is held either."""
        self.scheduler.check()
        assert self._jobs or self.pool.num_used == 0, f"{self.pool.num_used} blocks are held by no request"

    # --- adding -----------------------------------------------------------------------------------------------------------------------

    def _validate(self, request: Request) -> int:
        """Check what depends on the model; the scheduler checks what depends on room. Returns the most output tokens."""
        params, prompt = request.params, request.prompt
        if request.id in self._jobs:
            raise RequestError(f"request id {request.id!r} is in use; choose another", "request_id")
        for name, ids in (("prompt", prompt), ("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for token in ids:
                if not 0 <= token < self.vocab_size:
                    raise RequestError(f"{name} has token id {token}; the vocabulary has ids 0 to {self.vocab_size - 1}", name)
        room = self.max_context - len(prompt)
        if params.max_tokens is not None and 1 <= room < params.max_tokens:
            raise RequestError(
                f"{len(prompt)} prompt tokens and max_tokens = {params.max_tokens} make {len(prompt) + params.max_tokens}; the context is "
                f"{self.max_context} tokens: lower max_tokens to at most {room}, or leave it out",
                "max_tokens",
            )
        return params.max_tokens or room

    # --- after the model --------------------------------------------------------------------------------------------------------------

    def _advance(self, sequences: Seq[Sequence], logits: Logits) -> list[Output]:
        rows: list[Row] = []
        at: list[int] = []  # rows of the logits
        beams: list[int] = []
        for i, sequence in enumerate(sequences):
            job = self._jobs[sequence.request.id]
            if job.beam is not None:
                beams.append(i)
                continue
            rows.append(job.live[sequence.index])
            at.append(i)
            if job.unforked:
                children = self._fork_samples(job, rows[-1])
                rows += children
                at += [i] * len(children)
        outputs = self._advance_beams([sequences[i] for i in beams], logits.values_SV[beams]) if beams else []
        for row, (token, logprob) in zip(rows, sample(logits, rows, at), strict=True):
            outputs.append(self._append(row, token, logprob))
        return outputs

    def _fork_samples(self, job: _Job, parent: Row) -> list[Row]:
        """The other samples of a request whose prompt has just been computed, on the same blocks."""
        children = [self._fork(job, parent, index) for index in range(1, 1 + job.unforked)]
        job.unforked = 0
        return children

    def _fork(self, job: _Job, row: Row, index: int) -> Row:
        parent = row.sequence
        child = Sequence(parent.request, index, parent.arrival, list(parent.tokens), parent.max_total)
        child.cached_tokens, child.cumulative_logprob = parent.cached_tokens, parent.cumulative_logprob
        self.scheduler.fork(parent, child)
        job.live[index] = Row(child, row.seed, row.end_tokens)
        return job.live[index]

    def _append(self, row: Row, token: int | None, logprob: TokenLogprob | None) -> Output:
        """Give a sequence its next token, and end it where it must end."""
        sequence = row.sequence
        reason, stop_token, error = None, None, None
        added: tuple[int, ...] = ()
        if token is None:
            reason, error = FinishReason.ERROR, "the model produced logits that are not finite"
        elif token in row.end_tokens:
            reason, stop_token = FinishReason.STOP, token
        else:
            sequence.tokens.append(token)
            added = (token,)
            self._counters.output_tokens += 1
            if len(sequence.tokens) >= sequence.max_total:
                reason = FinishReason.LENGTH
        if logprob is not None:
            sequence.cumulative_logprob += logprob.logprob
        if reason is not None:
            self._retire(sequence, reason)
        return Output(
            sequence.request.id,
            sequence.index,
            added,
            sequence.num_output,
            (logprob,) if logprob is not None and added else (),
            reason,
            stop_token,
            sequence.cached_tokens,
            None if sequence.request.params.logprobs is None else sequence.cumulative_logprob,
            error,
        )

    def _retire(self, sequence: Sequence, reason: FinishReason) -> None:
        job = self._jobs[sequence.request.id]
        self.scheduler.finish(sequence)
        del job.live[sequence.index]
        self._counters.finished[reason] += 1
        if not job.live:
            del self._jobs[job.request.id]

    def _fail(self, plan: StepPlan, error: Exception) -> list[Output]:
        """End every request that took part in a step that raised."""
        outputs = []
        message = f"the step failed: {type(error).__name__}: {error}"
        for request_id in dict.fromkeys(item.sequence.request.id for item in plan.work):
            job = self._jobs[request_id]
            for index, row in list(job.live.items()):
                outputs.append(Output(request_id, index, (), row.sequence.num_output, finish_reason=FinishReason.ERROR, error=message))
                self._retire(row.sequence, FinishReason.ERROR)
        return outputs

    # --- beams ------------------------------------------------------------------------------------------------------------------------

    def _advance_beams(self, sequences: Seq[Sequence], logits_RV: Tensor) -> list[Output]:
        jobs = [self._jobs[sequence.request.id] for sequence in sequences]
        adjust(logits_RV, [job.live[sequence.index] for sequence, job in zip(sequences, jobs, strict=True)])
        widest = max(job.beam.width for job in jobs if job.beam)
        outputs: list[Output] = []
        for sequence, job, candidates in zip(sequences, jobs, continuations(logits_RV, widest), strict=True):
            assert job.beam is not None
            if job.request.id not in self._jobs:
                continue
            if not candidates:
                outputs.append(self._end_search(job, FinishReason.ERROR, "the model produced logits that are not finite"))
            elif job.beam.offer(sequence, candidates[: 2 * job.beam.width]):
                moves = job.beam.advance()
                if moves:
                    self._move_beams(job, job.beam, moves)
                else:
                    outputs += self._best(job, job.beam)
        return outputs

    def _move_beams(self, job: _Job, beam: BeamSearch, moves: list[Move]) -> None:
        """Turn chosen continuations into sequences: the first of a parent is the parent itself, further ones are forks of it."""
        for sequence in beam.beams:
            if all(move.parent is not sequence for move in moves):
                self.scheduler.abort(sequence)
                del job.live[sequence.index]
        free = iter(sorted(set(range(beam.width)) - set(job.live)))
        taken: set[int] = set()
        beam.beams = []
        for move in moves:
            again = move.parent.index in taken
            taken.add(move.parent.index)
            beam.beams.append(self._fork(job, job.live[move.parent.index], next(free)).sequence if again else move.parent)
        for sequence, move in zip(beam.beams, moves, strict=True):
            sequence.tokens.append(move.token)
            sequence.cumulative_logprob = move.logprob
        self._counters.output_tokens += 1

    def _best(self, job: _Job, beam: BeamSearch) -> list[Output]:
        """Report the n best hypotheses and free all beams."""
        cached = beam.beams[0].cached_tokens
        outputs = [
            Output(job.request.id, rank, h.tokens, len(h.tokens), (), h.finish_reason, h.stop_token, cached, h.logprob)
            for rank, h in enumerate(beam.best())
        ]
        for output in outputs:
            assert output.finish_reason is not None
            self._counters.finished[output.finish_reason] += 1
        self._drop(job)
        return outputs

    def _end_search(self, job: _Job, reason: FinishReason, error: str) -> Output:
        self._counters.finished[reason] += 1
        self._drop(job)
        return Output(job.request.id, 0, (), 0, finish_reason=reason, error=error)

    def _drop(self, job: _Job) -> None:
        for row in job.live.values():
            self.scheduler.abort(row.sequence)
        del self._jobs[job.request.id]
