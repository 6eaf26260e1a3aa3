"""What every runner shares: how jobs are given to an engine, how it is timed, and what is printed.

A runner offers one thing, `Peer.run(jobs)`: take all jobs at once, generate greedily, ignore end tokens, and tell for each job when its
first and its last token came. Everything that is measured follows from that, in this file, in the same way for every engine.

A runner prints one JSON object per measure, on a copy of stdout that nothing else can write to: engines print as they like.
Only the standard library is imported: this runs in environments that have no Gemel.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

WORK = ("decode", "prefill", "throughput", "prefix")
_DECODE_REPEATS = 3
_SHOWN_TOKENS = 16


@dataclass(frozen=True)
class Job:
    """Continue `prompt` by exactly `num_output` tokens."""

    prompt: list[int]
    num_output: int


@dataclass(frozen=True)
class Span:
    """Seconds since all jobs were given, and the tokens that came. `first_s` is None where an engine was not asked for it."""

    first_s: float | None
    last_s: float
    tokens: list[int]


class Peer(Protocol):
    """An engine that is loaded. `precision` says in words what it keeps weights in and computes in; `settings` what else was chosen."""

    precision: str
    settings: dict[str, object]
    versions: dict[str, str]

    def run(self, jobs: Sequence[Job]) -> list[Span]:
        """Generate for all jobs, given at once; spans in the order of the jobs."""

    def close(self) -> None:
        """End whatever was started."""


@dataclass(frozen=True)
class Setup:
    """What a runner is told. `precision` is one of the names that the runner knows."""

    model: Path
    precision: str
    threads: int
    workload: Path


def main(open_peer: Callable[[Setup], Peer]) -> None:
    """A runner's main: load, warm up, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("--work", default=",".join(WORK))
    parser.add_argument("--precision", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--spawned", type=float, default=time.time(), help="unix time at which the process was started")
    args = parser.parse_args()
    say = _own_stdout()
    workload = json.loads(args.workload.read_text(encoding="utf-8"))
    peer = open_peer(Setup(args.model, args.precision, args.threads, args.workload))
    try:
        _warm_up(peer, workload, say, args.spawned)
        for work in args.work.split(","):
            say({"measure": work, **MEASURES[work](peer, workload)})
        plan = getattr(peer, "plan", None)
        if plan is not None:
            say({"measure": "plan", **plan(args.work.split(","))})
    finally:
        peer.close()
    say({"measure": "memory", "peak_mb": _peak_mb()})
    say({"measure": "about", "precision": peer.precision, "settings": peer.settings, "versions": peer.versions, "threads": args.threads})


def _own_stdout() -> Callable[[dict[str, object]], None]:
    """Keep stdout for the protocol; what anything else prints goes to stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(line: dict[str, object]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    return say


def _jobs(workload: dict[str, object], key: str) -> list[Job]:
    entries = workload[key]
    return [Job(entry["prompt"], entry["out"]) for entry in (entries if isinstance(entries, list) else [entries])]


def _warm_up(peer: Peer, workload: dict[str, object], say: Callable[[dict[str, object]], None], spawned: float) -> None:
    """The first token ends the start; then some of each shape of work, with prompts that no measure uses and no cache knows from one."""
    rng = random.Random(1)
    used = [*_jobs(workload, "offline")[:8], *_jobs(workload, "decode")]

    def other(job: Job, num_output: int) -> Job:
        return Job(rng.sample(job.prompt, len(job.prompt)), num_output)

    checked_run(peer, [other(used[-1], 1)])
    say({"measure": "start", "seconds": time.time() - spawned})
    checked_run(peer, [other(used[-1], 8)])
    checked_run(peer, [other(job, 8) for job in used])
    for key in _prefill_keys(workload):
        checked_run(peer, [other(_jobs(workload, key)[0], 1)])


def checked_run(peer: Peer, jobs: list[Job]) -> list[Span]:
    """Run, and refuse to time work that was not done."""
    spans = peer.run(jobs)
    for number, (job, span) in enumerate(zip(jobs, spans, strict=True)):
        if len(span.tokens) != job.num_output:
            raise RuntimeError(f"job {number} gave {len(span.tokens)} tokens instead of {job.num_output}")
    return spans


def decode(peer: Peer, workload: dict[str, object]) -> dict[str, object]:
    """One stream; the rate counts from the first token on."""
    (job,) = _jobs(workload, "decode")
    rates = []
    for _ in range(_DECODE_REPEATS):
        (span,) = checked_run(peer, [job])
        assert span.first_s is not None
        rates.append((job.num_output - 1) / (span.last_s - span.first_s))
    return {"tokens_per_s": median(rates), "tokens": span.tokens[:_SHOWN_TOKENS]}


def prefill(peer: Peer, workload: dict[str, object]) -> dict[str, object]:
    """One prompt at a time, each of them new; prompt tokens per second until the first output token, by prompt length."""
    rates: dict[int, list[float]] = {}
    for key in _prefill_keys(workload):
        for job in _jobs(workload, key):
            (span,) = checked_run(peer, [Job(job.prompt, 1)])
            rates.setdefault(len(job.prompt), []).append(len(job.prompt) / (span.last_s if span.first_s is None else span.first_s))
    return {f"tokens_per_s_{length}": median(values) for length, values in sorted(rates.items())}


def _prefill_keys(workload: dict[str, object]) -> list[str]:
    return [key for key in workload if re.fullmatch(r"prefill\d+(_alt)?", key)]


def throughput(peer: Peer, workload: dict[str, object]) -> dict[str, object]:
    """Many different jobs at once."""
    return _many(peer, _jobs(workload, "offline"))


def prefix(peer: Peer, workload: dict[str, object]) -> dict[str, object]:
    """Many jobs whose prompts start alike, on a cache that has not seen them."""
    return _many(peer, _jobs(workload, "shared"))


def _many(peer: Peer, jobs: list[Job]) -> dict[str, object]:
    spans = checked_run(peer, jobs)
    total_s = max(span.last_s for span in spans)
    return {"output_tokens_per_s": sum(job.num_output for job in jobs) / total_s, "total_s": total_s}


MEASURES = {"decode": decode, "prefill": prefill, "throughput": throughput, "prefix": prefix}


def _peak_mb() -> float:
    """The largest resident size of this process or of a child that has ended, whichever held the model."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024 / 1e6
