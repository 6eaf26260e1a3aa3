"""Whole runs on several processes: on one mesh and then on another, and with a rank that dies, hangs or fails. Run as a program, for the
same reason as `job`: it forks, and computes nothing itself.

Every scenario has a folder of its own, in which each rank leaves what it said and how it ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemel.config.errors import GemelError
from gemel.train.loader import Step
from gemel.train.parallel import watch
from gemel.train.parallel.mesh import Mesh
from gemel.train.run import run
from gemel.train.trainer import Report, Trainer
from tests.train import runs
from tests.train.parallel.job import fork, free_port

SHARED = {
    "optim__schedule": {"kind": "constant"},
    "save__every": 2,
    "save__asynchronous": False,
    "data__holdout": 0.1,
    "validation__every": 3,
}
ONE = {"shard": 2, "zero": "gradients"}
OTHER = {"tensor": 2, "sequence": True}
FAULTY_RANK, FAULTY_STEP = 1, 3


def scenario(
    folder: Path, name: str, mesh: dict[str, Any] | None, steps: int, fault: Callable[[], None] | None = None, **changes: Any
) -> None:
    """A run of as many ranks as the mesh takes, in `folder/name`; `fault` happens in one rank at the beginning of a step."""
    out = folder / name
    out.mkdir(exist_ok=True)
    recipe = runs.recipe(folder, out=str(out / "out"), steps=steps, parallel=mesh or {}, threads=1, **{**SHARED, **changes})
    port = free_port()

    def rank_work(rank: int) -> None:
        with (out / f"stderr{rank}").open("ab") as said:
            os.dup2(said.fileno(), 2)
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": recipe.parallel.num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in names.items()} | {"TORCHELASTIC_ERROR_FILE": str(out / f"error{rank}")})
        watch.BEAT_S, watch.SILENT_S, watch.SILENT_AFTER_ERROR_S = 0.1, 2.0, 1.0
        if rank == FAULTY_RANK and fault is not None:
            make_faulty(fault)
        try:
            result = run(recipe, quiet=True)
            (out / f"result{rank}").write_text(json.dumps([result.step, result.loss, result.validation_loss, result.finished]))
        except GemelError as error:
            print(f"gemel: {error}", file=sys.stderr)
            sys.exit(2)

    began = time.monotonic()
    statuses = fork(recipe.parallel.num_ranks, rank_work)
    (out / "outcome.json").write_text(json.dumps({"statuses": statuses, "took_s": time.monotonic() - began}))


def make_faulty(fault: Callable[[], None]) -> None:
    learn = Trainer.learn

    def faulty(self: Trainer, work: Step) -> Report:
        if self.step + 1 == FAULTY_STEP:
            fault()
        return learn(self, work)

    Trainer.learn = faulty  # type: ignore[method-assign]


def die_before_the_commit() -> None:
    """When the next save has written this rank's share, and before anybody hears of it."""

    def dies(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    Mesh.tell = dies  # type: ignore[method-assign]


def fail() -> None:
    raise OSError("no space left on device")


def main(folder: Path) -> None:
    runs.values(folder)
    scenario(folder, "alone", None, 8)
    scenario(folder, "moved", ONE, 4, save__asynchronous=True)
    scenario(folder, "moved", OTHER, 8, save__asynchronous=True)
    scenario(folder, "stopped", OTHER, 8, lambda: os.kill(os.getpid(), signal.SIGINT), save__asynchronous=True)
    scenario(folder, "died", ONE, 8, lambda: os.kill(os.getpid(), signal.SIGKILL))
    scenario(folder, "killed", ONE, 8, die_before_the_commit)
    (folder / "killed/outcome.json").rename(folder / "killed/before.json")
    (folder / "killed/latest").symlink_to((folder / "killed/out/latest").readlink())
    scenario(folder, "killed", OTHER, 8)
    scenario(folder, "failed", ONE, 8, fail)
    scenario(folder, "hangs", ONE, 8, lambda: time.sleep(1000), parallel__timeout_s=2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
