"""A search: which fields of a recipe are tried with which values, how the next ones are chosen, and when a trial is given up.

    seed = 0

    [space]
    "optim.lr" = { kind = "float", low = 1e-4, high = 1e-2, log = true }
    "optim.schedule.kind" = { kind = "choice", values = ["cosine", "wsd"] }
    "batch.tokens" = { kind = "choice", values = [4096, 8192] }

    [method]
    kind = "bayes"
    trials = 20

    [prune]
    kind = "median"

What is minimized is the validation loss at the end of a run.
"""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from gemel.config.base import Config
from gemel.config.errors import ConfigError

# --- what is tried ------------------------------------------------------------------------------------------------------------------------


class Choice(Config):
    """One of these values, which may be anything that a recipe may have there, tables included."""

    kind: Literal["choice"]
    values: Annotated[tuple[Any, ...], Field(min_length=1)]

    def grid(self, name: str) -> list[Any]:  # noqa: ARG002
        """All that a grid tries."""
        return list(self.values)

    def at(self, share: float) -> Any:
        """The value at a share of the way, in [0, 1)."""
        return self.values[int(share * len(self.values))]


class _Bounds(Config):
    """From `low` to `high`, both included.

    log  by factors instead of differences, for what matters by its order of magnitude
    """

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low = {self.low:g} is not below high = {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"low = {self.low:g} has no logarithm; set log = false, or a low above 0")
        return self

    def _between(self, share: float) -> float:
        if self.log:
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        return self.low + share * (self.high - self.low)


class Float(_Bounds):
    """A number.

    points  of a grid, evenly spaced from low to high
    """

    kind: Literal["float"]
    points: Annotated[int, Field(ge=2)] | None = None

    def grid(self, name: str) -> list[float]:
        """All that a grid tries."""
        if self.points is None:
            raise ConfigError(f"{name} of kind 'float' has no end of values for a grid to try; set points = 5, or kind = 'choice'")
        return [self.low, *(self._between(number / (self.points - 1)) for number in range(1, self.points - 1)), self.high]

    def at(self, share: float) -> float:
        """The value at a share of the way, in [0, 1)."""
        return self._between(share)


class Integer(_Bounds):
    """A whole number, of those that are `step` apart."""

    kind: Literal["int"]
    low: int
    high: int
    step: PositiveInt = 1

    @model_validator(mode="after")
    def _steps_or_factors(self) -> Self:
        if self.log and self.step > 1:
            raise ValueError(f"log = true goes by factors, step = {self.step} by differences; leave one of them out")
        return self

    def grid(self, name: str) -> list[int]:  # noqa: ARG002
        """All that a grid tries."""
        return list(range(self.low, self.high + 1, self.step))

    def at(self, share: float) -> int:
        """The value at a share of the way, in [0, 1)."""
        if self.log:
            return min(max(round(self._between(share)), self.low), self.high)
        values = range(self.low, self.high + 1, self.step)
        return values[int(share * len(values))]


Parameter = Annotated[Choice | Float | Integer, Field(discriminator="kind")]

# --- how ----------------------------------------------------------------------------------------------------------------------------------


class Grid(Config):
    """Every combination, the last parameter changing fastest."""

    kind: Literal["grid"]


class Random(Config):
    """Each value drawn by itself (Bergstra and Bengio 2012, JMLR 13): with few parameters that matter, better than a grid."""

    kind: Literal["random"]
    trials: PositiveInt


class Bayes(Config):
    """The next is looked for where good trials are dense and bad ones are not (TPE, Bergstra et al. 2011; arXiv 2304.11127), by Optuna.

    startup  so many trials are random
    """

    kind: Literal["bayes"]
    trials: PositiveInt
    startup: NonNegativeInt = 5


Method = Annotated[Grid | Random | Bayes, Field(discriminator="kind")]


class NoPrune(Config):
    """Every trial comes to its end."""

    kind: Literal["none"] = "none"


class MedianPrune(Config):
    """A trial is given up when its loss is above the median of what others had at that step (Golovin et al. 2017).

    trials  so many others must have been there
    steps   nothing is given up before
    """

    kind: Literal["median"]
    trials: PositiveInt = 4
    steps: NonNegativeInt = 0


class HalvingPrune(Config):
    """At `steps`, `factor` times that, and so on, only the best 1 / `factor` of those who came so far go on (successive halving, one trial
    after the other; Li et al. 2018, arXiv 1810.05934). Those are steps at which validation must look.
    """

    kind: Literal["halving"]
    steps: PositiveInt
    factor: Annotated[int, Field(ge=2)] = 3


Prune = Annotated[NoPrune | MedianPrune | HalvingPrune, Field(discriminator="kind")]


class SearchConfig(Config):
    """A whole search.

    space  parameters by the keys of a recipe
    keep   checkpoints: of the best trial so far, or of all
    seed   of everything that is drawn; the recipe's own seed is the same in all trials
    """

    space: Annotated[dict[str, Parameter], Field(min_length=1)]
    method: Method
    prune: Prune = NoPrune()
    keep: Literal["best", "all"] = "best"
    seed: NonNegativeInt = 0

    @field_validator("space")
    @classmethod
    def _keys(cls, space: dict[str, Any]) -> dict[str, Any]:
        for name in space:
            if not re.fullmatch(r"\w+(\.\w+)*", name):
                raise ValueError(f'{name!r} is no key of a recipe; write it in quotes with dots, as "optim.lr"')
            if name in ("out", "steps"):
                raise ValueError(f"{name!r} cannot be searched: trials differ in what they are, and are compared step by step")
        return space


def load(path: Path) -> SearchConfig:
    """The search in a TOML file. Errors: `ConfigError`."""
    try:
        return SearchConfig.parse(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"cannot read the search {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
