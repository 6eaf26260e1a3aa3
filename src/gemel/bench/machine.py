"""What machine this is, and the rates that bound a language model on it: reading memory, and multiplying matrices in each arithmetic.

All are taken on the device and with the threads that the benchmark used, in the same process: a figure from a data sheet, or from a quiet
hour, would say little about the run it is compared with. The rate of an arithmetic is the best that torch or the native kernels reach with
a large product; `bench/kernels.py` measures what the processor's multipliers could do beyond that.
"""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch

from gemel.bench.product import Product, Team
from gemel.bench.roofline import Rates
from gemel.ops import hardware
from gemel.ops.cpu import native

_PROBE_BYTES = 256 * 2**20  # several times the last-level cache of the machines we know, so that memory is what is read
_REPEATS = 7
_ROWS = 1024  # of the products
_INT8 = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True, slots=True)
class Machine:
    """A description for the head of a table. `load` is the system's one-minute load average: above zero, others were computing too."""

    cpu: str
    cores: int
    memory_bytes: int
    isa: tuple[str, ...]
    accelerator: str | None
    system: str
    python: str
    torch: str
    load: float


def describe() -> Machine:
    """Look at the machine."""
    return Machine(
        cpu=hardware.cpu_name(),
        cores=hardware.cores().usable,
        memory_bytes=hardware.memory().total_bytes,
        isa=hardware.isa(),
        accelerator=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=torch.__version__,
        load=os.getloadavg()[0],
    )


def rates(device: torch.device, arithmetics: Sequence[str]) -> Rates:
    """Measure read bandwidth (a sum over memory) and the rate of a large product in each of `arithmetics`, as the best of several.

    No arithmetic is rated below fp32: its operands could always be widened.
    """
    buffer = torch.ones(_PROBE_BYTES // 4, dtype=torch.float32, device=device)
    read_s = _best_s(buffer.sum, device)
    del buffer
    flops_per_s = {arithmetic: max(_peaks(arithmetic, device), default=0.0) for arithmetic in {*arithmetics, "float32"}}
    widened = {arithmetic: max(rate, flops_per_s["float32"]) for arithmetic, rate in flops_per_s.items()}
    return Rates(_PROBE_BYTES / read_s, {arithmetic: widened[arithmetic] for arithmetic in sorted(arithmetics)})


def _peaks(arithmetic: str, device: torch.device) -> Iterator[float]:
    """Operations per second through each route there is, but for those that would emulate the arithmetic and take minutes for it."""
    flops = 2 * _ROWS**3
    has_int8 = any(name in hardware.isa() for name in _INT8)
    if device.type == "cuda" or {"bfloat16": hardware.native_bf16(), "int8": has_int8}.get(arithmetic, True):
        left, right = (torch.ones(_ROWS, _ROWS, device=device).to(getattr(torch, arithmetic)) for _ in range(2))
        multiply = torch._int_mm if arithmetic == "int8" else torch.mm
        yield flops / _best_s(partial(multiply, left, right), device)
    library, _ = native.find()
    if device.type == "cpu" and library is not None and arithmetic != "float16":
        team = Team(library, torch.get_num_threads())
        product, x_MK, y_MN = Product(team, arithmetic, _ROWS, _ROWS), torch.ones(_ROWS, _ROWS), torch.empty(_ROWS, _ROWS)
        yield flops / _best_s(partial(product, x_MK, y_MN), device)
        team.close()


def _best_s(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of several runs: noise only ever adds time, and a plan is to be the limit."""
    times_s = []
    for _ in range(_REPEATS):
        _synchronize(device)
        start_s = perf_counter()
        work()
        _synchronize(device)
        times_s.append(perf_counter() - start_s)
    return min(times_s)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes() -> int:
    """The largest resident size this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
