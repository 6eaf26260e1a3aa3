"""What machine this is, and the two rates that bound a language model on it, measured through torch.

Both are taken on the device and with the threads that the benchmark used, in the same process: a figure from a data sheet, or from a quiet
hour, would say little about the run it is compared with.
"""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch

from gemel.bench.roofline import Rates
from gemel.ops import hardware

_PROBE_BYTES = 256 * 2**20  # several times the last-level cache of the machines we know, so that memory is what is read
_REPEATS = 7


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


def rates(device: torch.device, dtype: torch.dtype, rows: int = 1024) -> Rates:
    """Measure read bandwidth (a sum over memory) and the rate of a square matrix product of `rows`, each as the best of several."""
    buffer = torch.ones(_PROBE_BYTES // 4, dtype=torch.float32, device=device)
    read_s = _best_s(buffer.sum, device)
    del buffer
    left, right = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
    multiply_s = _best_s(lambda: left @ right, device)
    return Rates(_PROBE_BYTES / read_s, 2 * rows**3 / multiply_s)


def _best_s(work: Callable[[], torch.Tensor], device: torch.device) -> float:
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
