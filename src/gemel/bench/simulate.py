"""The plan of a benchmark: the engine's own scheduler, driven by a clock that advances by the roofline cost of each step.

Chunking, batching policy, prefix hits and preemptions in the plan are therefore the engine's, not a model of them; only the time of a
step is predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gemel.bench.timeline import Span, Timeline
from gemel.bench.workload import Job
from gemel.config.engine import EngineConfig
from gemel.config.sampling import SamplingParams
from gemel.engine.blocks import BlockPool
from gemel.engine.request import Request, StepPlan
from gemel.engine.request import Sequence as Tokens
from gemel.engine.schedule import Scheduler

_WAIT_S = 1e-3


def simulate(jobs: Sequence[Job], config: EngineConfig, num_blocks: int, max_context: int, step_s: Callable[[StepPlan], float]) -> Timeline:
    """Run `jobs`, all present at time 0, through a scheduler with `num_blocks` blocks; a step takes `step_s(plan)` seconds."""
    scheduler = Scheduler(config, BlockPool(num_blocks, config.block_tokens, config.prefix_cache, config.cache_salt), max_context)
    sequences = [_sequence(number, job) for number, job in enumerate(jobs)]
    for sequence in sequences:
        scheduler.add(sequence, 0.0)
    first_s: dict[int, float] = {}
    last_s: dict[int, float] = {}
    clock_s, num_steps = 0.0, 0
    while scheduler.has_work:
        plan = scheduler.schedule(clock_s)
        if not plan.work:  # dynamic batching lets its oldest request wait
            clock_s += _WAIT_S
            continue
        clock_s += step_s(plan)
        num_steps += 1
        scheduler.commit(plan)
        for item in plan.work:
            if item.samples:
                number = item.sequence.arrival
                first_s.setdefault(number, clock_s)
                last_s[number] = clock_s
                item.sequence.tokens.append(0)
                if len(item.sequence.tokens) == item.sequence.max_total:
                    scheduler.finish(item.sequence)
    spans = tuple(
        Span(sequence.num_prompt, sequence.num_output, first_s[sequence.arrival], last_s[sequence.arrival], sequence.cached_tokens)
        for sequence in sequences
    )
    return Timeline(spans, num_steps, sum(sequence.num_preemptions for sequence in sequences))


def _sequence(number: int, job: Job) -> Tokens:
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=job.num_output)
    return Tokens(Request(str(number), job.prompt, params), 0, number, list(job.prompt), job.num_total)
