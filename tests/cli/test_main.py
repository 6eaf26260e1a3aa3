"""The command's frame: help is light, mistakes cost one line, exit statuses are what scripts expect."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gemel import __version__
from gemel.cli import main as cli
from gemel.config.errors import ConfigError

HEAVY = ("torch", "pydantic", "numpy", "transformers", "tokenizers", "starlette", "uvicorn", "asyncio", "gguf")


def run(*argv: str, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *argv] if code else [sys.executable, "-m", "gemel", *argv]
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths, **environment}, check=False)


@pytest.mark.parametrize("argv", [["--help"], *([verb, "--help"] for verb in cli.VERBS)], ids=" ".join)
def test_help_has_an_example_and_imports_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys; from gemel.cli.main import main\n"
        "try: status = main()\n"
        "except SystemExit as end: status = end.code\n"
        f"print('LOADED', status, *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = run(*argv, code=code)
    *text, loaded = done.stdout.splitlines()
    assert done.stderr == ""
    assert "example:" in text
    assert loaded == "LOADED 0"


def test_overview_names_every_verb_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for verb in cli.VERBS:
        assert f"{verb:<9} {cli.verb(verb).HELP}" in printed


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"gemel {__version__}\n"


def test_no_verb_shows_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage:" in capsys.readouterr().out


def test_misspelt_verb_proposes_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serv"]) == 2
    assert capsys.readouterr().err == "gemel: there is no verb 'serv'; did you mean 'serve'?\n"


def test_misspelt_option_proposes_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", "--max-contxt=10"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "gemel: unknown argument '--max-contxt=10'; did you mean --max-context? (see gemel serve --help)\n"


def test_prefix_of_an_option_is_not_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--por", "1"])
    assert "did you mean --port?" in capsys.readouterr().err


def test_user_error_is_one_line_and_status_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("gemel.cli.doctor.run", lambda args: fail(ConfigError("x = 1 is too small; use 2")))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "gemel: x = 1 is too small; use 2\n"


def test_our_own_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemel.cli.doctor.run", lambda args: fail(ValueError("not the user's fault")))
    with pytest.raises(ValueError, match="not the user's fault"):
        cli.main(["doctor"])


def test_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemel.cli.doctor.run", lambda args: fail(KeyboardInterrupt()))
    assert cli.main(["doctor"]) == 130


def test_reader_that_goes_away_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code = "import sys; from gemel.cli.main import main; sys.exit(main(['--help']))"
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 141


def fail(error: BaseException) -> int:
    raise error
