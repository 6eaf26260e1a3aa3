"""`gemel data` and the verbs below it, as a person types them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gemel.cli import data
from gemel.cli import main as cli
from gemel.config.data import pipeline
from gemel.config.data.pipeline import LengthConfig, LocalRun, RayRun, SlurmRun
from gemel.config.errors import ConfigError
from tests.cli.test_main import run
from tests.data.runs import corpus, kept

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(
        f"""
        [input]
        kind = "jsonl"
        paths = ["{corpus(tmp_path)}"]
        [[step]]
        kind = "length"
        min_chars = 40
        [output]
        kind = "jsonl"
        path = "{tmp_path / "out"}"
        [run]
        kind = "local"
        workers = 1
        """
    )
    return path


def parsed(recipe: Path, *argv: str) -> pipeline.Recipe:
    return data.read(cli.parser("data").parse_args([str(recipe), *argv]))


def test_a_run_then_a_look_at_it(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert cli.main(["data", str(recipe), "--quiet"]) == 0
    first = capsys.readouterr().out
    assert "length.short" in first
    assert cli.main(["data", str(recipe), "--quiet", "--json"]) == 0  # finished already
    again = capsys.readouterr()
    assert json.loads(again.out)["kept"][0] == len(kept(tmp_path / "out")) > 100
    assert again.err == f"gemel: {out} is finished already\n"
    assert cli.main(["data", "inspect", out]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(first.rstrip("\n"))
    assert "dropped by length: length.short (" in shown
    assert cli.main(["data", "inspect", out, "--dropped", "length", "--samples", "1"]) == 0
    assert re.search(r"-> \d+ characters, min_chars = 40", capsys.readouterr().out)
    assert cli.main(["data", "inspect", out, "--dropped", "read", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"read.bad_json", "read.no_text", "read.not_utf8"}
    assert cli.main(["data", "inspect", out, "--html", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert cli.main(["data", "inspect", out, "--verify"]) == 0
    next((tmp_path / "out" / "kept").iterdir()).write_bytes(b"")
    assert cli.main(["data", "inspect", out, "--verify"]) == 1


def test_settings_go_over_the_recipe(recipe: Path, tmp_path: Path) -> None:
    made = parsed(
        recipe, "--set", "step.0.min_chars=7", "--set", "input.source=my words", "--set", "input.unit_bytes=5000", "--output", "x"
    )
    assert made.step == (LengthConfig(kind="length", min_chars=7),)
    assert (made.input[0].source, made.input[0].unit_bytes, made.output.path) == ("my words", 5000, "x")
    for setting, message in {
        "step.1.min_chars=7": "'1' is not the number of a table; there are 1",
        "step.0.min_char=7": "LengthConfig has no key 'min_char': did you mean 'min_chars'",
        "steps=7": "Recipe has no key 'steps': did you mean 'step'",
        "min_chars": "is not a setting; write table.key=value",
        "output.kind.x=1": "kind is 'jsonl', which has no keys",
    }.items():
        with pytest.raises(ConfigError, match=message):
            parsed(recipe, "--set", setting)


def test_the_runner_is_the_recipes_unless_the_command_line_says_otherwise(recipe: Path) -> None:
    assert parsed(recipe).run == LocalRun(workers=1)
    assert parsed(recipe, "--workers", "3").run == LocalRun(workers=3)
    assert parsed(recipe, "--runner", "ray").run == RayRun(kind="ray")
    assert parsed(recipe, "--rank", "0", "--world", "2").run == SlurmRun(kind="slurm", rank=0, world=2)
    with pytest.raises(ConfigError, match="--rank and --world are for --runner slurm, not local"):
        parsed(recipe, "--runner", "local", "--rank", "0")


def test_a_rank_that_must_wait_exits_with_75(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["data", str(recipe), "--set", "input.unit_bytes=2048", "--world", "2", "--set", "run.kind=slurm", "--set", "run.wait_s=0"]
    assert cli.main([*argv, "--rank", "0"]) == data.TRY_AGAIN
    assert "Run it again when they are done" in capsys.readouterr().err
    assert cli.main([*argv, "--rank", "1"]) == 0
    assert "rank 0 finishes the run" in capsys.readouterr().out
    assert cli.main([*argv, "--rank", "0"]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspct"], "there is no recipe inspct; did you mean gemel data inspect?"),
        (["no.toml"], "there is no recipe no.toml"),
        (["inspect", "nowhere"], "nowhere holds no run: there is no plan.json"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_failed_task_is_status_1_and_the_way_on_is_said(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setting = 'step=[{kind="custom", target="tests.data.custom_steps:Loses"}]'
    assert cli.main(["data", str(recipe), "--quiet", "--set", setting]) == 1
    assert capsys.readouterr().err.endswith("gemel: the same command goes on from here\n")


def test_help_names_the_verbs_below_and_is_there_at_once() -> None:
    for argv in (["data", "--help"], *([["data", below, "--help"] for below in data.VERBS])):
        code = (
            "import sys; from gemel.cli.main import main\n"
            "try: main()\n"
            "except SystemExit: pass\n"
            "print(*[name for name in ('torch', 'pydantic', 'numpy', 'pyarrow') if name in sys.modules])"
        )
        done = run(*argv, code=code)
        assert done.stdout.splitlines()[-1] == ""
        assert "example:" in done.stdout
    assert all(f"gemel data {below}" in run("data", "--help").stdout for below in data.VERBS)


def test_the_shipped_recipe_is_a_recipe_and_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["--set", 'input.0.names=["json"]', "--set", 'input.1.names=["json"]']
    argv: list[Any] = ["data", str(ROOT / "recipes" / "stdlib.toml"), "--output", str(tmp_path / "out"), "--workers", "1", "--json", *names]
    assert cli.main(argv) == 0
    values = json.loads(capsys.readouterr().out)
    assert set(values["sources"]) == {"code", "docstrings"}
    assert values["finished"]
