"""Which rate, decay and L1 each parameter gets: exclusions by kind, overridden by groups of name patterns.

A pattern that decides nothing is an error: a setting that was written down and applied to nothing would be a silent failure.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

from gemel.config.errors import ConfigError
from gemel.config.optim import Group, OptimConfig


@dataclass(frozen=True, slots=True)
class Settings:
    """What one parameter is trained with, beside the rate of the step."""

    lr_scale: float
    weight_decay: float
    l1: float


def assign(config: OptimConfig, names: Collection[str]) -> dict[str, Settings]:
    """Settings by parameter name. `ConfigError` for a group that reaches no parameter."""
    groups = {name: next((group for group in config.groups if fnmatchcase(name, group.match)), None) for name in names}
    for group in config.groups:
        if all(used is not group for used in groups.values()):
            _nothing(group, names)
    return {name: _settings(config, name, group) for name, group in groups.items()}


def kinds(name: str) -> set[str]:
    """What a parameter is, of norms, biases and embeddings, by its name in `model/`. A head tied to the embedding has the latter's name."""
    *_, owner, last = ("", *name.split("."))
    found = {"norms"} if owner == "norm" or owner.endswith("_norm") else set()
    if last == "bias":
        found.add("biases")
    if owner in ("embed", "positions"):
        found.add("embeddings")
    return found


def shapes_of(names: Collection[str]) -> str:
    """Names for a message: layers written once."""
    return ", ".join(sorted({".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}))


def _settings(config: OptimConfig, name: str, group: Group | None) -> Settings:
    exempt = not kinds(name).isdisjoint(config.exempt)
    decay, l1 = (0.0, 0.0) if exempt else (config.weight_decay, config.l1)
    if group is None:
        return Settings(1.0, decay, l1)
    return Settings(
        group.lr_scale,
        decay if group.weight_decay is None else group.weight_decay,
        l1 if group.l1 is None else group.l1,
    )


def _nothing(group: Group, names: Collection[str]) -> None:
    if any(fnmatchcase(name, group.match) for name in names):
        raise ConfigError(f"the group that matches {group.match!r} decides nothing: earlier groups take all that it matches; move it up")
    raise ConfigError(f"no trained parameter is named like {group.match!r}; there are: {shapes_of(names)}")
