"""Run jobs through an engine and note when tokens came."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Protocol

from gemel.bench.timeline import Span, Timeline
from gemel.bench.workload import Job
from gemel.config.sampling import SamplingParams
from gemel.engine.request import EngineStats, FinishReason, Output, Request


class Steps(Protocol):
    """The part of `gemel.engine.engine.Engine` that a benchmark drives; the tests drive one with a known schedule."""

    def add(self, request: Request) -> None:
        """Queue a request."""

    def step(self) -> list[Output]:
        """Advance every running sequence; what they gained."""

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""

    def stats(self) -> EngineStats:
        """Counters so far."""


def measure(engine: Steps, jobs: Sequence[Job], salt: str) -> Timeline:
    """Add all jobs at once and step until they are done.

    `salt` keeps this run's cached prefixes apart from those of every other run, so that repeats do not get
    faster by having been run before. Raises RuntimeError when a job did not get exactly the tokens it asked for: its time would then be the
    time of something else.
    """
    before = engine.stats()
    spans: dict[str, Span] = {}
    start_s = perf_counter()
    for number, job in enumerate(jobs):
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=job.num_output)
        engine.add(Request(f"{salt}-{number}", job.prompt, params, salt=salt))
    num_prompt = {f"{salt}-{number}": len(job.prompt) for number, job in enumerate(jobs)}
    while engine.has_work:
        outputs = engine.step()
        now_s = perf_counter() - start_s
        for output in outputs:
            if output.tokens:
                first_s = spans[output.request_id].first_s if output.request_id in spans else now_s
                spans[output.request_id] = Span(num_prompt[output.request_id], output.num_output, first_s, now_s, output.cached_tokens)
            if output.finish_reason not in (None, FinishReason.LENGTH):
                raise RuntimeError(f"job {output.request_id} ended by {output.finish_reason}: {output.error}")
    after = engine.stats()
    for number, job in enumerate(jobs):
        span = spans.get(f"{salt}-{number}")
        if span is None or span.num_output != job.num_output:
            raise RuntimeError(f"job {salt}-{number} gave {span.num_output if span else 0} tokens instead of {job.num_output}")
    ordered = tuple(spans[f"{salt}-{number}"] for number in range(len(jobs)))
    return Timeline(ordered, after.steps - before.steps, after.preemptions - before.preemptions)
