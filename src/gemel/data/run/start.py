"""A recipe from its beginning, or from where it was left, to its end."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

from gemel.config.data.pipeline import LocalRun, RayRun, Recipe, SlurmRun
from gemel.config.errors import ConfigError
from gemel.data import manifest
from gemel.data.pipeline import Job
from gemel.data.run import local, slurm
from gemel.data.run.board import Board, StopRequest
from gemel.data.stats import Stats


def run(recipe: Recipe, board: Board | None = None, stop: StopRequest | None = None) -> Stats | None:
    """Do what is missing of a run. None if other members of an array have to finish it. Who passes `stop` has entered it, and asks it
    afterwards: a run that was nearly done when somebody pressed Ctrl-C comes to its end.

    Errors: `ConfigError` and its kin; `local.TaskFailed`; `slurm.NotYet`; `board.Interrupted`. After all of them the same call goes on.
    """
    board = board or Board(quiet=True)
    if recipe.output.path is None:
        raise ConfigError("the recipe names no output.path; give --output DIR")
    output = Path(recipe.output.path)
    place = slurm.place(recipe.run) if isinstance(recipe.run, SlurmRun) else None
    job = Job.begin(recipe, output)
    if job.finished:
        board.say(f"{output} is finished already")
        return job.stats()
    with manifest.Lock(output, shared=place is not None), nullcontext(stop) if stop else StopRequest(board) as stop:
        match recipe.run:
            case LocalRun():
                with local.Workers(job, recipe.run.workers or usable_cores(), board, stop) as workers:
                    for stage in job.stages:
                        if missing := job.missing(stage):
                            workers.do(stage, missing, stage.name)
            case SlurmRun():
                assert place is not None
                if not slurm.run(job, *place, recipe.run.workers or usable_cores(), recipe.run.wait_s, board, stop):
                    return job.stats() if job.finished else None
            case RayRun():
                from gemel.data.run import ray

                ray.run(job, recipe.run, recipe.run.workers, board, stop)
        return job.finish()


def usable_cores(root: Path = Path("/")) -> int:
    """CPUs that this process may use: its affinity mask, less what the control group's quota withholds. `root` is where /sys is found.

    Hyperthreads count: text is not arithmetic, two threads of a core do more of it than one. (`gemel.ops.hardware` counts cores, for
    those who multiply matrices.)
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else max(1, min(allowed, round(int(quota) / int(period))))
