"""`gemel launch`, as a person types it, and what becomes of a Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from gemel.cli import launch
from gemel.cli import main as cli
from gemel.train import metrics
from tests.cli.test_train import wait_for
from tests.train import runs
from tests.train.test_checkpoint import plain


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(plain(runs.values(tmp_path, parallel__replicate=2))))
    return path


def test_print_shows_what_would_run(recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    argv = ["launch", str(recipe), "--set", "steps=3", "--set", "threads=5", "--output", "a b", "--print"]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("OMP_NUM_THREADS=5 ") and shown.endswith(
        f"torchrun --standalone --nproc-per-node=2 -m gemel train {recipe} --set steps=3 --set threads=5 --output 'a b'\n"
    )
    assert cli.main([*argv, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["nproc"], printed["nodes"]) == (2, 1) and printed["command"][-4:] == ["--set", "threads=5", "--output", "a b"]


def test_files_are_written_and_named(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tmp_path / "job.sbatch"
    assert cli.main(["launch", str(recipe), "--nodes", "2", "--gpus", "1", "--slurm", str(job)]) == 0
    assert capsys.readouterr().out == f"{job} starts 1 process on each of 2 machines; submit it with: sbatch {job}\n"
    assert f"-m gemel train {recipe}" in job.read_text() and "--gpus-per-node=1" in job.read_text()
    assert cli.main(["launch", str(recipe), "--ray", str(tmp_path / "job.py"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["submit"] == f"ray job submit -- python {tmp_path / 'job.py'}"
    compile((tmp_path / "job.py").read_text(), "job.py", "exec")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--nproc", "3"], "takes 2 processes, --nproc 3 would start 3; leave --nproc out, or --set parallel.replicate=3"),
        (["--nodes", "2"], "--nodes 2 are not started from here; write a job with --slurm FILE or --ray FILE"),
        (["--gpus", "8"], "--gpus is for a scheduler; add --slurm FILE or --ray FILE"),
        (["--nproc", "0"], "--nproc 0 is no number of processes; give 1 or more"),
        (["--set", "paralel.replicate=2"], "did you mean 'parallel'?"),
        (["--slurm", "nowhere/job"], "cannot write nowhere/job: No such file or directory"),
    ],
)
def test_mistakes_cost_one_line(arguments: list[str], says: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", str(recipe), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_ctrl_c_saves_and_the_same_command_goes_on(recipe: Path, tmp_path: Path) -> None:
    """Two stages of a pipeline: one checkpoint of both, and one voice."""
    parallel = ["--set", "parallel.replicate=1", "--set", "parallel.pipeline={kind='1f1b',stages=2}", "--quiet"]
    argv = [sys.executable, "-m", "gemel", "launch", str(recipe), *parallel]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    lines, pipe = tmp_path / "out" / "metrics.jsonl", subprocess.PIPE
    with subprocess.Popen([*argv, "--set", "steps=1000000"], env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        wait_for(lambda: lines.exists() and lines.stat().st_size)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    stopped = re.fullmatch(r"stopped at step (\d+); the same command goes on from here\n", said)
    assert stopped is not None and (tmp_path / "out" / "latest" / "model.safetensors").exists()
    steps = int(stopped[1]) + 2
    done = subprocess.run([*argv, "--set", f"steps={steps}", "--json"], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["step"] == steps
    assert [line["step"] for line in metrics.read(tmp_path / "out")] == list(range(1, steps + 1))


RANK = """
import os, pathlib, signal, time
folder, rank, count = pathlib.Path({folder!r}), os.environ["RANK"], 0
def asked(*_):
    global count
    count += 1
signal.signal(signal.SIGTERM, asked)
(folder / f"ready{{rank}}").touch()
while count < {needed}:
    time.sleep(0.02)
    if count == 1:
        (folder / f"asked{{rank}}").touch()
time.sleep(0.3 * int(rank))  # the others are done by then, and nobody is killed for it
(folder / f"saved{{rank}}").write_text(str(count))
"""


@pytest.mark.parametrize("needed", [1, 2])
def test_ctrl_c_reaches_every_rank_once(needed: int, tmp_path: Path) -> None:
    """Ranks that save take the time they need, a second Ctrl-C reaches them as well, and torchrun says nothing of it."""
    (tmp_path / "rank.py").write_text(RANK.format(folder=str(tmp_path), needed=needed))
    command = [launch._program(), "--standalone", "--nproc-per-node=2", str(tmp_path / "rank.py")]
    code = (
        f"import os, sys\nfrom gemel.cli.launch import supervise\nsys.exit(supervise({command!r}, dict(os.environ, OMP_NUM_THREADS='1')))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)))
        process.send_signal(signal.SIGINT)
        if needed == 2:
            wait_for(lambda: all((tmp_path / f"asked{rank}").exists() for rank in range(2)))
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == launch.INTERRUPTED == 130
        assert process.stderr is not None and process.stderr.read() == ""
    assert [(tmp_path / f"saved{rank}").read_text() for rank in range(2)] == [str(needed)] * 2


def test_a_rank_that_fails_ends_the_job(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(7)\ntime.sleep(600)\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert launch.supervise([launch._program(), "--standalone", "--nproc-per-node=2", str(tmp_path / "rank.py")], environment) == 1
