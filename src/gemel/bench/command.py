"""`gemel bench`: one benchmark, measured and planned, as a table and as one JSON object on the last line.

Nothing but the standard library is imported at the top: `--help` must be there at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemel.bench.roofline import Rates
    from gemel.bench.subject import Subject
    from gemel.config.engine import EngineConfig

TIMED = {
    "decode": "one stream: tokens per second after the first token",
    "prefill": "one prompt: prompt tokens per second until the first output token",
    "throughput": "many requests at once: output tokens per second, time to first token, time per token",
    "prefix": "many requests whose prompts start alike: as throughput, and how much was not computed again",
}
BENCHMARKS = TIMED | {
    "step": "steps of one and of many streams: where each microsecond of them goes",
    "quality": "perplexity of a text, how far the model's distributions are from fp32's, and whether greedy text is the same",
    "data": "cleaning a corpus into tokens of the model: documents per processor second, beside a peer",
    "train": "steps of training on random weights: tokens per second, utilization and peak memory, beside peers; what levers save",
}
# What help must not import; a test compares them with the modules of their benchmarks.
WORK = ("near-duplicates", "clean", "pages")
SAMPLING = ("greedy", "temperature", "top-k", "top-p", "min-p", "penalties", "logprobs", "all")
PEERS = {"data": ("datatrove",), "train": ("hf", "trl", "litgpt", "compiled")}
SHAPES = ("135m", "7m", "tiny")


@dataclass(frozen=True, slots=True)
class Option:
    """An option that some benchmarks have; given to another one it is refused, not ignored."""

    name: str
    parse: Callable[[str], object]
    default: object
    benchmarks: Collection[str]
    help: str
    metavar: str = "N"

    @property
    def flag(self) -> str:
        """As it is written on the command line."""
        return f"--{self.name}"

    @property
    def dest(self) -> str:
        """Its name among parsed arguments."""
        return self.name.replace("-", "_")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what a benchmark is asked; the model and the engine are the caller's to choose."""
    parser.add_argument("benchmark", choices=BENCHMARKS, help="; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items()))
    for option in OPTIONS:
        shown = "" if option.default is None else f" (default: {option.default})"
        whose = "" if option.benchmarks is TIMED else f"{', '.join(option.benchmarks)}: "
        parser.add_argument(
            option.flag, type=option.parse, metavar=option.metavar, default=argparse.SUPPRESS, help=whose + option.help + shown
        )
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="train: put a value over gemel's recipe, as optim.state=int8; may be repeated",
    )
    parser.add_argument(
        "--levers",
        nargs="?",
        const="",
        metavar="NAME,...",
        help="train: measure levers instead of peers, several at once as NAME+NAME (default: all)",
    )
    parser.add_argument("--profile", action="store_true", help="afterwards, show what parts of its steps one more run spends its time in")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _one_of(*known: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}")
        return text

    return parse


