"""The line that shows how far a run is, how fast it goes, and how much of the machine it uses."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from gemel.data.run.board import clock
from gemel.train.trainer import Report

TTY_EVERY_S, LOG_EVERY_S = 0.5, 15.0


class Progress:
    """On a terminal one line that changes, in a log a line now and then. `peak_flops_per_s` is what utilization is measured against."""

    def __init__(self, num_steps: int, peak_flops_per_s: float | None = None, quiet: bool = False, stream: TextIO | None = None):
        self._num_steps, self._peak, self.quiet = num_steps, peak_flops_per_s, quiet
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._shown = self._began = time.monotonic()
        self._steps = self._tokens = 0
        self._flops = self._busy_s = 0.0

    def step(self, report: Report, step_s: float) -> None:
        """A step is done."""
        self._steps += 1
        self._tokens += report.num_tokens
        self._flops += report.flops
        self._busy_s += step_s
        now = time.monotonic()
        last = report.step == self._num_steps
        if self.quiet or (not last and now - self._shown < (TTY_EVERY_S if self._terminal else LOG_EVERY_S)):
            return
        self._shown = now
        spent_s = now - self._began
        rate = f"{self._tokens / self._busy_s:,.0f} tokens/s"
        if self._peak:
            rate += f" ({self._flops / self._busy_s / self._peak:.0%} of peak)"
        left = f"took {clock(spent_s)}" if last else f"{clock((self._num_steps - report.step) * spent_s / self._steps)} left"
        done = f"step {report.step}/{self._num_steps}, loss {report.loss:.3f}, norm {report.norm:.2f}, rate {report.lr:.2e}"
        self._line(f"{done}, {rate}, {left}", stays=last)

    def say(self, text: str) -> None:
        """A message among the progress."""
        if not self.quiet:
            self._line(f"gemel: {text}", stays=True)

    def _line(self, text: str, stays: bool) -> None:
        start, end = ("\r", "\x1b[K" + "\n" * stays) if self._terminal else ("", "\n")
        self._stream.write(f"{start}{text}{end}")
        self._stream.flush()
