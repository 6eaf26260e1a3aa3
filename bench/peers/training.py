"""What every runner of training shares: the job that it is given, how its steps are timed, and the one line that it prints.

    python -m bench.peers.train_NAME JOB.json

A job names a Hugging Face directory with the weights to begin with, a file of token ids [steps, sequences, length], a precision, a learning
rate, threads, and how many of the steps are warm-up. A runner trains the steps in their order and calls `Clock.tick` when one is done; all
of what lies between two ticks is the step. AdamW with betas 0.9 and 0.95, no decay, a constant rate, gradients clipped to a norm of 1: the
losses of all runners must then be the same numbers, and who compares them knows that all did the same work.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

BETAS = (0.9, 0.95)
CLIP = 1.0


@dataclass(frozen=True)
class Job:
    """What is to be done. `precision` is fp32, or bf16 for fp32 weights under autocast."""

    model: Path
    tokens: Path
    precision: str
    lr: float
    threads: int

    @property
    def dtype(self) -> torch.dtype:
        """Of products."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def steps(self) -> torch.Tensor:
        """Token ids [steps, sequences, length]. Each sequence is a document; its first token is not predicted."""
        return torch.from_numpy(np.load(self.tokens))


class Clock:
    """Seconds of each step, and its loss if the runner has it at hand."""

    def __init__(self) -> None:
        self.step_s: list[float] = []
        self.losses: list[float] = []
        self._last = perf_counter()

    def start(self) -> None:
        """The first step begins now."""
        self._last = perf_counter()

    def tick(self, loss: float | None = None) -> None:
        """A step is done, its weights are moved."""
        now = perf_counter()
        self.step_s.append(now - self._last)
        if loss is not None:
            self.losses.append(loss)
        self._last = now


Train = Callable[[Job, Clock], dict[str, object]]


def main(train: Train, *packages: str) -> None:
    """A runner's main. `train` returns the settings worth telling."""
    values = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    job = Job(Path(values["model"]), Path(values["tokens"]), values["precision"], values["lr"], values["threads"])
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print as they like
    torch.set_num_threads(job.threads)
    base_bytes, clock = memory_bytes("VmRSS"), Clock()
    settings = train(job, clock)
    versions = {name: version(name) for name in (*packages, "torch")}
    said: dict[str, Any] = {"step_s": clock.step_s, "losses": clock.losses, "base_bytes": base_bytes}
    out.write(json.dumps(said | {"peak_bytes": memory_bytes("VmHWM"), "settings": settings, "versions": versions}) + "\n")
    out.flush()


def memory_bytes(field: str) -> int:
    """VmRSS: resident now; VmHWM: at most so far. `getrusage` would count what the parent had before this program was started."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024
