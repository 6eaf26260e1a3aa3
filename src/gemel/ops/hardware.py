"""What this process may use: cores, memory, instruction sets. No torch, so that asking costs nothing.

`os.cpu_count()` says what the machine has. A container or `taskset` may allow far less, and a thread that has no core of its own makes a
matrix product slower, so the number of threads follows from the affinity mask, from the control groups' quota, and from how many of the
allowed CPUs are hyperthreads of one core (two of them share one multiplier).
"""

from __future__ import annotations

import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

# Sets that matter to matrix products, in the spelling of Linux. x86 above, ARM below.
ISA = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "avx_vnni", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
NATIVE_BF16 = ("avx512_bf16", "amx_bf16", "bf16")


@dataclass(frozen=True, slots=True)
class Cores:
    """`logical` CPUs of the machine, `allowed` by the affinity mask, on `physical` cores; `quota` is the control groups' limit in CPUs."""

    logical: int
    allowed: int
    physical: int
    quota: float | None

    @property
    def usable(self) -> int:
        """Threads that can each have a core of their own."""
        return max(1, min(self.physical, math.floor(self.quota + 0.5) if self.quota else self.physical))

    @property
    def reason(self) -> str:
        """Why `usable` is what it is."""
        if self.usable < self.physical:
            return f"the control group allows {self.quota:g} CPUs"
        if self.physical < self.allowed:
            return f"{self.allowed} CPUs are hyperthreads of {self.physical} cores"
        if self.allowed < self.logical:
            return f"the affinity mask allows {self.allowed} of {self.logical} CPUs"
        return "all cores of the machine"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `total` respects the control groups' limit; `available` is what can be taken without swapping."""

    total_bytes: int
    available_bytes: int


def cores(root: Path = Path("/")) -> Cores:
    """Cores that this process may use. `root` is where /proc and /sys are found."""
    logical = os.cpu_count() or 1
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(logical))
    topology = root / "sys/devices/system/cpu"
    places = {_read(topology / f"cpu{cpu}/topology/thread_siblings_list") or f"cpu {cpu}" for cpu in allowed}
    quotas = [quota for group in _groups(root, "cpu") if (quota := _quota(group)) is not None]
    return Cores(logical, len(allowed), len(places), min(quotas, default=None))


def memory(root: Path = Path("/")) -> Memory:
    """Memory that this process may use."""
    now = psutil.virtual_memory()
    total_bytes, available_bytes = int(now.total), int(now.available)
    for group in _groups(root, "memory"):
        limit = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
        used = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes")
        if limit.isdigit() and int(limit) < total_bytes:
            total_bytes = int(limit)
        if limit.isdigit() and used.isdigit():
            available_bytes = max(0, min(available_bytes, int(limit) - int(used)))
    return Memory(total_bytes, available_bytes)


def isa(root: Path = Path("/")) -> tuple[str, ...]:
    """Those of `ISA` that the processor has; empty where the system does not say."""
    found = (_cpuinfo(root, "flags") or _cpuinfo(root, "features")).split()
    return tuple(name for name in ISA if name in found)


def native_bf16(root: Path = Path("/")) -> bool:
    """True where the processor multiplies bf16. Elsewhere it is converted or emulated, several times slower than fp32."""
    return any(name in NATIVE_BF16 for name in isa(root))


def vendor(root: Path = Path("/")) -> str:
    """The maker of an x86 processor as it calls itself ("AuthenticAMD", "GenuineIntel"); empty elsewhere."""
    return _cpuinfo(root, "vendor_id")


def cpu_name(root: Path = Path("/")) -> str:
    """The processor in its maker's words."""
    return _cpuinfo(root, "model name") or platform.processor() or platform.machine()


def _cpuinfo(root: Path, name: str) -> str:
    """What Linux says under this name of the first CPU."""
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() == name:
            return value.strip()
    return ""


def _groups(root: Path, controller: str) -> list[Path]:
    """Folders of the control groups that this process is in, innermost first: the limits of all of them hold (cgroup v2, then v1)."""
    base = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            top = base
        elif controller in controllers.split(","):
            top = base / controller
        else:
            continue
        inner = top / path.lstrip("/")
        return [group for group in (inner, *inner.parents) if group == top or top in group.parents]
    return []


def _quota(group: Path) -> float | None:
    """CPUs per wall clock that the group may use, None without a limit."""
    quota, _, period = _read(group / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
