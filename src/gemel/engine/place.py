"""Where and how to compute: device, type and threads, decided once at start-up from what the hardware can do.

`auto` means the fastest type that the hardware multiplies natively. On a CPU without bf16 instructions a bf16 matrix
product is emulated, about eight times slower than fp32 from a handful of rows on, so there the answer is fp32.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from gemel.config.engine import EngineConfig
from gemel.config.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Derived:
    """A value that was worked out, not set, and why it is what it is."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class Place:
    """Device, compute type and threads of one engine."""

    device: torch.device
    dtype: torch.dtype
    threads: int
    derived: tuple[Derived, ...]


def choose(config: EngineConfig) -> Place:
    """Resolve every `auto` of the configuration. Raises ConfigError for a device that is not here."""
    device, why_device = _device(config.device)
    dtype, why_dtype = _dtype(config.dtype, device)
    threads = config.threads or usable_cores()
    why_threads = "threads was set" if config.threads else "physical cores that this process may use"
    derived = (
        Derived("device", str(device), why_device),
        Derived("dtype", str(dtype).removeprefix("torch."), why_dtype),
        Derived("threads", str(threads), why_threads),
    )
    return Place(device, dtype, threads, derived)


def usable_cores() -> int:
    """Physical cores, as far as affinity and the container's CPU quota allow; at least 1."""
    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min(physical, allowed, _cgroup_quota() or physical))


def _cgroup_quota() -> int | None:
    """CPUs granted by cgroup v2 (cpu.max) or v1 (cfs quota), rounded up, or None for no limit."""
    v2, v1 = Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    try:
        if v2.exists():
            quota, period = v2.read_text().split()
            return None if quota == "max" else -(-int(quota) // int(period))
        quota_us = int(v1.read_text())
        return None if quota_us < 0 else -(-quota_us // int(v1.with_name("cpu.cfs_period_us").read_text()))
    except (OSError, ValueError):
        return None


def _device(wanted: str) -> tuple[torch.device, str]:
    if wanted == "auto":
        found = torch.cuda.is_available()
        return torch.device("cuda" if found else "cpu"), "CUDA was found" if found else "no CUDA device was found"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device = {wanted!r}, but torch {torch.__version__} finds no CUDA device here; use device = 'cpu' or 'auto'")
    return torch.device(wanted), "device was set"


def _dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    if wanted != "auto":
        return DTYPES[wanted], "dtype was set"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16, "the GPU has bf16") if native else (torch.float16, "the GPU has no bf16")
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16, "the CPU multiplies bf16 natively"
    return torch.float32, "the CPU has no bf16 instructions: emulated bf16 is several times slower than fp32"
