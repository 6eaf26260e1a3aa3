"""`gemel train recipe.toml`: a model from data, as a recipe says; or what is missing of one."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemel.config.train import TrainRecipe

HELP = "train a model as a recipe says"
EXAMPLE = """gemel train recipes/tiny_pretrain.toml
gemel train recipes/tiny_pretrain.toml --output out/longer --set steps=1000 --set optim.lr=3e-3"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="TOML file; the run.toml of a run repeats it")
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
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Train, or go on."""
    recipe = read(args)
    from gemel.config import env
    from gemel.train import run as training

    place = env.place()
    result = training.run(recipe, peak(recipe), args.quiet)
    latest = recipe.out / "latest"
    if place is not None and place.rank > 0:
        return 0
    if args.json:
        print(json.dumps(asdict(result) | {"path": str(latest)}))
    elif result.finished:
        loss = "" if result.validation_loss is None else f", validation loss {result.validation_loss:.4f}"
        print(f"finished at step {result.step}{loss}; try: gemel generate --model {latest} 'Once'")
    else:
        print(f"stopped at step {result.step}; the same command goes on from here")
    # What launched this process would take another status for a failure, and kill those that are still saving.
    return 0 if result.finished or place is not None else 130


def read(args: argparse.Namespace) -> TrainRecipe:
    """The recipe with what the command line puts over it, and a model's name turned into its path. Errors: `GemelError`."""
    from gemel.config import train as config
    from gemel.llm import store

    recipe = config.load(args.recipe, args.settings)
    changes: dict[str, object] = {"out": Path(args.output)} if args.output else {}
    if isinstance(recipe.model, config.PretrainedModel):
        changes["model"] = recipe.model.model_copy(update={"path": store.resolve(str(recipe.model.path))})
    return recipe.model_copy(update=changes)


def peak(recipe: TrainRecipe) -> float:
    """What this machine does at best with matrices in the run's arithmetic, in operations per second: measured, in less than a second."""
    import torch

    from gemel.bench import machine
    from gemel.train.run import device_of

    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    device = device_of(recipe)
    arithmetic = {"bf16": "bfloat16", "fp16": "float16" if device.type == "cuda" else "float32"}.get(recipe.precision.kind, "float32")
    return machine.rates(device, [arithmetic]).flops_per_s[arithmetic]
