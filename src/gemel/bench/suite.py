"""The four benchmarks: which jobs they time together, and how a measurement is put beside its plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from gemel.bench import timeline
from gemel.bench.apart import table, together, watch
from gemel.bench.measure import measure
from gemel.bench.report import Figure, aligned, join
from gemel.bench.roofline import Rates
from gemel.bench.simulate import simulate
from gemel.bench.subject import Subject
from gemel.bench.workload import Job, Workload
from gemel.engine.engine import Engine

_WARM_UP_JOBS = 8
_WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Run:
    """Jobs that are timed together, and what their timeline says."""

    jobs: Sequence[Job]
    figures: Callable[[timeline.Timeline], dict[str, float]]


def runs(benchmark: str, workload: Workload, repeat: int) -> list[Run]:
    """What repeat number `repeat` of a benchmark consists of."""
    match benchmark:
        case "decode":
            return [Run((workload.decode,), timeline.decode)]
        case "prefill":
            return [Run((jobs[repeat % len(jobs)],), timeline.prefill) for jobs in workload.prefill.values()]
        case "throughput":
            return [Run(workload.offline, timeline.throughput)]
        case "prefix":
            return [Run(workload.shared, timeline.throughput)]
    raise AssertionError(benchmark)


def measured(subject: Subject, benchmark: str, workload: Workload, num_repeats: int) -> list[dict[str, float]]:
    """Figures of each repeat, after a warm-up of every run with fewer and shorter jobs."""
    for run in runs(benchmark, workload, 0):
        short = [Job(job.prompt, min(job.num_output, _WARM_UP_TOKENS)) for job in run.jobs[:_WARM_UP_JOBS]]
        measure(subject.engine, short, salt="warm-up")
    repeats = []
    for repeat in range(num_repeats):
        figures: dict[str, float] = {}
        for run in runs(benchmark, workload, repeat):
            figures |= run.figures(measure(subject.engine, run.jobs, salt=f"repeat-{repeat}"))
        repeats.append(figures)
    return repeats


def planned(subject: Subject, benchmark: str, workload: Workload, rates: Rates) -> dict[str, float]:
    """The same figures for an engine whose every step takes as long as the roofline says."""
    step_s = subject.cost(rates).step_s
    figures: dict[str, float] = {}
    for run in runs(benchmark, workload, 0):
        figures |= run.figures(simulate(run.jobs, subject.config, subject.num_blocks, subject.engine.max_context, step_s))
    return figures


def compare(
    subject: Subject, benchmark: str, workload: Workload, repeats: Sequence[Mapping[str, float]], rates: Rates, peak_bytes: int
) -> dict[str, Figure]:
    """Every figure of `repeats` beside its plan, and the peak memory beside what weights and key/value pool take."""
    peak = Figure(peak_bytes, peak_bytes, peak_bytes, subject.planned_memory_bytes(subject.cost(rates)))
    return join(repeats, planned(subject, benchmark, workload, rates)) | {"peak_memory_bytes": peak}


def profile(subject: Subject, benchmark: str, workload: Workload, rates: Rates) -> str:
    """Where the time of one more run goes, for people: parts of its steps, beside their plan, or torch's operators where torch computes."""
    engine = subject.engine
    if engine.runner.program is None:
        with torch.profiler.profile() as profiled:
            _run_all(engine, benchmark, workload)
        operators: str = profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40)
        return operators
    with watch(engine, subject.cost(rates)) as steps:
        _run_all(engine, benchmark, workload)
    reading = [step for plan, step in steps if any(item.num_new > 1 for item in plan.work)]
    writing = [step for plan, step in steps if plan.work and all(item.num_new == 1 for item in plan.work)]
    lines = []
    for what, some in (("steps that read prompts", reading), ("steps that write only", writing)):
        if some:
            lines += [f"{len(some)} {what}:", aligned(table(together(some, sum), rates.read_bytes_per_s)), ""]
    return "\n".join(lines)


def _run_all(engine: Engine, benchmark: str, workload: Workload) -> None:
    for run in runs(benchmark, workload, 0):
        measure(engine, run.jobs, salt="profile")
