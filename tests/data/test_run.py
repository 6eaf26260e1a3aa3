"""Runners: they change who does a task and when, and nothing else. Runs that are stopped, killed or out of luck are taken up again."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w

from gemel.config.data.pipeline import Recipe, SlurmRun
from gemel.config.errors import ConfigError
from gemel.data.pipeline import Job
from gemel.data.run import slurm, start
from gemel.data.run.board import Board, Interrupted, StopRequest, clock
from gemel.data.run.local import TaskFailed
from tests.data.runs import contents, corpus, custom, do, first_of_each, recipe

ROOT = Path(__file__).resolve().parents[2]
STEPS = [custom("Upper"), first_of_each(), {"kind": "length", "min_chars": 40}]


def run(what: Recipe, output: Path, **table: Any) -> Any:
    values = {**what.model_dump(), "run": {"kind": "local", "workers": 1, **table}}
    values["output"]["path"] = str(output)
    return start.run(Recipe.parse(values))


def begin(what: Recipe, output: Path, *arguments: str) -> subprocess.Popen[str]:
    """`gemel data` as a process group of its own."""
    file = output.with_suffix(".toml")
    file.write_text(tomli_w.dumps(what.what()))
    command = [sys.executable, "-m", "gemel", "data", str(file), "--output", str(output), *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def until(true: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def num_done(output: Path) -> int:
    return len(list(output.glob("work/done/*/*.json")))


@pytest.mark.parametrize("workers", [1, 3])
def test_processes_leave_the_same_bytes_as_one_after_the_other(tmp_path: Path, workers: int) -> None:
    what = recipe(corpus(tmp_path), STEPS)
    do(what, tmp_path / "alone")
    stats = run(what, tmp_path / "out", workers=workers)
    assert stats.kept.documents > 50
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert run(what, tmp_path / "out").to_json() == stats.to_json()  # finished already


def test_killed_with_its_workers_it_goes_on_with_another_number_of_them(tmp_path: Path) -> None:
    what = recipe(corpus(tmp_path), [custom("Sleeps", seconds=0.05), *STEPS])
    do(what, tmp_path / "alone")
    for tasks in (2, 6):
        process = begin(what, tmp_path / "out", "--workers", "2")
        until(lambda tasks=tasks: num_done(tmp_path / "out") >= tasks or process.poll() is not None)  # noqa: B023
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    run(what, tmp_path / "out", workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_workers_leave_when_their_parent_is_killed(tmp_path: Path) -> None:
    process = begin(recipe(corpus(tmp_path), [custom("Sleeps", seconds=0.3)]), tmp_path / "out", "--workers", "2")
    until(lambda: num_done(tmp_path / "out") >= 1)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    until(lambda: not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers))


def test_ctrl_c_finishes_what_has_begun_and_the_same_command_goes_on(tmp_path: Path) -> None:
    what = recipe(corpus(tmp_path, num=80), [custom("Sleeps", seconds=0.2), *STEPS])
    process = begin(what, tmp_path / "out", "--workers", "1")
    until(lambda: num_done(tmp_path / "out") >= 1)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopping when the tasks that have begun are finished" in errors
    assert errors.endswith("gemel: stopped; the same command goes on from here\n")
    assert "Traceback" not in errors
    assert not list((tmp_path / "out" / "work" / "tmp").iterdir())  # nothing was left half done
    do(what, tmp_path / "alone")
    run(what, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_the_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    process = begin(recipe(corpus(tmp_path), [custom("Sleeps", seconds=600.0)]), tmp_path / "out", "--workers", "1")
    until(lambda: list((tmp_path / "out").glob("work/done")) or len(psutil.Process(process.pid).children()) >= 2)
    assert process.stderr is not None
    os.kill(process.pid, signal.SIGINT)
    until(lambda: "stopping" in process.stderr.readline())  # type: ignore[union-attr]
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_a_worker_that_dies_is_replaced_and_its_task_tried_again(tmp_path: Path) -> None:
    path = corpus(tmp_path)
    once = str(tmp_path / "once")
    stats = run(recipe(path, [custom("Dies", word="00041", once=once)]), tmp_path / "out")
    assert stats.kept.documents == 197
    with pytest.raises(TaskFailed, match=r"a worker died of SIGKILL on pass-0, unit \d+ \(.*corpus\.jsonl \[\d+:\d+\]\), twice"):
        run(recipe(path, [custom("Dies", word="00041")]), tmp_path / "other")
    job = Job(tmp_path / "other")
    assert 0 < len(job.missing(job.stages[0])) < job.stages[0].num_tasks


def test_a_task_that_raises_is_named_and_the_rest_of_it_shown(tmp_path: Path) -> None:
    with pytest.raises(TaskFailed, match=r"(?s)pass-0, unit 0 .* failed:.*BrokenStep: step Loses gave"):
        run(recipe(corpus(tmp_path), [custom("Loses")]), tmp_path / "out")


def test_members_of_an_array_share_the_work_and_rank_0_finishes(tmp_path: Path) -> None:
    what = recipe(corpus(tmp_path), STEPS)
    do(what, tmp_path / "alone")
    with pytest.raises(slurm.NotYet, match=r"tasks of pass-0 are not done yet by other ranks \(first: 1\)"):
        run(what, tmp_path / "out", kind="slurm", rank=0, world=2, wait_s=0)
    job = Job(tmp_path / "out")
    assert job.missing(job.stages[0]) == [i for i in range(job.stages[0].num_tasks) if i % 2 == 1]
    other = threading.Thread(target=run, args=(what, tmp_path / "out"), kwargs={"kind": "slurm", "rank": 1, "world": 2})
    other.start()
    stats = run(what, tmp_path / "out", kind="slurm", rank=0, world=2)
    other.join()
    assert stats is not None
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert run(what, tmp_path / "out", kind="slurm", rank=5, world=7) is not None  # comes when all is over


def test_an_array_says_its_place_or_how_to_give_it() -> None:
    variables = {"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_COUNT": "4"}
    assert slurm.place(SlurmRun(kind="slurm"), variables) == (2, 4)
    assert slurm.place(SlurmRun(kind="slurm", rank=0, world=8), variables) == (0, 8)
    with pytest.raises(ConfigError, match="give --rank R --world N"):
        slurm.place(SlurmRun(kind="slurm"), {})
    with pytest.raises(ConfigError, match="rank = 4 must be less than world = 4"):
        slurm.place(SlurmRun(kind="slurm", rank=4), variables)


def test_ray_leaves_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    what = recipe(corpus(tmp_path), STEPS)
    do(what, tmp_path / "alone")
    job = Job.begin(what, tmp_path / "out")
    job.perform(job.stages[0], 1, lambda part: None)
    assert run(what, tmp_path / "out", kind="ray", workers=2).kept.documents > 50
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_progress_has_a_rate_and_a_time_left() -> None:
    stream = io.StringIO()
    board = Board(stream)
    board.begin("pass-0", {1: 10**6, 2: 10**6}, 4, 4 * 10**6)
    board._began -= 10.0
    board.update({1: 1.0, 2: 0.5}, force=True)
    assert re.fullmatch(r"pass-0: 3 of 4, 88%, 0\.1 MB/s, 0:00:03 left\n", stream.getvalue())
    assert clock(3725.4) == "1:02:05"


def test_a_stop_request_restores_the_handlers() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest(Board(io.StringIO())) as stop:
        signal.raise_signal(signal.SIGTERM)  # as job schedulers do
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert issubclass(Interrupted, KeyboardInterrupt)


def test_workers_are_the_cpus_that_the_quota_leaves(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    allowed = len(os.sched_getaffinity(0))
    assert start.usable_cores(tmp_path) == allowed
    (group / "cpu.max").write_text("max 100000\n")
    assert start.usable_cores(tmp_path) == allowed
    (group / "cpu.max").write_text("100000 100000\n")
    assert start.usable_cores(tmp_path) == 1
