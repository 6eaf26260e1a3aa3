"""The command line: what it accepts, refuses and prints."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

import gemel
from gemel.bench import command
from gemel.config.engine import EngineConfig, StaticBatching
from gemel.config.errors import ConfigError


def parse(*argv):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(argv)


def test_defaults_are_the_engines_own():
    assert command.engine_config(parse("decode")) == EngineConfig()


def test_every_engine_flag_reaches_the_engine():
    flags = "--dtype float32 --device cpu --threads 2 --max-context 256 --max-running 4 --max-step-tokens 64"
    more = "--block-tokens 8 --kv-bytes 1000000 --no-prefix-cache --batching static --batch-size 3"
    config = command.engine_config(parse("throughput", *flags.split(), *more.split()))
    assert config == EngineConfig(
        dtype="float32",
        device="cpu",
        threads=2,
        max_context=256,
        max_running=4,
        max_step_tokens=64,
        block_tokens=8,
        kv_bytes=1_000_000,
        prefix_cache=False,
        batching=StaticBatching(batch_size=3),
    )


def test_a_batch_size_that_would_be_ignored_is_refused_and_the_way_out_works():
    with pytest.raises(ConfigError, match="--batching static"):
        command.engine_config(parse("decode", "--batch-size", "3"))
    assert command.engine_config(parse("decode", "--batch-size", "3", "--batching", "static")).batching == StaticBatching(batch_size=3)


def test_bad_values_are_explained():
    with pytest.raises(ConfigError, match="block_tokens"):
        command.engine_config(parse("decode", "--block-tokens", "7"))
    with pytest.raises(SystemExit):
        parse("decode", "--repeat", "0")
    with pytest.raises(SystemExit):
        parse("sprint")


def test_help_imports_nothing_heavy():
    code = "import sys, argparse; from gemel.bench import command; command.add_arguments(argparse.ArgumentParser()); print(*sys.modules)"
    source = Path(gemel.__file__).parents[1]  # of this checkout, which need not be the installed one
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=source).stdout.split()
    assert not {"torch", "numpy", "pydantic"} & set(loaded)
