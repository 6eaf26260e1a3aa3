"""`gemel train recipe.toml`: a model from data, as a recipe says; or what is missing of one. With `--search`, many of them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemel.config.train import TrainRecipe
    from gemel.train.search import Trial

HELP = "train a model as a recipe says"
EXAMPLE = """gemel train recipes/tiny_pretrain.toml
gemel train recipes/tiny_pretrain.toml --output out/longer --set steps=1000 --set optim.lr=3e-3
gemel train recipes/tiny_pretrain.toml --output out/search --search recipes/search.toml"""


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
    parser.add_argument("--search", type=Path, metavar="FILE", help="try values of the recipe's fields as this TOML file says")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Train, or go on."""
    recipe = read(args)
    from gemel.config import env
    from gemel.config.errors import ConfigError

    place = env.place()
    if args.search is not None:
        if place is not None:
            raise ConfigError(f"--search is for one process, and this is one of {place.num_ranks}; run gemel train without torchrun")
        return _search(args, recipe)
    from gemel.train import run as training

    try:
        result = training.run(recipe, peak(recipe), args.quiet)
    except KeyboardInterrupt:
        if not args.quiet and (place is None or place.rank == 0):
            print("gemel: stopped; the same command goes on from what is saved", file=sys.stderr)
        raise
    latest, best = recipe.out / "latest", recipe.out / "best"
    if place is not None and place.rank > 0:
        return 0  # the first speaks for all
    if args.json:
        print(json.dumps(asdict(result) | {"path": str(latest)}))
    elif result.finished:
        loss = "" if result.validation_loss is None else f", validation loss {result.validation_loss:.4f}"
        chats = any(source.kind == "conversations" for source in recipe.data.train)
        command = f"gemel chat --model {latest}" if chats else f"gemel generate --model {latest} 'Once'"
        print(f"finished at step {result.step}{loss}; try: {command}")
        if best.exists() and best.resolve() != latest.resolve():
            print(f"the model with the least validation loss is {best}, of {best.resolve().name}")
    else:
        print(f"stopped at step {result.step}; the same command goes on from here")
    # What launched this process would take another status for a failure, and kill those that are still saving.
    return 0 if result.finished or place is not None else 130


def _search(args: argparse.Namespace, recipe: TrainRecipe) -> int:
    """Try what is to be tried, and print what came of it."""
    from gemel.config import search as config
    from gemel.train import search as searching

    outcome = searching.search(config.load(args.search), recipe, peak(recipe), args.quiet)
    best = outcome.best
    path = None if best is None else recipe.out / "trials" / f"{best.number:04d}"
    if args.json:
        trials = [asdict(trial) for trial in outcome.trials]
        print(json.dumps({"trials": trials, "best": best and best.number, "path": path and str(path), "finished": outcome.finished}))
    else:
        print(table(outcome.trials))
        print(f"the best is in {path}; see also: gemel runs {recipe.out / 'trials'}" if best else "no trial came to its end")
        if not outcome.finished:
            print("stopped; the same command goes on from here")
    return 0 if outcome.finished else 130


def table(trials: Sequence[Trial]) -> str:
    """Trials, the best first."""
    from gemel.bench.report import aligned

    names = list(trials[0].values) if trials else []
    order = sorted(trials, key=lambda trial: (trial.state != "finished", trial.loss is None, trial.loss or 0.0))
    rows = [("trial", *names, "step", "validation loss", "state")]
    for trial in order:
        values = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in trial.values.values()]
        step = str(trial.looks[-1][0]) if trial.looks else "-"
        rows.append((str(trial.number), *values, step, "-" if trial.loss is None else f"{trial.loss:.4f}", trial.state))
    reasons = [f"trial {trial.number} failed: {trial.reason}" for trial in order if trial.state == "failed"]
    return "\n".join([aligned(rows), *reasons])


def read(args: argparse.Namespace) -> TrainRecipe:
    """The recipe with what the command line puts over it, and a model's name turned into its path. Errors: `GemelError`."""
    from gemel.config import train as config
    from gemel.config.sources import PretrainedModel
    from gemel.llm import store

    recipe = config.load(args.recipe, args.settings)
    changes: dict[str, object] = {"out": Path(args.output)} if args.output else {}
    if isinstance(recipe.model, PretrainedModel):
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
