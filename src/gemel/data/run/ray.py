"""Tasks on a Ray cluster whose machines all see the output folder. Ray moves no documents: it only decides where a task runs."""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

from gemel.config.data.pipeline import RayRun
from gemel.config.errors import ConfigError, GemelError
from gemel.data.pipeline import Job, Stage
from gemel.data.run.board import Board, Interrupted, StopRequest
from gemel.data.run.local import ONE_THREAD, TaskFailed

POLL_S = 0.5


def run(job: Job, config: RayRun, num_workers: int | None, board: Board, stop: StopRequest) -> None:
    """Do all tasks. Errors: as those of the local runner."""
    try:
        import ray
    except ImportError:
        raise ConfigError("the Ray runner needs Ray: pip install 'gemel[ray]', or use --runner local") from None
    environment = {**ONE_THREAD, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    options: dict[str, Any] = {"address": config.address} if config.address else {"num_cpus": num_workers, "include_dashboard": False}
    ray.init(**options, runtime_env={"env_vars": environment}, log_to_driver=False, logging_level=logging.ERROR)
    try:
        most = num_workers or int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
        for stage in job.stages:
            _do(ray, job, stage, most, board, stop)
    finally:
        ray.shutdown()


def _do(ray: Any, job: Job, stage: Stage, most: int, board: Board, stop: StopRequest) -> None:
    waiting = deque(job.missing(stage))
    weights = {index: job.weight_bytes(stage, index) for index in waiting}
    board.begin(stage.name, weights, stage.num_tasks, sum(job.weight_bytes(stage, index) for index in range(stage.num_tasks)))
    remote = ray.remote(num_cpus=1, max_retries=1)(_perform)
    parts: dict[int, float] = {}
    running: dict[Any, int] = {}
    try:
        while running or (waiting and not stop.asked):
            while waiting and len(running) < most and not stop.asked:
                index = waiting.popleft()
                running[remote.remote(str(job.output), stage, index)] = index
            for finished in ray.wait(list(running), timeout=POLL_S)[0]:
                index = running.pop(finished)
                try:
                    ray.get(finished)
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, GemelError):
                        raise error.cause from None
                    raise TaskFailed(f"{job.describe(stage, index)} failed:\n{error}") from None
                except ray.exceptions.RayError as error:
                    raise TaskFailed(f"{job.describe(stage, index)} failed: {error}") from None
                parts[index] = 1.0
            board.update(parts)
    finally:
        board.end(parts)
    if waiting:
        raise Interrupted


@cache
def _job(output: str) -> Job:
    """One per process, because making steps may be slow."""
    return Job(Path(output))


def _perform(output: str, stage: Stage, index: int) -> None:
    _job(output).perform(stage, index, lambda _: None)
