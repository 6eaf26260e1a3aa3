"""Native kernels against the limits of this processor and against torch's own, each alone, side by side in one run.

    python bench/kernels.py [--formats float32,bfloat16,int8,int4] [--shapes 576x576,3072x576,...] [--rows 1,8,64,512]
                            [--attention 1x128,64x1024] [--threads N] [--repeat 7] [--json]

Weights are cold: a product goes through copies of its matrix that together are several times the last-level cache. Routes alternate, and
figures are medians over the repeats. The plan of a product is the slower of reading its matrix at the speed of a plain loop over memory,
and of multiplying at the speed that the processor's registers allow, both measured at the start by `limits.cpp`, compiled for this
processor.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from time import perf_counter

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from bench.paged import Paged  # noqa: E402

from gemel.bench import machine, report  # noqa: E402
from gemel.bench.product import FORMATS, Product, Team  # noqa: E402
from gemel.ops import hardware  # noqa: E402
from gemel.ops.cpu import native  # noqa: E402

SHAPES = "960x576,576x576,3072x576,576x1536,49152x576,2560x2048,11264x2048,2048x5632"
COLD_BYTES = 192 * 2**20  # of copies of one matrix
SAMPLE_S = 2e-3  # a sample repeats a call until it takes this long
HEADS, KV_HEADS, HEAD_WIDTH = 9, 3, 64  # of attention
Call = Callable[[], object]


@dataclass(frozen=True)
class Limits:
    """Bytes read per second, and operations per second by arithmetic."""

    read_bytes_per_s: float
    ops_per_s: Mapping[str, float]

    def planned_s(self, read_bytes: float, ops: float, arithmetic: str) -> float:
        """The roofline of one product."""
        return max(read_bytes / self.read_bytes_per_s, ops / self.ops_per_s[arithmetic])


@dataclass(frozen=True)
class Measured:
    """One route of one case. `read_bytes` are those of the matrix, or of keys and values, in this route's own format."""

    case: str
    route: str
    seconds: float
    planned_s: float
    read_bytes: float
    ops: float


