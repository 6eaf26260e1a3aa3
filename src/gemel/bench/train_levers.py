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


@dataclass(frozen=True, slots=True)
class Lever:
    """Settings that turn it on, and what is published, with its source."""

    settings: tuple[str, ...]
    published: str


ADAFACTOR = "optim.method={kind='adafactor'}"
NARROW = ("precision={kind='bf16'}", "optim.weights='stochastic'")
LEVERS = {
    "recompute": Lever(("activations={kind='recompute'}",), "5-10x less activation memory for 30% more time (arXiv 1604.06174)"),
    "recompute-2": Lever(("activations={kind='recompute',blocks=2}",), "between each block and sqrt(n)"),
    "recompute-sqrt": Lever(("activations={kind='recompute',blocks='sqrt'}",), "activation memory of O(sqrt n) (arXiv 1604.06174)"),
    "keep": Lever(("activations={kind='none'}",), "without `selective`, which is the default and recomputes norms and gates"),
    "heap": Lever(("heap='return'",), "nothing; memory without holes"),
    "recompute+heap": Lever(("activations={kind='recompute'}", "heap='return'"), "nothing"),
    "accumulate": Lever(("batch.micro_tokens=SEQUENCE",), "activations of one micro-batch, no other cost"),
    "state-bf16": Lever(("optim.state='bf16'",), "half of Adam's 8 bytes per parameter"),
    "state-int8": Lever(("optim.state='int8'",), "a quarter of Adam's 8 bytes per parameter (arXiv 2110.02861)"),
    "adafactor": Lever((ADAFACTOR,), "sublinear state (arXiv 1804.04235)"),
    "offload-state": Lever(
        ("offload.optimizer={kind='disk'}", "save.asynchronous=false"),
        "the optimizer's 8 bytes per parameter go to disk (arXiv 2104.07857)",
    ),
    "offload-all": Lever(
        ("offload.optimizer={kind='disk'}", "offload.parameters={kind='disk'}", "save.asynchronous=false"),
        "parameters too: models larger than memory (arXiv 2104.07857)",
    ),
    "bf16": Lever(("precision={kind='bf16'}", "optim.weights='master'"), "half the activations (arXiv 1710.03740)"),
    "stochastic": Lever(NARROW, "half of weights, gradients and activations, no master copy"),
}


def chosen(names: Sequence[str], shape_length: int) -> dict[str, Lever]:
    """Levers by name; none named means all. Raises ConfigError for one that does not exist."""
    if unknown := [name for name in names if name not in LEVERS]:
        raise ConfigError(f"there is no lever {unknown[0]!r}; there is {', '.join(LEVERS)}")
    found = {name: LEVERS[name] for name in names or LEVERS}
    return {name: _of_length(lever, shape_length) for name, lever in found.items()}


def _of_length(lever: Lever, length: int) -> Lever:
    settings = tuple(setting.replace("SEQUENCE", str(length)) for setting in lever.settings)
    return Lever(settings, lever.published)


def figures(levers: Mapping[str, Lever], base: Result, results: Sequence[Result], work: Work) -> list[dict[str, Any]]:
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
