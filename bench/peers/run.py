"""Gemel and its peers on the same work, side by side: one process per engine and round, the rounds of all engines interleaved.

    python bench/peers/run.py --model DIR [--workload FILE] [--peers gemel,transformers,vllm,llamacpp,openvino]
                              [--work decode,prefill,throughput,prefix,serve] [--repeat 3] [--markdown | --json] [--out FILE]

A peer may be named with a precision (`llamacpp:q8_0`), also several times; without one it gets what is usually its fastest at 16 or 32
bits on this processor. The work `serve` starts a server as people do, where the peer has one. Every process loads, warms up and does all of
the work, so a round of one engine never meets a cache that an earlier one filled. Every second round goes through the engines backwards: a
machine that slowly gets faster or slower favours none of them.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # instead of this folder, whose modules are named after the packages that they drive
sys.path.insert(1, str(ROOT / "src"))

from bench.peers import prepare, protocol, serving, table  # noqa: E402

from gemel.ops import hardware  # noqa: E402

# What is usually fastest at 16 or 32 bits: with bf16 instructions, and without.
PRECISIONS = {
    "gemel": ("bfloat16", "bfloat16"),
    "transformers": ("bfloat16", "float32"),
    "vllm": ("bfloat16", "float32"),
    "llamacpp": ("bf16", "f16"),
    "openvino": ("fp16", "fp16"),
}
KNOWN = {
    "gemel": tuple(serving.GEMEL),
    "transformers": ("float32", "bfloat16"),
    "vllm": ("float32", "bfloat16", "int8"),
    "llamacpp": ("f32", "f16", "bf16", *prepare.QUANTIZED),
    "openvino": ("fp32", "fp16", "int8", "int4"),
}


def main() -> int:
    """Prepare, measure in rounds, print."""
    args = _arguments()
    if args.table:
        print(table.markdown(json.loads(args.table.read_text(encoding="utf-8"))), end="")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        args.workload = args.workload or _built_in(args.model, Path(folder))
        lines: list[dict[str, object]] = []
        for line in _measure(args):
            lines.append(line)
            if args.out and line["measure"] in ("others", "error"):  # hours of measuring should survive an interruption
                args.out.write_text(json.dumps(_result(args, lines), indent=1) + "\n", encoding="utf-8")
    result = _result(args, lines)
    if not args.json:
        print(table.markdown(result))
    print(json.dumps(result))
    return 1 if any("error" in summary for summary in result["variants"].values()) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=",".join(PRECISIONS), help="engines, each optionally as NAME:PRECISION")
    parser.add_argument("--once", default="", help="of the engines, those that run in the first round only because they are slow")
    parser.add_argument("--work", default=",".join(protocol.WORK))
    parser.add_argument("--model", type=Path, help="Hugging Face directory, as `gemel pull` makes one")
    parser.add_argument("--workload", type=Path, help="default: the small one of `gemel bench`, made to fit the model")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--threads", type=int, default=hardware.cores().usable)
    parser.add_argument("--venvs", type=Path, default=ROOT / "bench" / "peers" / ".venvs", help="where environments and exports are kept")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that one process may take (default 3600)")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--markdown", action="store_true", help="print a table before it (this is the default)")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file, anew after every process")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing: print the table of an earlier --out FILE")
    args = parser.parse_args()
    if args.table:
        return args
    args.variants, args.once = (_variants(parser, names) for names in (args.peers, args.once))
    if unknown := [name for name in args.work.split(",") if name not in (*protocol.WORK, "serve")]:
        parser.error(f"there is no work {unknown[0]!r}; there is {', '.join(protocol.WORK)}, serve")
    if missing := [name for name in args.once if name not in args.variants]:
        parser.error(f"--once {missing[0]} is not among --peers {','.join(args.variants)}")
    if args.model is None or not (args.model / "config.json").exists():
        parser.error("--model must be a Hugging Face directory; `gemel pull` makes one")
    if args.repeat < 1 or (args.json and args.markdown):
        parser.error("--repeat must be at least 1, and --json and --markdown exclude each other")
    args.model, args.venvs = args.model.resolve(), args.venvs.resolve()
    return args


def _variants(parser: argparse.ArgumentParser, names: str) -> list[str]:
    """`NAME:PRECISION` of each, the precision filled in where it was left out."""
    variants = []
    for name in filter(None, names.split(",")):
        peer, _, precision = name.partition(":")
        if peer not in PRECISIONS:
            parser.error(f"there is no peer {peer!r}; there is {', '.join(PRECISIONS)}")
        if precision and precision not in KNOWN[peer]:
            parser.error(f"{peer} is not measured in {precision!r}; it is in {', '.join(KNOWN[peer])}")
        variants.append(f"{peer}:{precision or PRECISIONS[peer][0 if hardware.native_bf16() else 1]}")
    return variants


def _built_in(model: Path, folder: Path) -> Path:
    from gemel.bench import workload

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    path = folder / "small.json"
    path.write_text(workload.dump(workload.small(config["vocab_size"], config["max_position_embeddings"])), encoding="utf-8")
    return path


def _measure(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Every line of every runner, with its variant and round. What fails once is not tried again."""
    prepared = {}
    failed: set[str] = set()
    args.venvs.mkdir(parents=True, exist_ok=True)
    for variant in args.variants:
        peer, _, precision = variant.partition(":")
        try:
            prepared[variant] = (
                prepare.environment(peer, args.venvs, _say),
                prepare.model(peer, precision, args.model, args.venvs, _say),
            )
        except (subprocess.CalledProcessError, OSError) as error:
            failed.add(variant)
            yield {"variant": variant, "round": 0, "measure": "error", "message": f"could not be prepared: {error}"}
    for number in range(args.repeat):
        for variant in args.variants if number % 2 == 0 else reversed(args.variants):
            if variant in failed or (number and variant in args.once):
                continue
            _say(f"round {number + 1} of {args.repeat}: {variant}")
            before = _Clocks.read()
            for line in _run(variant, *prepared[variant], args):
                if line["measure"] == "error":
                    failed.add(variant)
                yield {"variant": variant, "round": number, **line}
            yield {"variant": variant, "round": number, "measure": "others", "cpu_share": _Clocks.read().others_since(before)}


