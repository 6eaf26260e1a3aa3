"""The loop: from one step to the next, with all that happens in between.

After every step a line of metrics; now and then a look at the validation data, and a checkpoint. Ctrl-C (or SIGTERM, with which schedulers
say that time is up) lets the step finish, saves and ends the run; a second one does not wait. What was saved is what the same command goes
on from.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gemel.config.train import TrainRecipe
from gemel.data.run.board import StopRequest
from gemel.train.checkpoint import Checkpoints
from gemel.train.loader import Loader, Prefetch, Source
from gemel.train.metrics import Metrics
from gemel.train.progress import Progress
from gemel.train.trainer import Trainer

Json = dict[str, Any]
STOPPING = "stopping after this step, with a checkpoint; again to stop now, which loses the steps since the last one"


@dataclass(frozen=True, slots=True)
class Result:
    """How far a run came. `finished` is false if it was asked to stop."""

    step: int
    loss: float | None
    validation_loss: float | None
    finished: bool


class Loop:
    """One run, until its end or until somebody stops it."""

    def __init__(
        self,
        recipe: TrainRecipe,
        trainer: Trainer,
        loader: Loader,
        validation: Sequence[Source],
        checkpoints: Checkpoints,
        metrics: Metrics,
        progress: Progress,
    ):
        self._recipe, self._trainer, self._loader, self._validation = recipe, trainer, loader, validation
        self._checkpoints, self._metrics, self._progress = checkpoints, metrics, progress
        self._position = loader.position

    def run(self) -> Result:
        """Steps until there are enough."""
        trainer, recipe = self._trainer, self._recipe
        loss = validation_loss = None
        saved = trainer.step
        with StopRequest(self._progress, STOPPING) as stop, Prefetch(self._loader) as steps:
            while trainer.step < recipe.steps and not stop.asked:
                began = time.perf_counter()
                work = next(steps)
                waited_s = time.perf_counter() - began
                report = trainer.learn(work)
                self._position = work.position
                step_s = time.perf_counter() - began
                loss = report.loss
                self._metrics.write(
                    {"step": report.step, "loss": report.loss, "norm": report.norm, "lr": report.lr, "step_s": step_s, "waited_s": waited_s}
                )
                self._progress.step(report.step, report.loss, report.norm, report.lr, report.num_tokens, 0.0, step_s)
                if recipe.save.every and trainer.step % recipe.save.every == 0:
                    self._save()
                    saved = trainer.step
            if trainer.step > saved:
                self._save()
        return Result(trainer.step, loss, validation_loss, trainer.step >= recipe.steps)

    def _save(self) -> None:
        state = {"trainer": self._trainer.state_dict(), "loader": self._position, "metrics_bytes": self._metrics.num_bytes}
        self._checkpoints.save(self._trainer.step, self._trainer.loaded, state)
