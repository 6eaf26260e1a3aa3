"""The one noun of this room: a document, and a document that was dropped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Document:
    """Some text and where it comes from. `metadata` holds plain JSON values; steps add what they learnt under their own name."""

    text: str
    id: str  # of the document in its source: a URL, a path, a line number
    source: str  # of the collection, as the recipe names it
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A document that a step rejects. Reasons are few and fixed names, such as `gopher.short`, because they are counted."""

    document: Document
    reason: str
    detail: str = ""  # for a person: the value that broke the rule, and the limit