@dataclass(frozen=True)
class _Clocks:
    """Seconds since some start: of the wall, of all processors while busy or taken away by a hypervisor, and of our ended children."""

    wall_s: float
    busy_s: float
    own_s: float

    @classmethod
    def read(cls) -> _Clocks:
        times, own = psutil.cpu_times(), os.times()
        idle_s = times.idle + getattr(times, "iowait", 0.0)
        counted_twice_s = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        return cls(time.perf_counter(), sum(times) - idle_s - counted_twice_s, own.children_user + own.children_system)

    def others_since(self, before: _Clocks) -> float:
        """The share of the machine's processor time that went to anything else. Above a few hundredths, figures say little."""
        others_s = (self.busy_s - before.busy_s) - (self.own_s - before.own_s)
        return max(others_s, 0.0) / ((self.wall_s - before.wall_s) * (os.cpu_count() or 1))


def _run(variant: str, python: Path, model: Path, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """What a round of one variant measured: one process for the engine, one more that starts its server if that was asked for."""
    peer, _, precision = variant.partition(":")
    work = args.work.split(",")
    common = ["--model", str(model), "--precision", precision, "--threads", str(args.threads)]
    if "serve" in work and peer in serving.COMMANDS:
        yield from _process([str(python), "-m", "bench.peers.serving", "--peer", peer, *common], peer, args)
    if work := [name for name in work if name != "serve"]:
        task = ["--workload", str(args.workload.resolve()), "--work", ",".join(work), "--spawned", str(time.time())]
        yield from _process([str(python), "-m", f"bench.peers.{peer}", *common, *task], peer, args)


def _process(command: list[str], peer: str, args: argparse.Namespace) -> Sequence[dict[str, object]]:
    """The lines that one process printed, and what it said last if it failed."""
    paths = [str(ROOT)] + ([str(ROOT / "src")] if peer == "gemel" else [])
    # OMP_NUM_THREADS reaches the thread pools that an engine's own setting does not.
    settings = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=args.timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return [{"measure": "error", "message": f"took more than {args.timeout:.0f} s"}]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        lines.append({"measure": "error", "message": said[-1] if said else f"exit status {done.returncode}", "stderr": said[-30:]})
    return lines


def _result(args: argparse.Namespace, lines: list[dict[str, object]]) -> dict[str, object]:
    from gemel.bench import machine

    return {
        "machine": asdict(machine.describe()),
        "model": args.model.name,
        "workload": args.workload.stem,
        "work": args.work.split(","),
        "rounds": args.repeat,
        "variants": table.summarize(lines),
        "lines": lines,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
