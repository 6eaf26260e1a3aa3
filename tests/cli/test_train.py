"""`gemel train` and `gemel runs`, as a person types them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tomli_w

from gemel.cli import main as cli
from gemel.cli import runs as runs_verb
from gemel.config.errors import ConfigError
from gemel.data import manifest
from gemel.train import metrics
from tests.train import runs
from tests.train.test_checkpoint import plain


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(plain(runs.values(tmp_path, data__holdout=0.1, validation={"every": 4}))))
    return path


def test_train_then_generate_then_look(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["train", str(recipe), "--quiet", "--set", "steps=6"]) == 0
    assert all(0 < line["utilization"] < 1 for line in metrics.read(tmp_path / "out") if "event" not in line)
    monkeypatch.setattr("gemel.cli.train.peak", lambda recipe: 1e11)
    printed = capsys.readouterr().out
    assert re.fullmatch(r"finished at step 6, validation loss \d\.\d{4}; try: gemel generate --model \S+/out/latest 'Once'\n", printed)
    latest = printed.split()[-2]
    assert cli.main(["generate", "--model", latest, "the thing", "--max-tokens", "4", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["outputs"]) == 1
    assert cli.main(["train", str(recipe), "--quiet", "--output", str(tmp_path / "more" / "b"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["step"], result["finished"], result["path"]) == (8, True, str(tmp_path / "more" / "b" / "latest"))
    look(tmp_path, capsys)


def look(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", str(folder / "out"), str(folder / "more"), "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["state"], first["step"], first["steps"], first["skipped"]) == ("finished", 6, 6, 0)
    assert second["step"] == 8 and second["tokens"] > 900 and second["tokens_per_s"] > 0
    assert second["best_validation_loss"] <= second["validation_loss"] < second["loss"] + 1
    assert cli.main(["runs", str(folder / "out")]) == 0
    table = capsys.readouterr().out
    assert re.search(r"finished +6/6 +\d\.\d{4}", table) and "\nloss\n" in table and "\u28ff" >= max(table) >= "\u2801"
    picture = folder / "pictures" / "v.svg"
    assert cli.main(["runs", str(folder / "out"), str(folder / "more"), "--plot", "validation", "--svg", str(picture)]) == 0
    lines = [element for element in ElementTree.parse(picture).getroot() if element.tag.endswith("polyline")]
    assert [len(line.attrib["points"].split()) for line in lines] == [2, 2]


def test_search(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemel.cli.train.peak", lambda recipe: 1e11)
    space = {"optim.lr": {"kind": "choice", "values": [1e-4, 0.02]}, "batch.micro_tokens": {"kind": "choice", "values": [32, 33]}}
    (tmp_path / "search.toml").write_text(tomli_w.dumps({"space": space, "method": {"kind": "grid"}}))
    argv = ["train", str(recipe), "--search", str(tmp_path / "search.toml"), "--quiet", "--set", "steps=4"]
    assert cli.main(argv) == 0
    head, _, first, second, *failed, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["trial", "optim.lr", "batch.micro_tokens", "step", "validation", "loss", "state"]
    assert re.fullmatch(r"2 +0\.02 +32 +4 +\d\.\d{4} +finished", first) and re.fullmatch(r"0 +0\.0001 +32 +4 +\d\.\d{4} +finished", second)
    assert [line.split()[0] for line in failed] == ["1", "3", "trial", "trial"] and "is not a multiple of sequence" in failed[2]
    assert last == f"the best is in {tmp_path}/out/trials/0002; see also: gemel runs {tmp_path}/out/trials"
    assert cli.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["best"], found["finished"], len(found["trials"])) == (2, True, 4)
    assert cli.main(["runs", str(tmp_path / "out" / "trials"), "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_runs_tells_states_apart(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock says that somebody is at work; a folder that is damaged, or that a later version wrote, does not hide the others."""
    monkeypatch.setattr("gemel.cli.train.peak", lambda recipe: 1e11)
    early = ["--set", "validation.patience=1", "--set", "validation.every=1", "--set", "optim.lr=1.0", "--set", "optim.method.kind=sgd"]
    for name, more in {"a": [], "b": ["--set", "steps=60", *early]}.items():
        assert cli.main(["train", str(recipe), "--quiet", "--output", str(tmp_path / "runs" / name), *more]) == 0
    newer, damaged = (tmp_path / "runs" / name for name in ("newer", "damaged"))
    shutil.copytree(tmp_path / "runs" / "a", newer)
    (newer / "run.toml").write_text("what_comes_next = 1\n" + (newer / "run.toml").read_text())
    shutil.copytree(tmp_path / "runs" / "a", damaged)
    (damaged / "metrics.jsonl").write_bytes(bytes(9) + b"\n")
    capsys.readouterr()

    def states() -> dict[str, str]:
        assert cli.main(["runs", str(tmp_path / "runs"), "--json"]) == 0
        return {Path(one["run"]).name: one["state"] for one in map(json.loads, capsys.readouterr().out.splitlines())}

    assert states() == {"a": "finished", "b": "ended early", "newer": "stopped"}
    with manifest.Lock(tmp_path / "runs" / "a", shared=False):
        assert states()["a"] == "running"
    assert cli.main(["runs", str(tmp_path / "runs")]) == 0 and "damaged/metrics.jsonl is passed over" in capsys.readouterr().err


def test_mistakes_cost_one_line(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(recipe), "--set", "optim.lrr=1"]) == 2
    assert capsys.readouterr().err == "gemel: OptimConfig has no key 'optim.lrr': did you mean 'lr'?\n"
    assert cli.main(["runs", str(tmp_path / "shards")]) == 2
    assert "begin one with: gemel train RECIPE" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").touch()
    assert cli.main(["runs", str(tmp_path / "out"), "--svg", "/dev/null/x.svg"]) == 2
    assert "cannot write /dev/null/x.svg: File exists" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is no folder"):
        runs_verb.find([tmp_path / "nowhere"])


def test_a_second_ctrl_c_does_not_wait(recipe: Path, tmp_path: Path) -> None:
    """The first lets the step finish and saves, which takes a minute here."""
    code = (
        "import sys, time\nfrom gemel.cli import train\nfrom gemel.cli.main import main\nfrom gemel.train import checkpoint\n"
        "train.peak = lambda recipe: 1e11\ncheckpoint.Checkpoints._write = lambda *args: time.sleep(60)\nsys.exit(main())"
    )
    argv = ["train", str(recipe), "--set", "steps=1000000", "--set", "validation.every=0", "--set", "save.every=0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", code, *argv], stderr=subprocess.PIPE, text=True, env=environment) as process:
        wait_for(lambda: (tmp_path / "out" / "metrics.jsonl").exists() and (tmp_path / "out" / "metrics.jsonl").stat().st_size)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None and any("stopping after this step, with a checkpoint" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
    assert not (tmp_path / "out" / "latest").exists()


def wait_for(condition: Callable[[], object]) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("it took too long")
