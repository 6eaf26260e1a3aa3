"""Tasks in processes of this machine.

Each worker has its own pipe and is handed one task at a time, so that it is known what a worker was doing when it dies. Workers are
spawned, not forked: a fork of a process with threads (and every library here has some) may hang.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gemel.config.errors import ConfigError, GemelError
from gemel.data.pipeline import Job, Stage
from gemel.data.run.board import Board, Interrupted, StopRequest

PART_EVERY_S = 0.2
MOST_DEATHS = 2  # of workers on one task: once may be somebody else's memory, twice is the task
SPAWN = multiprocessing.get_context("spawn")
# Workers share the cores already; a library that starts a thread per core in each of them only makes them wait for each other.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class TaskFailed(RuntimeError):
    """A task raised, or its worker died. The others are not affected, and a restart tries it again."""


@dataclass(slots=True)
class Worker:
    """A process, the end of its pipe that is ours, and the task that it is doing."""

    process: Any
    pipe: connection.Connection
    task: int | None = None


class Workers:
    """Processes that do tasks, until the `with` block ends."""

    def __init__(self, job: Job, num_workers: int, board: Board, stop: StopRequest):
        self._job, self._board, self._stop = job, board, stop
        self._num_workers = num_workers
        self._workers: list[Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in self._workers:
            if kind is None or issubclass(kind, Interrupted):
                worker.pipe.close()  # the worker reads the end of it and leaves
            else:
                worker.process.kill()
        for worker in self._workers:
            worker.process.join()

    def do(self, stage: Stage, tasks: Iterable[int], title: str) -> None:
        """Do some tasks of a stage. Errors: what the user can mend as `GemelError`, else `TaskFailed`; `Interrupted` after Ctrl-C."""
        waiting = deque(tasks)
        weights = {index: self._job.weight_bytes(stage, index) for index in waiting}
        total_bytes = sum(self._job.weight_bytes(stage, index) for index in range(stage.num_tasks))
        self._board.begin(title, weights, stage.num_tasks, total_bytes)
        run = _StageRun(stage, waiting)
        try:
            while True:
                self._hand_out(run)
                busy = [worker for worker in self._workers if worker.task is not None]
                if not busy:
                    break
                for worker in _ready(busy):
                    self._hear(worker, run)
                self._board.update(run.parts)
        finally:
            self._board.end(run.parts)
        if run.error is not None:
            raise run.error
        if run.waiting:
            raise Interrupted

    def _hand_out(self, run: _StageRun) -> None:
        while run.waiting and not self._stop.asked and run.error is None:
            idle = next((worker for worker in self._workers if worker.task is None), None)
            if idle is None and len(self._workers) >= self._num_workers:
                return
            if idle is None:
                idle = self._start()
            idle.task = run.waiting.popleft()
            run.parts[idle.task] = 0.0
            idle.pipe.send((run.stage, idle.task))

    def _start(self) -> Worker:
        ours, theirs = SPAWN.Pipe()
        before = {name: os.environ.get(name) for name in ONE_THREAD}
        os.environ.update({name: value for name, value in ONE_THREAD.items() if before[name] is None})
        try:
            process = SPAWN.Process(target=_work, args=(self._job.output, theirs), daemon=True)
            process.start()
        finally:
            for name in (name for name, value in before.items() if value is None):
                del os.environ[name]
        theirs.close()
        worker = Worker(process, ours)
        self._workers.append(worker)
        return worker

    def _hear(self, worker: Worker, run: _StageRun) -> None:
        """One message of a worker, or its death."""
        task = worker.task
        assert task is not None
        try:
            kind, value = worker.pipe.recv()
        except (EOFError, OSError):
            self._bury(worker, run)
            return
        if kind == "part":
            run.parts[task] = min(value, 0.999)  # it is done when it is recorded
            return
        worker.task = None
        run.parts[task] = 1.0 if kind == "done" else 0.0
        if kind == "user":
            run.error = ConfigError(value)
        elif kind == "failed":
            run.error = TaskFailed(f"{self._job.describe(run.stage, task)} failed:\n{value}")

    def _bury(self, worker: Worker, run: _StageRun) -> None:
        assert worker.task is not None
        worker.process.join()
        self._workers.remove(worker)
        run.parts.pop(worker.task)
        code = worker.process.exitcode
        how = f"of {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        what = f"a worker died {how} on {self._job.describe(run.stage, worker.task)}"
        run.deaths[worker.task] = run.deaths.get(worker.task, 0) + 1
        if run.deaths[worker.task] < MOST_DEATHS:
            self._board.say(f"{what}; trying again")
            run.waiting.appendleft(worker.task)
        else:
            run.error = TaskFailed(f"{what}, twice; SIGKILL usually means that memory ran out: try --workers 1, or a smaller unit_bytes")


class _StageRun:
    """What is going on in one stage."""

    def __init__(self, stage: Stage, waiting: deque[int]):
        self.stage, self.waiting = stage, waiting
        self.parts: dict[int, float] = {}
        self.deaths: dict[int, int] = {}
        self.error: Exception | None = None


def _ready(busy: list[Worker]) -> list[Worker]:
    found = connection.wait([worker.pipe for worker in busy], timeout=PART_EVERY_S)
    return [worker for worker in busy if worker.pipe in found]


def _work(output: Path, pipe: connection.Connection) -> None:
    """What a worker does, until its pipe closes. A worker whose parent is gone leaves at once: somebody may have begun to resume."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of the terminal; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    job = Job(output)
    while True:
        try:
            stage, index = pipe.recv()
        except EOFError:
            return
        reporter = _Reporter(pipe)
        try:
            job.perform(stage, index, reporter)
            pipe.send(("done", None))
        except GemelError as error:
            pipe.send(("user", str(error)))
        except Exception:
            pipe.send(("failed", traceback.format_exc()))


class _Reporter:
    """Tells the parent how far a task is, not too often."""

    def __init__(self, pipe: connection.Connection):
        self._pipe, self._last = pipe, 0.0

    def __call__(self, part: float) -> None:
        now = time.monotonic()
        if now - self._last >= PART_EVERY_S:
            self._last = now
            self._pipe.send(("part", part))


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
