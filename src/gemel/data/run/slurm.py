"""Tasks in the members of a SLURM job array, or of any set of processes that share the output folder and know their number.

Members do not talk to each other: each does the tasks whose number is its own modulo the size of the array, and sees what the others have
done by their records. So members may start at different times, die and be submitted again, also as an array of another size.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from gemel.config.data.pipeline import SlurmRun
from gemel.config.errors import ConfigError
from gemel.data.pipeline import Job, Stage
from gemel.data.run.board import Board, Interrupted, StopRequest
from gemel.data.run.local import Workers

POLL_S = 1.0


class NotYet(Exception):
    """Others have not done what this member needs; it can be run again later."""


def place(config: SlurmRun, variables: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Rank and world of this member. Errors: `ConfigError` if nothing says."""
    rank, world = config.rank, config.world
    if rank is None and "SLURM_ARRAY_TASK_ID" in variables:
        rank = int(variables["SLURM_ARRAY_TASK_ID"]) - int(variables.get("SLURM_ARRAY_TASK_MIN", "0"))
    if world is None and "SLURM_ARRAY_TASK_COUNT" in variables:
        world = int(variables["SLURM_ARRAY_TASK_COUNT"])
    if rank is None or world is None:
        raise ConfigError("this is no SLURM array job, so give --rank R --world N, or submit with sbatch --array=0-N")
    if not rank < world:
        raise ConfigError(f"rank = {rank} must be less than world = {world}; ranks count from 0, and array indices must have no gaps")
    return rank, world


def run(job: Job, rank: int, world: int, num_workers: int, wait_s: float, board: Board, stop: StopRequest) -> bool:
    """Do this member's part. True if it is the one that finishes the run, which then is ready to be finished. Errors: `NotYet`."""
    with Workers(job, num_workers, board, stop) as workers:
        for stage in job.stages:
            if job.finished:
                return False
            mine = [index for index in job.missing(stage) if index % world == rank]
            if mine:
                workers.do(stage, mine, f"{stage.name} (rank {rank} of {world})")
            if stage is not job.stages[-1] or rank == 0:
                _wait(job, stage, wait_s, board, stop)
    return rank == 0 and not job.finished


def _wait(job: Job, stage: Stage, wait_s: float, board: Board, stop: StopRequest) -> None:
    until, said = time.monotonic() + wait_s, False
    while (missing := job.missing(stage)) and not job.finished:
        what = f"{len(missing)} of {stage.num_tasks} tasks of {stage.name} are not done yet by other ranks (first: {missing[0]})"
        if stop.asked:
            raise Interrupted
        if time.monotonic() >= until:
            raise NotYet(f"{what}; after {wait_s:g} s of waiting this rank leaves. Run it again when they are done")
        if not said:
            board.say(f"waiting: {what}")
            said = True
        time.sleep(POLL_S)
