"""What a run says about itself while it goes: a line of JSON for every step and event, and where asked for the same for trackers.

    {"step": 7, "loss": 5.1, "z": 0.0, "norm": 1.2, "factor": 0.8, "lr": 0.0003, "tokens": 8192, "trained": 8192.0,
     "flops": 3.4e11, "step_s": 0.9, "wait_s": 0.0, "utilization": 0.5}
    {"step": 100, "event": "validation", "loss": 4.2, "sources": {"stdlib": 4.2}}

`trained` is the sum of weights that the loss was divided by, `wait_s` how much of `step_s` was spent waiting for data, and `utilization`
is there if the machine's peak is known. A step that was left out has `action` and `reason`. A run that goes on from a checkpoint cuts the
file back to where it was then, so that a step that was done twice is there once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gemel.train.trackers import Tracker
from gemel.train.trainer import Report

FILE = "metrics.jsonl"
SHOWN = ("loss", "z", "norm", "factor", "lr", "utilization")  # to trackers


class Metrics:
    """Writes metrics.jsonl, and tells trackers, which it closes."""

    def __init__(self, out: Path, num_bytes: int = 0, peak_flops_per_s: float | None = None, trackers: Sequence[Tracker] = ()):
        """`num_bytes` of what is there stay, if there are so many: somebody may have removed the file, or power failed."""
        self._peak, self._trackers = peak_flops_per_s, trackers
        self._file = (out / FILE).open("ab")
        os.truncate(out / FILE, min(num_bytes, self.num_bytes))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError) if error is not None else nullcontext():  # a full disk has been told of, and refuses what is buffered again
            self._file.close()
        for tracker in self._trackers:
            tracker.close(failed=error is not None)

    @property
    def num_bytes(self) -> int:
        """So far."""
        return os.fstat(self._file.fileno()).st_size

    def step(self, report: Report, step_s: float, wait_s: float) -> None:
        """A step is done."""
        values: dict[str, Any] = {"loss": report.loss, "z": report.z, "norm": report.norm, "factor": report.factor, "lr": report.lr}
        values |= {"tokens": report.num_tokens, "trained": report.num_trained, "flops": report.flops, "step_s": step_s, "wait_s": wait_s}
        if self._peak:
            values["utilization"] = report.flops / step_s / self._peak
        if report.action != "ok":
            values |= {"action": report.action, "reason": report.reason}
        self._write({"step": report.step} | values)
        self._show({f"train/{name}": values[name] for name in SHOWN if name in values}, report.step)

    def event(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        """Something else has happened."""
        self._write({"step": step, "event": name, **values})
        self._show({f"{name}/{key}": value for key, value in values.items() if isinstance(value, float)}, step)

    def _write(self, values: dict[str, Any]) -> None:
        """One line, there at once for whoever follows the file. What is not finite has no number in JSON and becomes text."""
        plain = {key: str(value) if isinstance(value, float) and value - value != 0 else value for key, value in values.items()}
        self._file.write(json.dumps(plain, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def _show(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers if values else ():
            tracker.show(values, step)


def read(out: Path) -> list[dict[str, Any]]:
    """All lines of a run, but for one that is being written. Numbers that are not finite are floats again."""
    data = (out / FILE).read_bytes()
    lines = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
    return [{key: float(value) if value in ("nan", "inf", "-inf") else value for key, value in line.items()} for line in lines]
