"""`gemel data recipe.toml`: from raw documents to training shards. `gemel data VERB` looks at the result, or makes a special kind of data.

A verb below this one is a module `data_VERB` of this room, named in `VERBS`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemel.config.data.pipeline import Recipe

HELP = "clean, filter and deduplicate documents as a recipe says"
EXAMPLE = """gemel data recipes/stdlib.toml --output out
gemel data recipes/stdlib.toml --output out --set step.0.min_chars=500 --workers 4
gemel data inspect out"""
VERBS = ("inspect", "label", "classify", "ngram", "sft")

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: others have to do something first
RUNNERS = ("local", "slurm", "ray")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="TOML file with [input], [[step]], [output] and [run]")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="put a value over the recipe's, as input.unit_bytes=1000000 or step.0.min_chars=100; may be repeated",
    )
    parser.add_argument("--output", metavar="DIR", help="folder of the result; a run that is there goes on (default: output.path)")
    parser.add_argument("--runner", choices=RUNNERS, help="who does the work (default: run.kind, else local)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes at once (default: the usable CPUs)")
    parser.add_argument("--rank", type=int, metavar="R", help="slurm: number of this member, from 0 (default: from SLURM's variables)")
    parser.add_argument("--world", type=int, metavar="N", help="slurm: how many members there are")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Do what is missing of the run and print its figures."""
    from gemel.data import inspect
    from gemel.data.run import start
    from gemel.data.run.board import Board
    from gemel.data.run.local import TaskFailed
    from gemel.data.run.slurm import NotYet

    recipe = read(args)
    board = Board(quiet=args.quiet)
    try:
        stats = start.run(recipe, board)
    except TaskFailed as error:
        print(f"gemel: {error}\ngemel: the same command goes on from here", file=sys.stderr)
        return 1
    except NotYet as error:
        print(f"gemel: {error}", file=sys.stderr)
        return TRY_AGAIN
    except KeyboardInterrupt:
        print("gemel: stopped; the same command goes on from here", file=sys.stderr)
        raise
    assert recipe.output.path is not None
    found = inspect.look(Path(recipe.output.path))
    if args.json:
        print(json.dumps(inspect.to_json(found)))
    elif stats is not None:
        print(inspect.tables(found))
    else:
        print("this rank's part is done; rank 0 finishes the run")
    return 0


def read(args: argparse.Namespace) -> Recipe:
    """The recipe with what the command line puts over it. Errors: `ConfigError`."""
    import difflib

    from gemel.config.data import pipeline
    from gemel.config.errors import ConfigError

    if not args.recipe.exists():
        near = difflib.get_close_matches(str(args.recipe), VERBS, n=1)
        raise ConfigError(f"there is no recipe {args.recipe}" + (f"; did you mean gemel data {near[0]}?" if near else ""))
    recipe = pipeline.load(args.recipe, args.settings)
    values = recipe.model_dump()
    given: dict[str, Any] = {name: getattr(args, name) for name in ("workers", "rank", "world") if getattr(args, name) is not None}
    kind = args.runner or ("slurm" if {"rank", "world"} & given.keys() else recipe.run.kind)
    if kind != "slurm" and {"rank", "world"} & given.keys():
        raise ConfigError(f"--rank and --world are for --runner slurm, not {kind}")
    values["run"] = {**(values["run"] if kind == recipe.run.kind else {}), "kind": kind, **given}
    if args.output:
        values["output"]["path"] = args.output
    return type(recipe).parse(values)
