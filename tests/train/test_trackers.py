"""Trackers get what metrics.jsonl gets: against fakes of their packages, for none of them is needed here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gemel.config.errors import UnsupportedError
from gemel.train import trackers
from tests.train import runs
from tests.train.test_run import go

Calls = list[tuple[str, Any]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Packages that write down what they are told."""
    told: Calls = []

    def noted(name: str, result: Any = None) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            told.append((name, (*args, *kwargs.items())))
            return result

        return call

    wandb, mlflow, board = (ModuleType(name) for name in ("wandb", "mlflow", "torch.utils.tensorboard"))
    run = SimpleNamespace(log=noted("wandb.log"), finish=noted("wandb.finish"), define_metric=noted("wandb.define_metric"))
    wandb.init = noted("wandb.init", run)  # type: ignore[attr-defined]
    for name in ("set_tracking_uri", "set_experiment", "log_params", "log_metrics", "end_run"):
        setattr(mlflow, name, noted(f"mlflow.{name}"))
    mlflow.start_run = noted("mlflow.start_run", SimpleNamespace(info=SimpleNamespace(run_id="abc")))  # type: ignore[attr-defined]
    board.SummaryWriter = noted("board", SimpleNamespace(add_scalar=noted("board.add_scalar"), close=noted("board.close")))  # type: ignore[attr-defined]
    for module in (wandb, mlflow, board):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield told


def named(calls: Calls, name: str) -> list[Any]:
    return [args for called, args in calls if called == name]


def test_all_of_them_get_every_step_and_a_run_that_goes_on_is_the_same(calls: Calls, tmp_path: Path) -> None:
    both = {"tensorboard": True, "wandb": {"project": "p"}, "mlflow": {"experiment": "e", "uri": "file:x"}}
    changes = {"metrics": both, "data__holdout": 0.1, "validation__every": 2}
    go(runs.recipe(tmp_path, steps=2, **changes))
    names = json.loads((tmp_path / "out" / trackers.NAMES).read_text())
    assert dict(named(calls, "wandb.init")[0])["id"] == names["wandb"] and names["mlflow"] == "abc"
    assert named(calls, "mlflow.start_run") == [(("run_name", "out"),)]
    logged = [args[0] for args in named(calls, "wandb.log")]
    assert (
        [row["step"] for row in logged] == [1, 2, 2] and {"train/loss", "train/lr"} <= logged[0].keys() and "validation/loss" in logged[2]
    )
    assert [args[0] for args in named(calls, "mlflow.log_metrics")] == [{k: v for k, v in row.items() if k != "step"} for row in logged]
    assert named(calls, "board") == [(str(tmp_path / "out" / "tensorboard"), ("purge_step", 1))]
    shown = named(calls, "board.add_scalar")
    assert ("train/loss", logged[0]["train/loss"], 1) in shown and ("validation/loss", logged[2]["validation/loss"], 2) in shown
    assert [named(calls, name) for name in ("wandb.finish", "mlflow.end_run", "board.close")] == [
        [(("exit_code", 0),)],
        [("FINISHED",)],
        [()],
    ]
    (parameters,) = named(calls, "mlflow.log_params")[0]
    assert parameters["optim.lr"] == "0.01" and parameters["data.train.0.kind"] == "shards"
    calls.clear()
    go(runs.recipe(tmp_path, steps=4, **changes))
    assert dict(named(calls, "wandb.init")[0])["id"] == names["wandb"] and dict(named(calls, "wandb.init")[0])["resume"] == "allow"
    assert named(calls, "mlflow.start_run") == [(("run_id", "abc"),)] and not named(calls, "mlflow.log_params")
    assert [args[0]["step"] for args in named(calls, "wandb.log")] == [3, 4, 4]
    assert named(calls, "board") == [(str(tmp_path / "out" / "tensorboard"), ("purge_step", 3))]


def test_tensorboard_forgets_what_is_done_again(calls: Calls, tmp_path: Path) -> None:
    board = trackers.TensorBoard(tmp_path)
    for step in (5, 6, 6, 3, 4):
        board.show({"train/loss": 1.0}, step)
    board.close(failed=False)
    assert [args[1] for args in named(calls, "board")] == [("purge_step", 5), ("purge_step", 3)] and len(named(calls, "board.close")) == 2


def test_a_run_that_fails_is_told_so(calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemel.train.loop.Loop._look", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go(runs.recipe(tmp_path, steps=2, metrics={"wandb": {"project": "p"}, "mlflow": {"experiment": "e"}}))
    assert named(calls, "wandb.finish") == [(("exit_code", 1),)] and named(calls, "mlflow.end_run") == [("FAILED",)]


@pytest.mark.parametrize(
    ("config", "module", "package"),
    [
        ({"tensorboard": True}, "torch.utils.tensorboard", "tensorboard"),
        ({"wandb": {"project": "p"}}, "wandb", "wandb"),
        ({"mlflow": {"experiment": "e"}}, "mlflow", "mlflow"),
    ],
)
def test_a_package_that_is_missing_is_named(
    config: dict[str, Any], module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnsupportedError, match=rf"metrics\.{package} needs a package: pip install {package}; or leave it out"):
        go(runs.recipe(tmp_path, metrics=config))
    assert not (tmp_path / "out" / "data").exists() and not (tmp_path / "out" / "run.toml").exists()  # before anything is prepared
