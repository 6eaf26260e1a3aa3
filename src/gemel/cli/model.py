"""The argument that several verbs share: which model, and the engine that runs it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gemel.cli import flags

if TYPE_CHECKING:
    from gemel.config.engine import EngineConfig

DEFAULT = "smollm2-135m-instruct"  # gemel.llm.store.DEFAULT, which help must not import; a test compares them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --model and --pull."""
    parser.add_argument(
        "--model", default=DEFAULT, metavar="MODEL", help="Hugging Face directory, .gguf file, or name (default: %(default)s)"
    )
    parser.add_argument("--pull", action="store_true", help="fetch the model first if it is a name and not here yet")


def find(args: argparse.Namespace) -> Path:
    """The path of the chosen model."""
    from gemel.config.errors import ConfigError
    from gemel.llm import store

    if args.pull:
        if args.model not in store.EMBEDDED:
            raise ConfigError(f"--pull fetches {', '.join(store.EMBEDDED)}, not {args.model!r}; leave it out for a path")
        store.fetch(args.model, say=lambda line: print(f"gemel: {line}", file=sys.stderr, flush=True))
    return store.resolve(args.model)


def short_name(args: argparse.Namespace) -> str:
    """What to call the model: its name, or its path's last part without .gguf."""
    return Path(args.model).expanduser().resolve().name.removesuffix(".gguf")


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine that the flags describe."""
    from gemel.config.engine import EngineConfig
    from gemel.config.errors import ConfigError

    values = flags.given(args, flags.ENGINE)
    batching = values.get("batching", {})
    assert isinstance(batching, dict)
    kind = batching.setdefault("kind", "continuous") if batching else "continuous"
    if kind == "continuous" and len(batching) > 1:
        raise ConfigError("--batch-size and --batch-wait-s belong to --batching static or dynamic; give one of them or leave them out")
    if kind == "static" and "max_wait_s" in batching:
        raise ConfigError("--batch-wait-s belongs to --batching dynamic; a static batch never waits")
    return EngineConfig.parse(values)
