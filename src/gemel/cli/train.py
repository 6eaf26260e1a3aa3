"""`gemel train recipe.toml`: a model from data, as a recipe says; or what is missing of one."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "train a model as a recipe says"
EXAMPLE = """gemel train recipes/tiny_pretrain.toml
gemel train recipes/tiny_pretrain.toml --output out/longer --set steps=2000"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="TOML file, see docs/train.md")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="put a value over the recipe's, as steps=500 or optim.lr=3e-4; may be repeated",
    )
    parser.add_argument("--output", metavar="DIR", help="folder of the run; a run that is there goes on (default: the recipe's out)")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Train, or go on."""
    from gemel.config import train as config

    settings = [*args.settings, *([f"out={args.output}"] if args.output else [])]
    recipe = config.load(args.recipe, settings)
    from gemel.train import run as training

    result = training.run(recipe, quiet=args.quiet)
    print(f"step {result.step}: {recipe.out / 'latest'}")
    return 0 if result.finished else 130
