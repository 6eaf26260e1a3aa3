"""`gemel runs`: which training runs there are, how far they came, and what their curves look like."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemel.config.train import TrainRecipe

HELP = "list training runs, and plot what they measured"
EXAMPLE = """gemel runs out
gemel runs out/tiny_pretrain --plot loss
gemel runs out --plot validation --svg loss.svg"""

CURVES = ("loss", "validation", "norm", "lr", "tokens_per_s", "utilization")
FRESH_S = 60.0  # where there are no locks, a run goes on that wrote something so recently


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("folders", nargs="*", default=["out"], metavar="DIR", help="runs, or folders to search for runs (default: out)")
    parser.add_argument("--plot", choices=CURVES, help="draw a curve of every run (default for a single run: loss)")
    parser.add_argument("--smooth", type=int, default=1, metavar="N", help="draw means over N steps (default: 1)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw into an SVG file instead of the terminal")
    parser.add_argument("--json", action="store_true", help="print one JSON object per run")


def run(args: argparse.Namespace) -> int:
    """List and plot."""
    from gemel.config.errors import ConfigError
    from gemel.train import metrics

    found = find([Path(folder) for folder in args.folders])
    if args.smooth < 1:
        raise ConfigError(f"--smooth {args.smooth} is no number of steps; give 1 or more")
    lines = {folder: metrics.read(folder) for folder in found if _readable(folder)}
    summaries = {folder: summary(folder, rows) for folder, rows in lines.items()}
    if args.json:
        for one in summaries.values():
            print(json.dumps(one))
    else:
        print(_table(list(summaries.values())))
    kind = args.plot or ("loss" if len(found) == 1 or args.svg else None)
    if kind is not None and not (args.json and args.svg is None):
        _draw({str(folder): curve(rows, kind) for folder, rows in lines.items()}, kind, args.smooth, args.svg)
    return 0


def find(folders: list[Path]) -> list[Path]:
    """Folders with metrics, oldest first."""
    from gemel.config.errors import ConfigError
    from gemel.train.metrics import FILE

    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder; give the folder of a run, or one with runs in it")
    found = {path.parent for folder in folders for pattern in (FILE, f"*/{FILE}") for path in folder.glob(pattern)}
    if not found:
        raise ConfigError(f"there are no runs in {', '.join(map(str, folders))}; begin one with: gemel train RECIPE")
    return sorted(found, key=lambda folder: ((folder / FILE).stat().st_mtime, str(folder)))


def _readable(folder: Path) -> bool:
    """Whether a run's metrics are whole. One that is damaged is named, and the others are listed all the same."""
    from gemel.train import metrics

    try:
        metrics.read(folder)
    except ValueError as error:
        print(f"gemel: {folder / metrics.FILE} is passed over, for it is damaged: {error}", file=sys.stderr)
        return False
    return True


def summary(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a line of the table says about a run."""
    steps = [row for row in rows if "event" not in row]
    looks = [row["loss"] for row in rows if row.get("event") == "validation"]
    recipe = _recipe(folder)
    spent_s = sum(row["step_s"] for row in steps)
    last = steps[-1]["step"] if steps else 0
    return {
        "run": str(folder),
        "state": _state(folder, recipe, last, looks),
        "step": last,
        "steps": None if recipe is None else recipe.steps,
        "loss": steps[-1]["loss"] if steps else None,
        "validation_loss": looks[-1] if looks else None,
        "best_validation_loss": min(looks) if looks else None,
        "tokens": sum(row["tokens"] for row in steps),
        "tokens_per_s": sum(row["tokens"] for row in steps) / spent_s if spent_s else None,
        "skipped": sum(row.get("action") in ("skip", "overflow", "rollback") for row in steps),
    }


def _recipe(folder: Path) -> TrainRecipe | None:
    """What the run does, if this version can tell."""
    from gemel.config import train as config
    from gemel.config.errors import ConfigError

    try:
        return config.load(folder / "run.toml")
    except ConfigError:
        return None


def _state(folder: Path, recipe: TrainRecipe | None, last: int, looks: Sequence[float]) -> str:
    import time

    from gemel.data import manifest
    from gemel.train.metrics import FILE

    locked = manifest.locked(folder)
    if locked or (locked is None and time.time() - (folder / FILE).stat().st_mtime < FRESH_S):
        return "running"
    if recipe is not None and last >= recipe.steps:
        return "finished"
    patience = None if recipe is None else recipe.validation.patience
    hopeless = patience is not None and len(looks) > patience and min(looks[:-patience]) <= min(looks[-patience:])
    return "ended early" if hopeless else "stopped"


def curve(rows: list[dict[str, Any]], kind: str) -> list[tuple[float, float]]:
    """Points (step, value)."""
    if kind == "validation":
        return [(row["step"], row["loss"]) for row in rows if row.get("event") == "validation"]
    steps = [row for row in rows if "event" not in row]
    values = {row["step"]: row["tokens"] / row["step_s"] if kind == "tokens_per_s" else row.get(kind) for row in steps}
    return [(step, value) for step, value in sorted(values.items()) if value is not None]  # of a step that was done again, the last


def _table(summaries: list[dict[str, Any]]) -> str:
    from gemel.bench.report import aligned

    def number(value: float | None, spec: str) -> str:
        return "" if value is None else format(value, spec)

    rows: list[tuple[str, ...]] = [("run", "state", "step", "loss", "validation", "best", "tokens", "tokens/s", "left out")]
    rows += [
        (
            one["run"],
            one["state"],
            f"{one['step']}/{one['steps'] or '?'}",
            number(one["loss"], ".4f"),
            number(one["validation_loss"], ".4f"),
            number(one["best_validation_loss"], ".4f"),
            f"{one['tokens']:,}",
            number(one["tokens_per_s"], ",.0f"),
            str(one["skipped"]),
        )
        for one in summaries
    ]
    return aligned(rows)


def _draw(curves: dict[str, list[tuple[float, float]]], kind: str, window: int, svg: Path | None) -> None:
    from gemel.config.errors import ConfigError
    from gemel.train import plot

    shown = {name: plot.smooth(points, window) for name, points in curves.items()}
    if svg is None:
        print("\n" + plot.terminal(shown, kind, width=min(shutil.get_terminal_size().columns - 12, 100)))
    else:
        try:
            svg.parent.mkdir(parents=True, exist_ok=True)
            svg.write_text(plot.svg(shown, kind, "step", kind), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {svg}: {error.strerror}; give another --svg") from None
        print(f"{kind} is drawn in {svg}")
