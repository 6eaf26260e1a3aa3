"""The environment variables that Gemel knows, read once and typed, in this one file.

A variable is for what belongs to a machine or must not appear in a process list; everything else is a setting of a verb. A bad value
is an error, and so is a `GEMEL_` name that nobody knows: a misspelt variable must not be ignored.

    GEMEL_CACHE        folder for pulled models; default $XDG_CACHE_HOME/gemel or ~/.cache/gemel
    GEMEL_API_KEY      key that `gemel serve` asks of clients, as --api-key does
    GEMEL_TEST_MODEL   model directory or .gguf file for the tests marked `model`, instead of the pulled one

What torchrun tells the processes that it starts is read here, too: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gemel.config.errors import ConfigError

NAMES = ("GEMEL_CACHE", "GEMEL_API_KEY", "GEMEL_TEST_MODEL")


@dataclass(frozen=True, slots=True)
class Env:
    """What the environment says. `cache` need not exist yet."""

    cache: Path
    api_key: str | None
    test_model: Path | None


@dataclass(frozen=True, slots=True)
class Place:
    """One process among those of a job: its number among all and on its machine, how many there are, and where they find each other.

    `hosted` says that somebody else listens there, so that no process needs to; `num_local` is how many there are on this machine.
    """

    rank: int
    local_rank: int
    num_ranks: int
    host: str
    port: int
    hosted: bool
    num_local: int


@cache
def env() -> Env:
    """The process's environment, read at the first call and never again."""
    return read(os.environ)


def read(variables: Mapping[str, str]) -> Env:
    """Typed values of `variables`; `ConfigError` for a bad one."""
    for name in variables:
        if name.startswith("GEMEL_") and name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            raise ConfigError(f"environment variable {name} is not known: " + (f"did you mean {near[0]}?" if near else ", ".join(NAMES)))
    return Env(cache=_cache(variables), api_key=_api_key(variables), test_model=_test_model(variables))


def place(variables: Mapping[str, str] = os.environ) -> Place | None:
    """What a launcher such as torchrun says; None if nobody launched several processes. `ConfigError` if it says half of it."""
    if variables.get("WORLD_SIZE", "1") == "1":
        return None
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if not variables.get(name)]:
        raise ConfigError(
            f"WORLD_SIZE = {variables['WORLD_SIZE']}, but {missing[0]} is not set; start the job with torchrun, which sets both"
        )
    try:
        rank, local_rank, num_ranks, port = (int(variables[name]) for name in names if name != "MASTER_ADDR")
        num_local = int(variables.get("LOCAL_WORLD_SIZE", num_ranks))
    except ValueError as error:
        raise ConfigError(
            f"a variable of {', '.join(names)} is not a number ({error}); start the job with torchrun, which sets them"
        ) from None
    if not 0 <= rank < num_ranks:
        raise ConfigError(f"RANK = {rank} is not one of WORLD_SIZE = {num_ranks} ranks; start the job with torchrun, which sets both")
    return Place(
        rank, local_rank, num_ranks, variables["MASTER_ADDR"], port, variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True", num_local
    )


def _cache(variables: Mapping[str, str]) -> Path:
    if "GEMEL_CACHE" in variables:
        path = _absolute("GEMEL_CACHE", variables["GEMEL_CACHE"])
    elif variables.get("XDG_CACHE_HOME"):
        path = Path(variables["XDG_CACHE_HOME"]) / "gemel"
        if not path.is_absolute():  # the XDG specification says that a relative path is to be ignored
            path = Path.home() / ".cache" / "gemel"
    else:
        path = Path.home() / ".cache" / "gemel"
    if path.exists() and not path.is_dir():
        raise ConfigError(f"the cache folder {path} is not a folder; set GEMEL_CACHE to one")
    return path


def _api_key(variables: Mapping[str, str]) -> str | None:
    key = variables.get("GEMEL_API_KEY")
    if key is not None and (not key.strip() or key != key.strip()):
        raise ConfigError("GEMEL_API_KEY is empty or has blanks around it; unset it or give a key")
    return key


def _test_model(variables: Mapping[str, str]) -> Path | None:
    if "GEMEL_TEST_MODEL" not in variables:
        return None
    path = _absolute("GEMEL_TEST_MODEL", variables["GEMEL_TEST_MODEL"])
    if not path.exists():
        raise ConfigError(f"GEMEL_TEST_MODEL = {path} does not exist; give a model directory or a .gguf file")
    return path


def _absolute(name: str, value: str) -> Path:
    path = Path(value).expanduser()
    if not path.is_absolute():
        raise ConfigError(f"{name} = {value!r} is not an absolute path; for the current folder use {name}=$PWD/{value}")
    return path
