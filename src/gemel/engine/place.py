"""Where and how to compute: device, type and threads, decided once at start-up from what the hardware can do.

`auto` means the fastest type that loses nothing. The native kernels read weights in the type in which they are stored, and decoding is a
race against memory, so on a CPU with kernels that is bf16 for a checkpoint of 16 or fewer bits. In torch, on a CPU without bf16
instructions, a bf16 product is emulated, about eight times slower than fp32 from a handful of rows on, so there the answer is fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gemel.config.engine import EngineConfig
from gemel.config.errors import ConfigError
from gemel.ops import hardware

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


def choose(config: EngineConfig, stored: torch.dtype, lowers: Callable[[torch.device, torch.dtype], bool]) -> Place:
    """Resolve every `auto` of the configuration.

    `stored` is the type of the checkpoint's dense tensors; `lowers` says whether the model would run as a native program with a device and
    a compute type. Raises ConfigError for a device that is not here.
    """
    device, why_device = _device(config.device)
    dtype, why_dtype = _dtype(config.dtype, device, stored, lowers)
    cores = hardware.cores()
    threads = config.threads or cores.usable
    why_threads = "threads was set" if config.threads else cores.reason
    derived = (
        Derived("device", str(device), why_device),
        Derived("dtype", str(dtype).removeprefix("torch."), why_dtype),
        Derived("threads", str(threads), why_threads),
    )
    return Place(device, dtype, threads, derived)


def _device(wanted: str) -> tuple[torch.device, str]:
    if wanted == "auto":
        found = torch.cuda.is_available()
        return torch.device("cuda" if found else "cpu"), "CUDA was found" if found else "no CUDA device was found"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device = {wanted!r}, but torch {torch.__version__} finds no CUDA device here; use device = 'cpu' or 'auto'")
    return torch.device(wanted), "device was set"


def _dtype(
    wanted: str, device: torch.device, stored: torch.dtype, lowers: Callable[[torch.device, torch.dtype], bool]
) -> tuple[torch.dtype, str]:
    if wanted != "auto":
        return DTYPES[wanted], "dtype was set"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16, "the GPU has bf16") if native else (torch.float16, "the GPU has no bf16")
    if lowers(device, stored):
        return stored, "the type of the checkpoint, which the native kernels read"
    if lowers(device, torch.float32):
        return torch.float32, "the native kernels have no fp16, and bf16 would lose bits"
    if hardware.native_bf16():
        return torch.bfloat16, "the CPU multiplies bf16 natively"
    return torch.float32, "the CPU has no bf16 instructions: emulated bf16 is several times slower than fp32"
