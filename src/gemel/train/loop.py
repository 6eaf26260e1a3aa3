"""The loop: from one step to the next, with all that happens in between.

After every step a line of metrics; now and then a look at the validation data, and a checkpoint. When the detector says that the weights
are bad, they become again what the last checkpoint holds, and the data goes on from where it is: what led there is passed over.

Ctrl-C (or SIGTERM, with which schedulers say that time is up) lets the step finish, saves and ends the run; a second one does not wait. The
same command goes on from what was saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gemel.config.errors import ConfigError
from gemel.config.train import TrainRecipe
from gemel.data.run.board import StopRequest
from gemel.model import build
from gemel.train.checkpoint import Checkpoints, Found
from gemel.train.loader import Loader, Prefetch, Source, Step, passage
from gemel.train.metrics import Metrics
from gemel.train.parallel.mesh import Mesh
from gemel.train.progress import Progress
from gemel.train.trainer import Report, Trainer

Json = dict[str, Any]
Watch = Callable[[int, float], bool]  # step and validation loss; whether to give up
STOPPING = "stopping after this step, with a checkpoint; again to stop now, which loses the steps since the last one"


@dataclass(frozen=True, slots=True)
class Result:
    """How far a run came. `finished` is false if somebody asked it to stop; losses are None where there was nothing to measure."""

    step: int
    loss: float | None
    validation_loss: float | None
    finished: bool


@dataclass(slots=True)
class Best:
    """The least validation loss, and how many looks there were since."""

    loss: float = math.inf
    looks_since: int = 0


class Loop:
    """One run, until its end or until somebody stops it."""

    def __init__(
        self,
        recipe: TrainRecipe,
        trainer: Trainer,
        loader: Loader,
        validation: Sequence[Source],
        checkpoints: Checkpoints,
        metrics: Metrics | None,
        progress: Progress,
        mesh: Mesh | None = None,
        watch: Watch | None = None,
    ):
        """Of several ranks each has a loop, and all do the same; the one with metrics writes them."""
        self._watch, self._given_up = watch, False
        self._recipe, self._trainer, self._loader, self._validation = recipe, trainer, loader, validation
        self._checkpoints, self._metrics, self._progress = checkpoints, metrics, progress
        self._mesh = mesh or Mesh()
        self._position = loader.position
        self._best = Best()
        self._saved = self._looked = -1  # the last steps at which this was done
        self._loss: float | None = None
        self._validation_loss: float | None = None

    def resume(self, found: Found) -> None:
        """Go on from a checkpoint, whose weights the trainer has already."""
        self._trainer.load_state_dict(found.state["trainer"])
        self._loader.seek(found.state["loader"])
        self._position = found.state["loader"]
        best = found.state["best"]
        self._best = Best(math.inf if best["loss"] is None else best["loss"], best["looks_since"])
        self._saved = self._looked = found.step

    def run(self) -> Result:
        """Steps until there are enough, or no hope of better ones."""
        trainer, recipe = self._trainer, self._recipe
        with StopRequest(self._progress, STOPPING) as stop, Prefetch(self._loader, pin=trainer.device.type == "cuda") as steps:
            while trainer.step < recipe.steps and not self._mesh.any(stop.asked) and not self._hopeless():
                began = time.perf_counter()
                self._mesh.at(f"waiting for the data of step {trainer.step + 1}")
                work = next(steps)
                wait_s = time.perf_counter() - began
                report = trainer.learn(work)
                self._account(work, report, time.perf_counter() - began, wait_s)
                if report.action == "rollback":
                    self._roll_back(report)
                    continue
                if recipe.validation.every and trainer.step % recipe.validation.every == 0:
                    self._look()
                if recipe.save.every and trainer.step % recipe.save.every == 0:
                    self._save()
            finished = trainer.step >= recipe.steps or self._hopeless()
            if finished and self._looked < trainer.step:
                self._look()
            if self._saved < trainer.step:
                self._save()
            if trainer.step < recipe.steps and finished:
                self._say_why_early()
        return Result(trainer.step, self._loss, self._validation_loss, finished)

    def _account(self, work: Step, report: Report, step_s: float, wait_s: float) -> None:
        self._position, self._loss = work.position, report.loss
        if self._metrics is not None:
            self._metrics.step(report, step_s, wait_s)
        self._progress.step(report, step_s)
        if report.action in ("skip", "overflow"):
            self._progress.say(f"step {report.step} is left out: {report.reason}")

    def _roll_back(self, report: Report) -> None:
        self._checkpoints.wait()
        found = self._checkpoints.latest()
        if found is None:
            raise ConfigError(
                f"step {report.step}: {report.reason}, and there is no checkpoint to go back to; set save.every, lower optim.lr, or raise "
                f"stability.patience = {self._recipe.stability.patience}"
            )
        _, weights = build.lay_out(found.model, self._trainer.dtype)
        self._trainer.roll_back(found.state["trainer"], weights)
        self._event("rollback", report.step, {"to": found.step, "reason": report.reason})
        self._progress.say(f"step {report.step}: {report.reason}; back to step {found.step}, past the data in between")

    def _event(self, kind: str, step: int, values: Json) -> None:
        if self._metrics is not None:
            self._metrics.event(kind, step, values)

    def _look(self) -> None:
        """At the validation data."""
        if not self._validation:
            return
        sums = {
            source.name: self._trainer.validate(passage(source, self._recipe.batch, self._recipe.validation.tokens))
            for source in self._validation
        }
        losses = {name: loss / weight for name, (loss, weight) in sums.items()}
        mean = sum(loss for loss, _ in sums.values()) / sum(weight for _, weight in sums.values())
        self._validation_loss, self._looked = mean, self._trainer.step
        self._event("validation", self._trainer.step, {"loss": mean, "sources": losses})
        self._progress.say(f"step {self._trainer.step}: validation loss {mean:.4f}")
        self._given_up = self._watch is not None and self._mesh.any(self._watch(self._trainer.step, mean))
        if mean < self._best.loss:
            self._best = Best(mean, 0)
            if self._recipe.save.best:
                self._save(best=True)
        else:
            self._best.looks_since += 1

    def _hopeless(self) -> bool:
        patience = self._recipe.validation.patience
        return self._given_up or (patience is not None and self._best.looks_since >= patience)

    def _say_why_early(self) -> None:
        looks, patience = self._best.looks_since, self._recipe.validation.patience
        why = "it was given up" if self._given_up else f"{looks} looks without a validation loss below {self._best.loss:.4f}"
        way_out = "" if self._given_up else f" (validation.patience = {patience}; with more of it the same command goes on)"
        self._progress.say(f"ended before step {self._recipe.steps}: {why}{way_out}")

    def _save(self, best: bool = False) -> None:
        if self._saved == self._trainer.step:
            return
        state = {
            "trainer": self._trainer.state_dict(),
            "loader": self._position,
            "best": {"loss": self._best.loss if math.isfinite(self._best.loss) else None, "looks_since": self._best.looks_since},
            "metrics_bytes": 0 if self._metrics is None else self._metrics.num_bytes,
        }
        self._checkpoints.save(self._trainer.step, self._trainer.loaded, state, best, self._trainer.weights())
        self._saved = self._trainer.step
