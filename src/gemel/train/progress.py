"""The line that shows how far a run is, how fast it goes, and how much of the machine it uses."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from gemel.data.run.board import clock

TTY_EVERY_S, LOG_EVERY_S = 0.5, 15.0


class Progress:
    """On a terminal one line that changes, in a log a line now and then. `peak_flops_per_s` is what utilization is measured against."""

    def __init__(self, num_steps: int, peak_flops_per_s: float | None = None, quiet: bool = False, stream: TextIO | None = None):
        self._num_steps, self._peak, self._quiet = num_steps, peak_flops_per_s, quiet
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._shown = self._began = time.monotonic()
        self._steps = self._tokens = 0
        self._flops = self._busy_s = 0.0

    def step(self, step: int, loss: float, norm: float, lr: float, num_tokens: int, flops: float, step_s: float) -> None:
        """A step is done."""
        self._steps += 1
        self._tokens += num_tokens
        self._flops += flops
        self._busy_s += step_s
        now = time.monotonic()
        last = step == self._num_steps
        if self._quiet or (not last and now - self._shown < (TTY_EVERY_S if self._terminal else LOG_EVERY_S)):
            return
        self._shown = now
        left_s = (self._num_steps - step) * (now - self._began) / self._steps
        text = (
            f"step {step}/{self._num_steps}, loss {loss:.3f}, norm {norm:.2f}, rate {lr:.2e}, {self._tokens / self._busy_s:,.0f} tokens/s"
        )
        if self._peak:
            text += f", {self._flops / self._busy_s / self._peak:.0%} of peak"
        text += f", {clock(left_s)} left" if not last else f", took {clock(now - self._began)}"
        self._stream.write(f"\r{text}\x1b[K" + ("\n" if last else "") if self._terminal else f"{text}\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """A message among the progress."""
        if not self._quiet:
            self._stream.write(f"\r\x1b[Kgemel: {text}\n" if self._terminal else f"gemel: {text}\n")
            self._stream.flush()
