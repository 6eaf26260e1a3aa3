"""What each lever that saves memory saves here, and what it costs: the same steps with and without it, beside what is published.

What is saved is counted in the memory that training takes above the interpreter and its libraries, which no lever can save. "Pinned" leaves
out pages of files, which the system may drop when somebody else needs memory: what lives on a disk is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from gemel.bench.report import aligned
from gemel.bench.train import Result, Work
from gemel.config.errors import ConfigError
from gemel.config.levers import TRAINING, settings


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is measured under one name: settings that turn it on, and what is published, with its source."""

    settings: tuple[str, ...]
    published: str


def chosen(names: Sequence[str], length: int) -> dict[str, Chosen]:
    """Levers of `config.levers` by name, several at once as `NAME+NAME`; none named means all that are not on anyway.

    `length` is how many tokens a sequence has. Raises ConfigError for a lever that does not exist.
    """
    known = {lever.id: lever for lever in TRAINING}
    found = {}
    for name in names or [lever.id for lever in TRAINING if not lever.default]:
        levers = []
        for one in name.split("+"):
            if one not in known:
                raise ConfigError(f"there is no lever {one!r}; there is {', '.join(known)}")
            levers.append(known[one])
        found[name] = Chosen(
            tuple(setting for lever in levers for setting in settings(lever, length)),
            "; ".join(lever.published for lever in levers if lever.published),
        )
    return found


def figures(levers: Mapping[str, Chosen], base: Result, results: Sequence[Result], work: Work) -> list[dict[str, Any]]:
    """Plain data of each: memory and time, with it and by what they are without it."""
    made: list[dict[str, Any]] = []
    for (name, lever), result in zip(levers.items(), results, strict=True):
        head: dict[str, Any] = {"lever": name, "settings": lever.settings, "published": lever.published}
        if result.error:
            made.append(head | {"error": result.error})
            continue
        ours, without = _training_bytes(result), _training_bytes(base)
        slower = median(result.step_s(work)) / median(base.step_s(work))
        planned = sum(result.rounds[0]["planned_bytes"].values()) / sum(base.rounds[0]["planned_bytes"].values())
        made.append(
            head
            | {"training_bytes": ours, "without_bytes": without, "memory": ours / without, "planned_memory": planned, "time": slower}
            | {"pinned": _pinned_bytes(result) / _pinned_bytes(base)}
            | {"loss": result.losses[-1], "loss_without": base.losses[-1], "rounds": result.rounds}
        )
    return made


def _training_bytes(result: Result) -> int:
    return max(int(said["peak_bytes"]) - int(said["base_bytes"]) for said in result.rounds)


def _pinned_bytes(result: Result) -> int:
    return max(int(said["pinned_bytes"]) - int(said["base_pinned_bytes"]) for said in result.rounds)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Levers under each other."""
    lines = [("lever", "MB", "of base", "pinned", "time", "last loss", "published")]
    lines += [
        (
            row["lever"],
            f"{row['training_bytes'] / 1e6:,.0f}",
            f"{row['memory']:.0%}",
            f"{row['pinned']:.0%}",
            f"{row['time']:.2f}x",
            f"{row['loss']:.5f}",
            row["published"],
        )
        for row in rows
        if "error" not in row
    ]
    return "\n".join([aligned(lines), *(f"{row['lever']} did not run: {row['error']}" for row in rows if "error" in row)])
