"""What every configuration type shares: frozen, no unknown keys, and errors that name the nearest key.

A setting that is misspelt must never be ignored, so unknown keys are refused and the message proposes what was probably meant.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from gemel.config.errors import ConfigError

MOST = 4  # mistakes that one message tells


class Config(BaseModel):
    """Frozen plain data. Build it with `parse` when the values come from a user. Numbers are finite unless a field says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """`cls(**values)`, with pydantic's report turned into one `ConfigError` that a person can act on."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            found = error.errors()
            outer = {one["loc"][:length] for one in found for length in range(len(one["loc"]))}
            causes = [one for one in found if one["loc"] not in outer] or found  # what contains a mistake is reported as one, too
            more = [f"and {len(causes) - MOST} more"] if len(causes) > MOST else []
            raise ConfigError("; ".join([*(_explain(cls, one) for one in causes[:MOST]), *more])) from None


def _explain(cls: type[BaseModel], error: Any) -> str:
    owner, keys, choices = _place(cls, error["loc"])
    where = ".".join(map(str, keys))
    if error["type"] == "extra_forbidden":
        known = list(owner.model_fields)
        near = difflib.get_close_matches(str(keys[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"{owner.__name__} has no key {where!r}: {hint}"
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] in ("union_tag_not_found", "union_tag_invalid"):
        tags = [tag for choice in choices for tag in _tags(choice)]
        kind = error["input"].get("kind") if isinstance(error["input"], Mapping) else None
        return f"{where} has no kind; it is one of {', '.join(tags)}" if kind is None else _unknown(f"{where}.kind", kind, tags)
    if error["type"] in ("model_type", "model_attributes_type") and choices:
        return f"{where} = {error['input']!r} is no table; it has the keys {', '.join(choices[0].model_fields)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{cls.__name__}.{where} = {error['input']!r}: {message}" if where else message


def _unknown(where: str, kind: object, tags: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(kind), tags, n=1)
    return f"{where} = {kind!r} is not known: " + (f"did you mean {near[0]!r}?" if near else f"it is one of {', '.join(tags)}")


def _place(cls: type[BaseModel], location: Sequence[str | int]) -> tuple[type[BaseModel], list[str | int], list[type[BaseModel]]]:
    """The type that the last key belongs to, the keys as a user writes them, and the types that may stand at that place.

    pydantic puts the kind of a union's member among the keys.
    """
    owner, keys, choices = cls, [], [cls]
    for part in location:
        if len(choices) > 1 and (member := [choice for choice in choices if part in _tags(choice)]):
            choices = member
            continue
        keys.append(part)
        if isinstance(part, str) and choices:
            owner = choices[0]
            choices = _types(owner.model_fields[part].annotation) if part in owner.model_fields else []
    return owner, keys, choices


def _types(annotation: Any) -> list[type[BaseModel]]:
    """All configurations that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _types(inner)]


def _tags(choice: type[BaseModel]) -> tuple[str, ...]:
    return get_args(choice.model_fields["kind"].annotation) if "kind" in choice.model_fields else ()
