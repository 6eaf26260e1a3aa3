"""`gemel bench`: one benchmark, measured and planned, as a table and as one JSON object on the last line.

Nothing but the standard library is imported at the top: `--help` must be there at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemel.bench.report import Figure
    from gemel.bench.roofline import Rates
    from gemel.bench.subject import Subject
    from gemel.config.engine import EngineConfig

BENCHMARKS = {
    "decode": "one stream: tokens per second after the first token",
    "prefill": "one prompt: prompt tokens per second until the first output token",
    "throughput": "many requests at once: output tokens per second, time to first token, time per token",
    "prefix": "many requests whose prompts start alike: as throughput, and how much was not computed again",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what a benchmark is asked; the model and the engine are the caller's to choose."""
    parser.add_argument("benchmark", choices=BENCHMARKS, help="; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items()))
    parser.add_argument("--workload", type=Path, metavar="FILE", help="JSON workload; default: a small one made to fit the model")
    parser.add_argument("--repeat", type=_count, default=3, metavar="N", help="how often each run is timed (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--profile", action="store_true", help="afterwards, show which operators one more run spends its time in")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def run(args: argparse.Namespace, name: str, path: Path, config: EngineConfig) -> int:
    """Load the model at `path`, warm up, measure, plan, print. Raises ConfigError for what the user can mend."""
    from gemel.bench import machine, suite, workload
    from gemel.bench.subject import Subject

    given = workload.load(args.workload) if args.workload else None  # a mistake should not wait for the model
    subject = Subject.open(path, config)
    work = given or workload.small(subject.model.vocab_size, subject.engine.max_context)
    subject.check(work)
    repeats = suite.measured(subject, args.benchmark, work, args.repeat)
    peak_bytes = machine.peak_memory_bytes()  # before the probes of `rates` allocate theirs
    if args.profile:
        print(suite.profile(subject, args.benchmark, work), file=sys.stderr if args.json else sys.stdout)
    rates = machine.rates(subject.device, subject.storage.arithmetics)
    figures = suite.compare(subject, args.benchmark, work, repeats, rates, peak_bytes)
    head = {"benchmark": args.benchmark, "model": name, "workload": work.name, "repeat": args.repeat}
    _print(head, subject, rates, figures, only_json=args.json)
    return 0


def _print(head: dict[str, object], subject: Subject, rates: Rates, figures: Mapping[str, Figure], *, only_json: bool) -> None:
    import torch

    from gemel.bench import machine, report

    here, threads, dtype = machine.describe(), torch.get_num_threads(), str(subject.dtype).removeprefix("torch.")
    if not only_json:
        print(f"{head['model']}, {dtype}, {here.accelerator or here.cpu}, {threads} threads, load average {here.load:.1f}")
        print(f"workload {head['workload']}, {head['repeat']} repeats, loaded in {subject.startup_s:.1f} s")
        print(f"limits measured just now: read {rates.read_bytes_per_s / 1e9:.1f} GB/s, multiply {rates.flops_per_s / 1e9:.0f} GFLOP/s\n")
        print(report.table(figures) + "\n")
    run = head | {"dtype": dtype, "device": str(subject.device), "threads": threads, "startup_s": subject.startup_s}
    setting = {"engine": subject.config.model_dump(mode="json"), "machine": asdict(here), "rates": asdict(rates)}
    print(json.dumps(run | setting | {"figures": {name: figure.as_json() for name, figure in figures.items()}}))
