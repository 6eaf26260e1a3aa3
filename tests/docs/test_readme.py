"""The README is run: every command of a block marked `console run` must print what stands below it.

`...` in the expected output stands for anything. Blocks marked `console run model` need the embedded model; plain `console` blocks (a
server that does not end) are only read.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from gemel.llm import store

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```console(?P<marks>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command line of the README and what should come out, standard error included."""

    line: str
    expected: str
    needs_model: bool


def commands(text: str) -> list[Command]:
    """The runnable commands of a page."""
    found = []
    for block in BLOCK.finditer(text):
        marks = block["marks"].split()
        if "run" not in marks:
            continue
        for part in re.split(r"^\$ ", block["body"], flags=re.MULTILINE)[1:]:
            line, _, expected = part.partition("\n")
            found.append(Command(line, expected, "model" in marks))
    return found


README = commands((ROOT / "README.md").read_text())


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment in which `gemel` is this source tree, run by this Python."""
    script = tmp_path / "bin" / "gemel"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gemel "$@"\n')
    script.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GEMEL_") or name == "GEMEL_CACHE"}
    return {**kept, "PATH": f"{script.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src")}


def run(command: Command, environment: dict[str, str], folder: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", command.line], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=folder, check=False
    )
    pattern = ".*?".join(re.escape(piece) for piece in command.expected.split("..."))
    assert re.fullmatch(pattern, done.stdout, re.DOTALL), f"$ {command.line}\n{done.stdout}\n--- expected\n{command.expected}"


@pytest.mark.parametrize("command", [command for command in README if not command.needs_model], ids=lambda command: command.line)
def test_command_prints_what_the_readme_says(command: Command, shell: dict[str, str], tmp_path: Path) -> None:
    run(command, shell, tmp_path)


@pytest.mark.model
@pytest.mark.parametrize("command", [command for command in README if command.needs_model], ids=lambda command: command.line)
def test_command_with_the_model_prints_what_the_readme_says(command: Command, shell: dict[str, str], tmp_path: Path, smollm2: Path) -> None:
    if smollm2 != store.directory(store.DEFAULT):
        pytest.skip("GEMEL_TEST_MODEL names another model than the one the README talks to")
    run(command, shell, tmp_path)


def test_readme_has_both_kinds() -> None:
    assert {command.needs_model for command in README} == {True, False}


def test_blocks_are_cut_into_commands() -> None:
    text = "```console run\n$ a\nx\ny\n$ b\n```\n\n```console\n$ c\n```\n\n```console run model\n$ d\nz\n```\n"
    assert commands(text) == [Command("a", "x\ny\n", False), Command("b", "", False), Command("d", "z\n", True)]


def test_every_make_target_that_the_readme_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {target for line in re.findall(r"^([a-z ]+):", makefile, re.MULTILINE) for target in line.split()}
    named = set(re.findall(r"\bmake ([a-z]+)\b", (ROOT / "README.md").read_text())) - {"sure"}
    assert named <= targets
