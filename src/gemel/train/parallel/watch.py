"""Who died, who hangs: a rank that does not go on ends the job with a message that names it.

When one rank of many stops, the others wait for it in the middle of some sum, and what they finally report is the sum. So each rank has a
thread that says twice a second, through the store where ranks first met, that it lives, and how far it is. One rank judges:

    failed    a rank said with its last breath what went wrong
    died      a rank says nothing any more
    hangs     all live and none goes on: the rank that is least far is the one that the others wait for

The verdict lies in the store, so every rank ends with the same. Ranks that wait in a sum cannot be asked to end; their thread ends them.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from gemel.config.errors import RankError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

BEAT_S = 0.5
SILENT_S = 30.0  # a process may be slow for a while without being dead
SILENT_AFTER_ERROR_S = 5.0  # when somebody has lost a connection already
CAUSED = re.compile(r"connection|gloo|nccl|timed? ?out|socket|peer|store", re.IGNORECASE)  # what errors of waiting for others speak of


@dataclass(slots=True)
class Seen:
    """What is known of a rank: its last message, when it came, and when it last said that it had gone on. Seconds of our own clock."""

    message: str = ""
    heard_s: float = field(default_factory=time.monotonic)
    moved_s: float = field(default_factory=time.monotonic)

    @property
    def progress(self) -> tuple[int, ...]:
        """How far it is; empty if it has not begun."""
        count = self.message.split("|", 2)[1] if self.message else ""
        return (int(count),) if count and count != "0" else ()

    @property
    def where(self) -> str:
        """The place in the program."""
        return self.message.split("|", 2)[2] if self.message else ""


class Watch:
    """Of one rank over all. The first rank judges the others, the second judges the first."""

    def __init__(self, store: Store, rank: int, num_ranks: int, timeout_s: float):
        self._store, self._rank, self._num_ranks, self._timeout_s = store, rank, num_ranks, timeout_s
        self._judges = range(1, num_ranks) if rank == 0 else range(1) if rank == 1 else range(0)
        self._seen = {other: Seen() for other in range(num_ranks)}
        self._count, self._where = 0, "prepares"
        self._patience_s = SILENT_S
        self._closing, self._told = threading.Event(), threading.Event()
        self._verdict = ""
        self._ended = False  # the main thread is on its way out by itself
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)

    def at(self, where: str) -> None:
        """The main thread has come here."""
        self._where = where
        self._count += 1

    def __enter__(self) -> Self:
        self._store.set(f"who/{self._rank}", f"rank {self._rank} ({socket.gethostname()}, process {os.getpid()})")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended = True
        caused = isinstance(error, RuntimeError) and CAUSED.search(str(error)) is not None
        if caused:
            self._patience_s = SILENT_AFTER_ERROR_S
            self._told.wait(SILENT_AFTER_ERROR_S + 4 * BEAT_S)
        elif error is not None and not isinstance(error, KeyboardInterrupt | RankError):
            self._say(f"failed/{self._rank}", f"{type(error).__name__}: {error}")
            if self._rank == 0:
                time.sleep(4 * BEAT_S)  # what the others read may be read from this process
        elif error is None:
            self._say(f"done/{self._rank}", "done")
        self._closing.set()
        self._thread.join(4 * BEAT_S)
        if caused and self._verdict:
            raise RankError(self._verdict) from error

    def _say(self, key: str, text: str) -> None:
        try:
            self._store.set(key, text)
        except RuntimeError:
            return  # nobody is there to hear it

    def _work(self) -> None:
        beat = 0
        while not self._closing.is_set() and not self._verdict:
            beat += 1
            try:
                self._store.set(f"pulse/{self._rank}", f"{beat}|{self._count}|{self._where}")
                self._verdict = self._heard()
            except RuntimeError:  # of the store, which one process has
                self._verdict = "the process where all ranks meet is gone: rank 0, or the launcher; see what it said last"
            if not self._verdict:
                self._closing.wait(BEAT_S)
        self._told.set()
        if self._verdict and not self._closing.wait(4 * BEAT_S) and not self._ended:
            speaker = 1 if self._verdict.startswith("rank 0 ") else 0
            end(self._verdict, speaks=self._rank == speaker)

    def _heard(self) -> str:
        """The verdict, if there is one."""
        if self._store.check(["verdict"]):
            return self._text("verdict")
        if verdict := self._judge():
            self._store.set("verdict", verdict)
        return verdict

    def _judge(self) -> str:
        now = time.monotonic()
        for other in self._others():
            if self._store.check([f"failed/{other}"]):
                return f"{self._who(other)} failed: {self._text(f'failed/{other}')}"
            seen, message = self._seen[other], self._text(f"pulse/{other}") if self._store.check([f"pulse/{other}"]) else ""
            if message != seen.message:
                before, seen.message, seen.heard_s = seen.progress, message, now
                seen.moved_s = now if seen.progress != before else seen.moved_s
            elif now - seen.heard_s > self._patience_s and not self._store.check([f"done/{other}"]):
                last = f" while it was at: {seen.where}" if seen.message else " and never was"
                return f"{self._who(other)} has not been heard of for {now - seen.heard_s:.0f} s{last}; it died, or its machine did"
        return self._hangs(now) if self._rank == 0 else ""

    def _others(self) -> range:
        """Whom this rank judges: in trouble everybody."""
        return range(self._num_ranks) if self._rank == 0 or self._ended else self._judges

    def _hangs(self, now: float) -> str:
        seen = self._seen.values()
        if not all(one.progress for one in seen) or now - max(one.moved_s for one in seen) < self._timeout_s:
            return ""
        least = min(one.progress for one in seen)
        behind = [rank for rank, one in self._seen.items() if one.progress == least]
        if len(behind) == self._num_ranks:
            return f"no rank has gone on for {self._timeout_s:g} s; all are at: {self._seen[0].where}"
        ahead = next(one for one in seen if one.progress != least)
        names = " and ".join(map(self._who, behind))
        return (
            f"{names} has not gone on for {self._timeout_s:g} s (parallel.timeout_s) while it was at: {self._seen[behind[0]].where}; "
            f"others wait for it at: {ahead.where}"
        )

    def _who(self, rank: int) -> str:
        return self._text(f"who/{rank}") if self._store.check([f"who/{rank}"]) else f"rank {rank}"

    def _text(self, key: str) -> str:
        return bytes(self._store.get(key)).decode()


def record(error: BaseException) -> None:
    """Leave word for torchrun, which reports the first error of a job."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        handler: Any = get_error_handler()
        handler.record_exception(error)


def end(verdict: str, speaks: bool) -> None:
    """End a process whose main thread cannot be reached."""
    record(RankError(verdict))
    if speaks:
        print(f"gemel: {verdict}", file=sys.stderr, flush=True)
    os._exit(1)
