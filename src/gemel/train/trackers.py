"""Where else numbers go while a run goes: TensorBoard, Weights & Biases, MLflow. None is needed, so none is imported unless asked for.

A run that goes on is the same run there: what it is called by is noted in `trackers.json`. A run that was rolled back, or killed after its
last checkpoint, shows steps again that were shown before; all three draw what came last.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from gemel.config.errors import UnsupportedError
from gemel.config.train import MetricsConfig, MLflowConfig, TrainRecipe, WandbConfig

NAMES = "trackers.json"
MLFLOW_CHARS = 500  # of a parameter's value that it takes


class Tracker(Protocol):
    """Takes numbers by name."""

    def show(self, values: Mapping[str, float], step: int) -> None:
        """They are of this step."""
        ...

    def close(self, failed: bool) -> None:
        """There are no more."""
        ...


def of(recipe: TrainRecipe) -> list[Tracker]:
    """Those that a recipe asks for, in the order of its keys. `UnsupportedError` if a package is missing."""
    config, made = recipe.metrics, list[Tracker]()
    if config.tensorboard:
        made.append(TensorBoard(recipe.out))
    if config.wandb is not None:
        made.append(Wandb(config.wandb, recipe))
    if config.mlflow is not None:
        made.append(MLflow(config.mlflow, recipe))
    return made


def require(config: MetricsConfig) -> None:
    """`UnsupportedError` if a package is missing, before there is anything to show."""
    for module, name in {"torch.utils.tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}.items():
        if getattr(config, name):
            _package(module, name)


class TensorBoard:
    """Event files in the run's folder. When steps begin or come again, a new file tells TensorBoard to forget what it has from there on."""

    def __init__(self, out: Path):
        self._folder, self._board = str(out / "tensorboard"), _package("torch.utils.tensorboard", "tensorboard")
        self._writer: Any = None
        self._step = 0

    def show(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.show`."""
        if self._writer is None or step < self._step:
            self.close(failed=False)
            self._writer = self._board.SummaryWriter(self._folder, purge_step=step)
        self._step = step
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:  # noqa: ARG002
        """See `Tracker.close`."""
        if self._writer is not None:
            self._writer.close()


class Wandb:
    """Steps are a number among others, because its own count may not go back, and ours does after a rollback."""

    def __init__(self, config: WandbConfig, recipe: TrainRecipe):
        name = _known(recipe.out).get("wandb") or uuid.uuid4().hex
        self._run = _package("wandb", "wandb").init(
            project=config.project,
            entity=config.entity,
            name=config.name or recipe.out.name,
            mode=config.mode,
            dir=str(recipe.out),
            id=name,
            resume="allow",
            config=recipe.model_dump(mode="json", exclude_none=True),
        )
        self._run.define_metric("*", step_metric="step")
        _know(recipe.out, "wandb", name)

    def show(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.show`."""
        self._run.log({**values, "step": step})

    def close(self, failed: bool) -> None:
        """See `Tracker.close`."""
        self._run.finish(exit_code=int(failed))


class MLflow:
    """The recipe becomes parameters, by their dotted names."""

    def __init__(self, config: MLflowConfig, recipe: TrainRecipe):
        self._mlflow = _package("mlflow", "mlflow")
        if config.uri is not None:
            self._mlflow.set_tracking_uri(config.uri)
        self._mlflow.set_experiment(config.experiment)
        before = _known(recipe.out).get("mlflow")
        run = self._mlflow.start_run(run_id=before) if before else self._mlflow.start_run(run_name=config.name or recipe.out.name)
        if before is None:
            self._mlflow.log_params(dict(_flat(recipe.model_dump(mode="json", exclude_none=True))))
        _know(recipe.out, "mlflow", run.info.run_id)

    def show(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.show`."""
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self, failed: bool) -> None:
        """See `Tracker.close`."""
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


def _package(module: str, name: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise UnsupportedError(f"metrics.{name} needs a package: pip install {name}; or leave it out") from None


def _known(out: Path) -> dict[str, str]:
    """What this run is called by whom."""
    try:
        found: dict[str, str] = json.loads((out / NAMES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found


def _know(out: Path, tracker: str, name: str) -> None:
    draft = out / f"{NAMES}.draft"
    draft.write_text(json.dumps(_known(out) | {tracker: name}), encoding="utf-8")
    draft.replace(out / NAMES)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{number}")
    else:
        yield name, str(value)[:MLFLOW_CHARS]