def _peers(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


OPTIONS = (
    Option("workload", Path, None, TIMED, "JSON workload; default: a small one made to fit the model", "FILE"),
    Option("repeat", _count, 3, (*TIMED, "train"), "how often each run is timed"),
    Option("batch", _counts, "1,64", ("step",), "numbers of streams", "N,..."),
    Option("context", _count, 128, ("step",), "tokens that each stream has already", "TOKENS"),
    Option("steps", _count, 64, ("step",), "how many steps are taken apart"),
    Option("sampling", _one_of(*SAMPLING), "greedy", ("step",), f"how tokens are chosen: {', '.join(SAMPLING)}", "RULES"),
    Option("text", Path, None, ("quality",), "UTF-8 text; default: docstrings of Python's standard library", "FILE"),
    Option("window", _count, 256, ("quality",), "the text is cut into windows of so many tokens", "TOKENS"),
    Option("tokens", _count, 16384, ("quality",), "so much of the text is scored at most", "TOKENS"),
    Option("prompts", _count, 50, ("quality",), "so many halves of windows at most are continued greedily"),
    Option("corpus", Path, None, ("data",), "JSONL with text and id, as bench/corpus.py makes; must be given", "FILE"),
    Option("documents", _count, 2000, ("data",), "so many of it are taken at most"),
    Option("work", _one_of(*WORK), "clean", ("data",), f"what is done: {', '.join(WORK)}", "WORK"),
    Option("peer", _peers, None, tuple(PEERS), "also measure: datatrove; hf, trl, litgpt, compiled", "PEER,..."),
    Option("peer-python", Path, None, tuple(PEERS), "the Python that peers are installed for", "FILE"),
    Option("shape", _one_of(*SHAPES), "135m", ("train",), f"the model: {', '.join(SHAPES)}", "SHAPE"),
    Option("precision", _one_of("fp32", "bf16"), "fp32", ("train",), "fp32 or bf16; peers use autocast, gemel master copies"),
    Option("sequences", _count, None, ("train",), "sequences in a step (default: 8 of 512, 32 of 256, 4 of 64 tokens)"),
    Option("warm-up", _count, 1, ("train",), "steps of each process that are not timed"),
    Option("timed", _count, 2, ("train",), "steps of each process that are timed"),
    Option("out", Path, None, ("train",), "keep here what each process says, as soon as it has said it", "FILE"),
    Option("through", str, "", ("train",), "start each process through this, as 'taskset -c 0,1'", "COMMAND"),
)


def _settle(args: argparse.Namespace) -> argparse.Namespace:
    """Options with their defaults. Raises ConfigError for one that the benchmark does not have."""
    from gemel.config.errors import ConfigError

    settled = vars(args).copy()
    for option in OPTIONS:
        if args.benchmark in option.benchmarks:
            default = option.parse(option.default) if isinstance(option.default, str) else option.default
            settled.setdefault(option.dest, default)
        elif option.dest in settled:
            raise ConfigError(f"{option.flag} has no effect on {args.benchmark}; it belongs to: {', '.join(option.benchmarks)}")
    if args.benchmark != "train" and (args.settings or args.levers is not None):
        raise ConfigError(f"{'--set' if args.settings else '--levers'} has no effect on {args.benchmark}; it belongs to: train")
    if unknown := set(getattr(args, "peer", ())) - set(PEERS.get(args.benchmark, ())):
        raise ConfigError(f"--peer {unknown.pop()} is not measured by {args.benchmark}; it measures: {', '.join(PEERS[args.benchmark])}")
    if args.profile and args.benchmark in ("quality", "data", "train"):
        raise ConfigError(f"--profile has no effect on {args.benchmark}; `gemel bench step --profile` shows where time goes")
    return argparse.Namespace(**settled)


def run(args: argparse.Namespace, name: str, path: Path, config: EngineConfig) -> int:
    """Load the model at `path`, measure, plan, print. Raises ConfigError for what the user can mend."""
    args = _settle(args)
    head: dict[str, object] = {"benchmark": args.benchmark, "model": name}
    match args.benchmark:
        case "step":
            _run_step(args, head, path, config)
        case "quality":
            _run_quality(args, head, path, config)
        case "data":
            _run_data(args, head, path, config)
        case _:
            _run_timed(args, head, path, config)
    return 0


def _run_timed(args: argparse.Namespace, head: dict[str, object], path: Path, config: EngineConfig) -> None:
    from gemel.bench import machine, report, suite, workload
    from gemel.bench.subject import Subject

    given = workload.load(args.workload) if args.workload else None  # a mistake should not wait for the model
    subject = Subject.open(path, config)
    work = given or workload.small(subject.model.vocab_size, subject.engine.max_context)
    subject.check(work)
    repeats = suite.measured(subject, args.benchmark, work, args.repeat)
    peak_bytes = machine.peak_memory_bytes()  # before the probes of `rates` allocate theirs
    rates = machine.rates(subject.device, subject.storage.arithmetics)
    if args.profile:
        print(suite.profile(subject, args.benchmark, work, rates), file=sys.stderr if args.json else sys.stdout)
    figures = suite.compare(subject, args.benchmark, work, repeats, rates, peak_bytes)
    _print(
        head | {"workload": work.name, "repeat": args.repeat},
        subject,
        rates,
        ["" if args.json else report.table(figures)],
        {"figures": {name: figure.as_json() for name, figure in figures.items()}},
        only_json=args.json,
    )


def _run_step(args: argparse.Namespace, head: dict[str, object], path: Path, config: EngineConfig) -> None:
    from gemel.bench import apart, machine, report, step
    from gemel.bench.subject import Subject
    from gemel.llm.engine import TextEngine
    from gemel.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(path)
    subject = Subject.open(path, config)
    text = TextEngine(subject.engine, tokenizer)
    rates = machine.rates(subject.device, subject.storage.arithmetics)
    cost, read = subject.cost(rates), rates.read_bytes_per_s
    profiles = [step.profile(text, cost, batch, args.context, args.steps, args.sampling) for batch in args.batch]
    lines = []
    for profile in profiles:
        lines += [step.summary(profile), report.aligned(apart.table(profile.step, read)), ""]
    if args.profile and not profiles[0].native:
        lines.append(step.operators(text, cost, args.batch[-1], args.context))
    head = head | {"sampling": args.sampling}
    _print(head, subject, rates, lines, {"batches": [step.as_json(profile, read) for profile in profiles]}, only_json=args.json)


def _run_quality(args: argparse.Namespace, head: dict[str, object], path: Path, config: EngineConfig) -> None:
    from gemel.bench import machine, quality, report
    from gemel.bench.subject import Subject
    from gemel.tokenizer.tokenizer import Tokenizer

    text, source = quality.read(args.text)
    windows = quality.windows(text, Tokenizer.load(path), args.window, args.tokens)
    tested = Subject.open(path, quality.scoring(config, args.window, len(windows)))
    reference = Subject.open(path, quality.reference(tested.config))
    runners, at_once = (reference.engine.runner, tested.engine.runner), tested.config.max_running
    greedy = quality.greedy(*runners, windows[: args.prompts], at_once, config.block_tokens)
    figures = quality.score(*runners, windows, at_once, config.block_tokens).figures() | greedy.figures()
    rates = machine.rates(tested.device, tested.storage.arithmetics)
    _print(
        head | {"text": source, "window": args.window, "windows": len(windows)},
        tested,
        rates,
        ["planned: what fp32 through torch gives", report.table(figures), *greedy.lines()],
        {"figures": {name: figure.as_json() for name, figure in figures.items()}, "greedy": greedy.as_json()},
        only_json=args.json,
    )


def _run_data(args: argparse.Namespace, head: dict[str, object], path: Path, config: EngineConfig) -> None:
    from gemel.bench import data, machine
    from gemel.config.engine import EngineConfig
    from gemel.config.errors import ConfigError

    if config != EngineConfig():
        raise ConfigError("engine flags have no effect on data, which uses no engine; leave them out")
    if args.corpus is None:
        raise ConfigError("data needs --corpus FILE; `python bench/corpus.py FILE` makes one")
    peer = args.peer[0] if args.peer else None
    lines, result = data.compare(args.work, args.corpus, args.documents, path, peer, args.peer_python)
    here = machine.describe()
    if not args.json:
        size = f"{result['documents']} documents, {result['characters'] / 1e6:.1f} M characters"
        print(f"{size}, {here.cpu}, load average {here.load:.1f}\n{data.WORK[args.work]}\n\n{lines}\n")
    print(json.dumps(head | {"machine": asdict(here)} | result))


def train(args: argparse.Namespace) -> int:
    """Steps of training: of gemel and peers, or of gemel with and without levers. Raises ConfigError for what the user can mend."""
    args = _settle(args)
    from gemel.bench import machine, train_levers
    from gemel.bench import train as bench
    from gemel.config.errors import ConfigError

    if args.levers is not None and args.peer:
        raise ConfigError("--levers compares gemel with itself; leave --peer out")
    shape = bench.SHAPES[args.shape]
    counts = args.sequences or shape.num_sequences, args.warm_up, args.timed, args.repeat
    work = bench.Work(args.shape, args.precision, *counts, args.through, args.peer_python, args.out)
    names = [] if args.levers is None else [name for name in args.levers.split(",") if name]
    levers = {} if args.levers is None else train_levers.chosen(names, shape.length)
    settings = tuple(args.settings)
    variants = [settings, *((*settings, *lever.settings) for lever in levers.values())]
    results = bench.compare(work, args.peer or (), variants, lambda line: print(f"gemel: {line}", file=sys.stderr, flush=True))
    said, rows = bench.summary(results, work), bench.figures(results[:1] if levers else results, work)
    changes = train_levers.figures(levers, results[0], results[1:], work) if levers else []
    if not args.json:
        here, limits = machine.describe(), said["limits"]
        size = f"{work.num_sequences} x {shape.length} tokens per step"
        print(f"{args.shape}, {args.precision}, {size}, {here.cpu}, load average {here.load:.1f}")
        print(f"limits measured just now: multiply {limits['peak_flops_per_s'] / 1e9:.0f} GFLOP/s, ", end="")
        print(f"read {limits['read_bytes_per_s'] / 1e9:.1f} GB/s")
        print(f"planned: {said['plan']['tokens_per_s']:,.0f} tokens/s, {said['plan']['peak_bytes'] / 1e6:,.0f} MB\n")
        print(bench.table(rows) + "\n")
        if levers:
            print(train_levers.table(changes) + "\n")
    print(json.dumps({"benchmark": "train"} | said | {"results": rows, "levers": changes}))
    return 1 if any("error" in row for row in [*rows, *changes]) else 0


def _print(
    head: Mapping[str, object], subject: Subject, rates: Rates, lines: Sequence[str], result: Mapping[str, object], *, only_json: bool
) -> None:
    """The machine, the setting and the limits, then `lines`; last one JSON object with all of it."""
    import torch

    from gemel.bench import machine

    here, threads, dtype = machine.describe(), torch.get_num_threads(), str(subject.dtype).removeprefix("torch.")
    if not only_json:
        print(f"{head['model']}, {dtype}, {here.accelerator or here.cpu}, {threads} threads, load average {here.load:.1f}")
        print(", ".join(f"{name} {getattr(subject.config, name)}" for name in ("weights", "activations", "kv", "kernels")))
        print("\n".join(f"{each.name}: {each.value} ({each.reason})" for each in subject.engine.derived))
        print(", ".join(f"{key} {value}" for key, value in head.items() if key != "model") + f", loaded in {subject.startup_s:.1f} s")
        peaks = ", ".join(f"{arithmetic} {rate / 1e9:.0f} GFLOP/s" for arithmetic, rate in rates.flops_per_s.items())
        print(f"limits measured just now: read {rates.read_bytes_per_s / 1e9:.1f} GB/s, multiply {peaks}\n")
        print("\n".join(lines) + "\n")
    setting = {"dtype": dtype, "device": str(subject.device), "threads": threads, "startup_s": subject.startup_s}
    setting |= {"engine": subject.config.model_dump(mode="json"), "machine": asdict(here), "rates": asdict(rates)}
    print(json.dumps({**head, **setting, **result}))
