"""The command line: what it accepts, and that help stays cheap. Engine flags are the command-line room's and are tested there."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

import gemel
from gemel.bench import command


def parse(*argv):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(argv)


def test_what_is_asked():
    args = parse("prefill", "--workload", "w.json", "--repeat", "5", "--json", "--profile")
    assert (args.benchmark, args.workload, args.repeat, args.json, args.profile) == ("prefill", Path("w.json"), 5, True, True)


@pytest.mark.parametrize("argv", [(), ("sprint",), ("decode", "--repeat", "0"), ("decode", "--repeat", "x")])
def test_mistakes_are_refused(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(*argv)
    assert "error" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = "import sys, argparse; from gemel.bench import command; command.add_arguments(argparse.ArgumentParser()); print(*sys.modules)"
    source = Path(gemel.__file__).parents[1]  # of this checkout, which need not be the installed one
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=source).stdout.split()
    assert not {"torch", "numpy", "pydantic"} & set(loaded)
