"""What every configuration type shares: frozen, no unknown keys, and errors that name the nearest key.

A setting that is misspelt must never be ignored, so unknown keys are refused and the message proposes what was probably meant.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from gemel.config.errors import ConfigError


class Config(BaseModel):
    """Frozen plain data. Build it with `parse` when the values come from a user."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """`cls(**values)`, with pydantic's report turned into one `ConfigError` that a person can act on."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(cls, e) for e in error.errors())) from None


def _explain(cls: type[BaseModel], error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = list(cls.model_fields)
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"{cls.__name__} has no key {where!r}: {hint}"
    return f"{cls.__name__}.{where} = {error['input']!r}: {error['msg']}" if where else str(error["msg"])
