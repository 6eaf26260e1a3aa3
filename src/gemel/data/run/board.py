"""The line that shows how far a run is, and the way a person stops it."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Protocol, Self, TextIO

TTY_EVERY_S, LOG_EVERY_S = 0.2, 15.0
LEAST_S = 1.0  # a rate over less time than this says nothing
STOPPING = "stopping when the tasks that have begun are finished; again to stop now (nothing is lost, only they are redone)"


class Speaker(Protocol):
    """Who tells a person something."""

    def say(self, text: str) -> None:
        """A message."""


class Interrupted(KeyboardInterrupt):
    """A person asked to stop, and everything that had begun was finished first."""


class Board:
    """Progress on a stream: one line that changes on a terminal, a line now and then in a log. Amounts are bytes of input."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False):
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._terminal = self._stream.isatty()
        self._shown = self._began = 0.0
        self._title, self._num_tasks = "", 0
        self._done_before = self._total = 0
        self._weights: Mapping[int, int] = {}

    def begin(self, title: str, weights: Mapping[int, int], num_tasks: int, total_bytes: int) -> None:
        """A stage begins: what each of its missing tasks weighs, how many tasks it has and what all of them weigh."""
        self._title, self._num_tasks, self._total = title, num_tasks, max(total_bytes, 1)
        self._weights = weights
        self._done_before = total_bytes - sum(weights.values())
        self._began = time.monotonic()
        self._shown = self._began - LOG_EVERY_S + LEAST_S

    def update(self, parts: Mapping[int, float], force: bool = False) -> None:
        """How much of each missing task is done, 0 to 1; tasks that are not named have not begun."""
        now = time.monotonic()
        if self._quiet or (not force and now - self._shown < (TTY_EVERY_S if self._terminal else LOG_EVERY_S)):
            return
        self._shown = now
        new = sum(self._weights[index] * part for index, part in parts.items())
        num_done = self._num_tasks - len(self._weights) + sum(part == 1.0 for part in parts.values())
        text = f"{self._title}: {num_done} of {self._num_tasks}, {(self._done_before + new) / self._total:.0%}"
        spent = now - self._began
        if new and spent > LEAST_S:
            left = (sum(self._weights.values()) - new) * spent / new
            text += f", {new / spent / 1e6:.1f} MB/s" + (f", {clock(left)} left" if left else f", took {clock(spent)}")
        self._stream.write(f"\r{text}\x1b[K" if self._terminal else f"{text}\n")
        self._stream.flush()

    def end(self, parts: Mapping[int, float]) -> None:
        """The stage is over, or is being left."""
        self.update(parts, force=True)
        if self._terminal and not self._quiet:
            self._stream.write("\n")

    def say(self, text: str) -> None:
        """A message among the progress."""
        self._stream.write(f"\r\x1b[Kgemel: {text}\n" if self._terminal else f"gemel: {text}\n")
        self._stream.flush()


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class StopRequest:
    """Ctrl-C and SIGTERM: the first asks to stop once what has begun is finished, the second does not wait.

    SIGTERM counts because that is how job schedulers say that time is up.
    """

    def __init__(self, board: Speaker, text: str = STOPPING):
        self._board, self._text = board, text
        self.asked = False

    def __enter__(self) -> Self:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._board.say(self._text)