def measure_limits(threads: int, repeat: int) -> Limits:
    """Compile limits.cpp for this processor, and take the best of `repeat` runs. Raises CalledProcessError without a compiler."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "limits.so"
        compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
        flags = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *flags, str(ROOT / "bench" / "limits.cpp"), "-o", str(library)], check=True)
        loops = ctypes.CDLL(str(library))
        for name in ("read", "float32", "bfloat16", "int8"):
            getattr(loops, f"limits_{name}").restype = ctypes.c_double
        memory = torch.ones(2**26)
        address, size = ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(memory.nbytes)
        read_s = min(loops.limits_read(address, size, threads) for _ in range(repeat))
        ops = {name: max(getattr(loops, f"limits_{name}")(threads) for _ in range(repeat)) for name in ("float32", "bfloat16", "int8")}
    return Limits(memory.nbytes / read_s, {name: max(rate, ops["float32"]) for name, rate in ops.items()})


def arithmetic(weights: str, *, quantize: bool) -> str:
    """What a product with such weights can be multiplied in at best."""
    return weights if weights in ("float32", "bfloat16") else "int8" if quantize else "float32"


def product_routes(team: Team | None, weights: str, n: int, k: int, rows: int) -> Iterator[tuple[str, Call, int, str]]:
    """Every way to multiply [rows, k] with a matrix [n, k]: name, call, bytes of the matrix, arithmetic."""
    x_MK = torch.randn(rows, k)
    if team is not None:
        for quantize in (True, False) if weights in ("int8", "int4") else (False,):
            first = Product(team, weights, n, k, quantize=quantize)
            copies = cycle([first, *(first.another() for _ in range(_num_copies(first.read_bytes) - 1))])
            y_MN = torch.empty(rows, n)
            name = "native" if weights not in ("int8", "int4") else "native, int8 activations" if quantize else "native, full activations"
            yield name, partial(_native, copies, x_MK, y_MN), first.read_bytes, arithmetic(weights, quantize=quantize)
    for name, make, multiply, of in TORCH[weights]:
        try:
            first_w = make(n, k)
            copies_w = cycle([first_w, *(make(n, k) for _ in range(_num_copies(n * k) - 1))])
            call = partial(_torch, copies_w, multiply, x_MK if weights == "float32" else x_MK.bfloat16())
            call()
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            print(f"{name} does not run here: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        yield f"torch {name}", call, int(n * k * BYTES[weights]), of


def _native(copies: Iterator[Product], x_MK: torch.Tensor, y_MN: torch.Tensor) -> None:
    next(copies)(x_MK, y_MN)


def _torch(copies: Iterator[object], multiply: Callable[[torch.Tensor, object], torch.Tensor], x_MK: torch.Tensor) -> torch.Tensor:
    return multiply(x_MK, next(copies))


def _num_copies(num_bytes: int) -> int:
    return max(1, -(-COLD_BYTES // num_bytes))


BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5}


def _packed_int4(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.randint(0, 16, (n, k), dtype=torch.int32)
    scales = torch.ones(k // 32, n, 2, dtype=torch.bfloat16)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1), scales


def _prepacked(n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(torch.randn(n, k).to(dtype), None)


def _pointwise(x: torch.Tensor, w: object) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


# name, make a weight, multiply, arithmetic. What would be emulated instruction by instruction on this processor is left out.
TORCH: dict[str, list[tuple[str, Callable[[int, int], object], Callable[[torch.Tensor, object], torch.Tensor], str]]] = {
    "float32": [
        ("F.linear", torch.randn, F.linear, "float32"),
        ("prepacked", lambda n, k: _prepacked(n, k, torch.float32), _pointwise, "float32"),
    ],
    "bfloat16": [
        ("F.linear", lambda n, k: torch.randn(n, k).bfloat16(), F.linear, "bfloat16"),
        ("prepacked", lambda n, k: _prepacked(n, k, torch.bfloat16), _pointwise, "bfloat16"),
    ]
    if hardware.native_bf16()
    else [],
    "int8": [
        (
            "int8pack",
            lambda n, k: torch.randint(-127, 128, (n, k), dtype=torch.int8),
            lambda x, w: torch._weight_int8pack_mm(x, w, torch.ones(w.shape[0], dtype=torch.bfloat16)),
            "float32",
        ),
    ],
    "int4": [
        ("int4pack", _packed_int4, lambda x, w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w[0], 32, w[1]), "float32"),
    ],
}
if any(name in hardware.isa() for name in ("avx512_vnni", "avx_vnni")):
    TORCH["int8"].append(
        (
            "_int_mm, activations given as int8",
            lambda n, k: torch.randint(-127, 128, (n, k), dtype=torch.int8),
            lambda x, w: torch._int_mm(x.to(torch.int8), w.T),
            "int8",
        )
    )


def attention_routes(team: Team | None, batch: int, context: int) -> Iterator[tuple[str, Call, float, str]]:
    """Every way to attend from one new token of each of `batch` sequences to `context` tokens."""
    elements = 2 * batch * context * KV_HEADS * HEAD_WIDTH
    if team is not None:
        for kv, size in {"float32": 4, "bfloat16": 2, "int8": 1 + 4 / HEAD_WIDTH}.items():
            layers = max(1, int(COLD_BYTES // (elements * size)))
            paged = Paged(team, kv, batch, context, HEADS, KV_HEADS, HEAD_WIDTH, min(layers, 64))
            yield f"native, {kv} KV", paged, elements * size, kv if kv != "int8" else "bfloat16"
    k, v = (torch.randn(batch, KV_HEADS, context, HEAD_WIDTH) for _ in range(2))
    q = torch.randn(batch, KV_HEADS, HEADS // KV_HEADS, HEAD_WIDTH)
    yield (
        "torch, contiguous fp32 KV, heads of a group as queries",
        partial(F.scaled_dot_product_attention, q, k, v),
        elements * 4,
        "float32",
    )


def alternate(calls: Sequence[Call], repeat: int) -> list[float]:
    """Median seconds of each call, taken in turns."""
    counts = []
    for call in calls:
        call()
        start_s = perf_counter()
        call()
        counts.append(max(1, round(SAMPLE_S / (perf_counter() - start_s))))
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(repeat):
        for call, count, into in zip(calls, counts, samples, strict=True):
            start_s = perf_counter()
            for _ in range(count):
                call()
            into.append((perf_counter() - start_s) / count)
    return [median(sample) for sample in samples]


def compare(case: str, routes: Iterable[tuple[str, Call, float, str]], ops: float, limits: Limits, repeat: int) -> list[Measured]:
    """All routes of one case."""
    found = list(routes)
    seconds = alternate([call for _, call, _, _ in found], repeat)
    return [
        Measured(case, name, took_s, limits.planned_s(read, ops, of), read, ops)
        for (name, _, read, of), took_s in zip(found, seconds, strict=True)
    ]


def table(measured: Sequence[Measured], limits: Limits) -> str:
    """For people."""
    rows = [("case", "route", "us", "planned us", "measured/planned", "GB/s", "of read", "Gop/s")]
    for one in measured:
        rate = one.read_bytes / one.seconds
        figures = (f"{one.seconds * 1e6:,.1f}", f"{one.planned_s * 1e6:,.1f}", f"{one.seconds / one.planned_s:.2f}")
        read = (f"{rate / 1e9:.1f}", f"{rate / limits.read_bytes_per_s:.0%}", f"{one.ops / one.seconds / 1e9:,.0f}")
        rows.append((one.case, one.route, *figures, *read))
    return report.aligned(rows)


def main() -> None:
    """Measure the limits, then every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS), help="of weights (default: %(default)s)")
    parser.add_argument("--shapes", default=SHAPES, help="n x k of weights; '' for none (default: %(default)s)")
    parser.add_argument("--rows", default="1,8,64,512", help="of activations (default: %(default)s)")
    parser.add_argument(
        "--attention", default="1x128,1x4096,64x128,64x1024", help="sequences x context; '' for none (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=hardware.cores().usable)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    limits = measure_limits(args.threads, args.repeat)
    library, variant = native.find()
    team = None if library is None else Team(library, args.threads)
    if team is None:
        print(f"torch alone is measured: {variant}", file=sys.stderr)
    measured = list(_cases(args, team, limits))
    if not args.json:
        peaks = ", ".join(f"{name} {rate / 1e9:,.0f} Gop/s" for name, rate in limits.ops_per_s.items())
        print(f"{variant}, {args.threads} threads; limits: read {limits.read_bytes_per_s / 1e9:.1f} GB/s, registers {peaks}\n")
        print(table(measured, limits) + "\n")
    about = {"machine": asdict(machine.describe()), "variant": variant, "threads": args.threads, "limits": asdict(limits)}
    print(json.dumps(about | {"measured": [asdict(one) for one in measured]}))


def _cases(args: argparse.Namespace, team: Team | None, limits: Limits) -> Iterator[Measured]:
    for weights in args.formats.split(","):
        for shape in filter(None, args.shapes.split(",")):
            n, k = map(int, shape.split("x"))
            for rows in map(int, args.rows.split(",")):
                routes = product_routes(team, weights, n, k, rows)
                yield from compare(f"{weights} {n}x{k}, {rows} rows", routes, 2 * n * k * rows, limits, args.repeat)
    for case in filter(None, args.attention.split(",")):
        batch, context = map(int, case.split("x"))
        ops = 4 * batch * context * HEADS * HEAD_WIDTH
        yield from compare(f"attention, {batch} x {context}", attention_routes(team, batch, context), ops, limits, args.repeat)


if __name__ == "__main__":
    main()
