"""Whole runs on two processes: they go on where another mesh left off, they stop together, and who ends them is named."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gemel.model import build
from gemel.train import metrics
from tests.tolerance import assert_close


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all scenarios."""
    folder = tmp_path_factory.mktemp("launched")
    paths = os.pathsep.join(["src", ".", *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tests.train.parallel.launched", str(folder)]
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"PYTHONPATH": paths}, cwd=Path(__file__).parents[3])
    return folder


def outcome(folder: Path) -> tuple[list[int], list[str], list[Any]]:
    """Of the ranks: exit statuses, what they said, what they returned."""
    statuses = json.loads((folder / "outcome.json").read_text())["statuses"]
    said = [(folder / f"stderr{rank}").read_text() for rank in range(len(statuses))]
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("result*"))]
    return statuses, said, results


def test_a_run_that_changes_its_mesh_is_the_run_of_one_process(launched: Path) -> None:
    """Four steps with shared gradients, four more with tensor and sequence parallel: each step is there once, with the same numbers."""
    alone, moved = (metrics.read(launched / name / "out") for name in ("alone", "moved"))
    assert [(line["step"], line.get("event")) for line in moved if line["step"] != 4 or "event" not in line] == [
        (line["step"], line.get("event")) for line in alone
    ]
    for key in ("loss", "norm", "trained", "tokens", "flops"):
        got, want = ([line[key] for line in lines if "event" not in line] for lines in (moved, alone))
        assert_close(torch.tensor(got), torch.tensor(want), "fp32_steps")
    statuses, said, results = outcome(launched / "moved")
    assert statuses == [0, 0] and said == ["", ""] and results[0] == results[1]
    assert_close(torch.tensor(results[0][1:3]), torch.tensor(outcome(launched / "alone")[2][0][1:3]), "fp32_steps")


def test_checkpoints_do_not_show_the_mesh(launched: Path, tmp_path: Path) -> None:
    """Same files, and model files of the bytes that one process writes for the same weights."""
    alone, moved = (launched / name / "out" for name in ("alone", "moved"))
    files = [sorted(str(path.relative_to(out)) for path in (out / "latest").rglob("*")) for out in (alone, moved)]
    assert files[0] == files[1]
    assert (alone / "latest/config.json").read_bytes() == (moved / "latest/config.json").read_bytes()
    for step in ("step-00000006", "step-00000008"):
        build.save(build.load(moved / step), tmp_path / step)
        assert (tmp_path / step / "model.safetensors").read_bytes() == (moved / step / "model.safetensors").read_bytes()


def test_ctrl_c_on_one_rank_stops_all_behind_the_same_step(launched: Path) -> None:
    statuses, _, results = outcome(launched / "stopped")
    assert statuses == [0, 0] and [result[0] for result in results] == [3, 3] and not any(result[3] for result in results)
    assert (launched / "stopped/out/latest").readlink() == Path("step-00000003")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("died", r"has not been heard of for \d+ s"),
        ("failed", "failed: OSError: no space left on device"),
        ("hangs", r"has not gone on for 2 s \(parallel.timeout_s\) while it was at: waiting for the data of step 3; others wait for it at"),
    ],
)
def test_who_ends_a_job_is_named(name: str, message: str, launched: Path) -> None:
    """By the rank that speaks and in the file that torchrun reads; what was saved before is there."""
    statuses, said, results = outcome(launched / name)
    assert all(statuses) and not results
    (line,) = said[0].splitlines()
    assert line.startswith("gemel: rank 1 (")
    assert re.search(message, line)
    assert json.loads((launched / name / "error0").read_text())["message"]["message"].endswith(line.removeprefix("gemel: "))
    assert (launched / name / "out/latest").readlink() == Path("step-00000002")


def test_a_rank_killed_between_its_write_and_the_commit(launched: Path) -> None:
    """Of the checkpoint of step 4 nothing is there; another mesh goes on from step 2, and ends where the run ends that nobody killed."""
    before = json.loads((launched / "killed/before.json").read_text())
    assert before["statuses"][1] == -signal.SIGKILL and before["statuses"][0]
    assert (launched / "killed/latest").readlink() == Path("step-00000002")
    statuses, said, results = outcome(launched / "killed")
    assert said[0].startswith("gemel: rank 1 (") and statuses == [0, 0] and [result[0] for result in results] == [8, 8]
    alone, killed = (metrics.read(launched / name / "out") for name in ("alone", "killed"))
    assert [line["step"] for line in killed if "event" not in line] == list(range(1, 9))
    got, want = ([line["loss"] for line in lines if "event" not in line] for lines in (killed, alone))
    assert_close(torch.tensor(got), torch.tensor(want), "fp32_steps")
    assert not list((launched / "killed/out/work/tmp").iterdir())
