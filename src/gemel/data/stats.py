"""Figures of a run: what every step took in, kept and dropped and why, how long documents are, which languages and sources they have.

Each task keeps its own and they are added up in the order of the units, so that the sum is the same whoever did which part. All of it is
counts; lengths go into buckets of powers of two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from gemel.data.document import Document, Dropped

MOST_NAMES = 200  # languages and sources that one task tells apart
OTHERS = "(others)"


@dataclass(slots=True)
class Group:
    """Documents and their characters."""

    documents: int = 0
    chars: int = 0

    def add(self, documents: int, chars: int) -> None:
        """Count some more."""
        self.documents += documents
        self.chars += chars


@dataclass(slots=True)
class Lengths:
    """Documents by length: bucket k counts those of 2**(k-1) to 2**k - 1 characters, bucket 0 the empty ones."""

    buckets: Counter[int] = field(default_factory=Counter)

    def add(self, chars: int) -> None:
        """Count one document."""
        self.buckets[chars.bit_length()] += 1


Groups = dict[str, Group]


@dataclass(slots=True)
class StepStats:
    """One step of the recipe; step 0 is reading. `taken` came in; `dropped` by reason; the rest went on."""

    name: str
    taken: Group = field(default_factory=Group)
    dropped: Groups = field(default_factory=dict)

    @property
    def num_dropped(self) -> int:
        """Documents dropped, for any reason."""
        return sum(group.documents for group in self.dropped.values())

    @property
    def num_kept(self) -> int:
        """Documents that went on."""
        return self.taken.documents - self.num_dropped


@dataclass(slots=True)
class Stats:
    """Figures of a part of a run, or of all of it.

    steps     as in the recipe, reading first
    kept      what the output holds; `taken_lengths` is of what was read, `kept_lengths` of what was kept
    counts    what steps counted without dropping (`metadata["counts"]`), over what was kept
    skipped   records that were never meant to be documents, such as the requests in a web archive
    tokens    in the output, if it is made of tokens or a step counted them (`metadata["tokens"]`), else None
    reports   figures by step and by what they are of: how a mixture meets its budget, source by source
    """

    steps: list[StepStats]
    kept: Group = field(default_factory=Group)
    taken_lengths: Lengths = field(default_factory=Lengths)
    kept_lengths: Lengths = field(default_factory=Lengths)
    languages: Groups = field(default_factory=dict)
    sources: Groups = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    tokens: int | None = None
    reports: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    @classmethod
    def empty(cls, names: Sequence[str]) -> Self:
        """No figures yet, of a recipe whose steps have these names, reading included."""
        return cls([StepStats(name) for name in names])

    def take(self, step: int, documents: int, chars: int) -> None:
        """Documents came to a step."""
        self.steps[step].taken.add(documents, chars)

    def drop(self, step: int, dropped: Dropped) -> None:
        """A step dropped one."""
        self.steps[step].dropped.setdefault(dropped.reason, Group()).add(1, len(dropped.document.text))

    def keep(self, document: Document) -> None:
        """A document reached the output."""
        chars, metadata = len(document.text), document.metadata
        self.kept.add(1, chars)
        self.kept_lengths.add(chars)
        _group(self.sources, document.source).add(1, chars)
        if "language" in metadata:
            _group(self.languages, _language(metadata["language"])).add(1, chars)
        if isinstance(counts := metadata.get("counts"), dict):
            self.counts.update({name: number for name, number in counts.items() if isinstance(number, int)})
        if isinstance(tokens := metadata.get("tokens"), int):
            self.tokens = (self.tokens or 0) + tokens

    def add(self, other: Stats) -> None:
        """Add the figures of another part of the same run."""
        for mine, theirs in zip(self.steps, other.steps, strict=True):
            mine.taken.add(theirs.taken.documents, theirs.taken.chars)
            _add_groups(mine.dropped, theirs.dropped)
        self.kept.add(other.kept.documents, other.kept.chars)
        self.taken_lengths.buckets.update(other.taken_lengths.buckets)
        self.kept_lengths.buckets.update(other.kept_lengths.buckets)
        _add_groups(self.languages, other.languages)
        _add_groups(self.sources, other.sources)
        self.counts.update(other.counts)
        self.skipped.update(other.skipped)
        if other.tokens is not None:
            self.tokens = (self.tokens or 0) + other.tokens

    def reasons(self) -> list[tuple[StepStats, str, Group]]:
        """All that was dropped: by step, then the commonest reason first."""
        return [
            (step, reason, group)
            for step in self.steps
            for reason, group in sorted(step.dropped.items(), key=lambda item: (-item[1].documents, item[0]))
        ]

    def check(self) -> None:
        """Nothing lost, nothing twice: what a step passes on is what the next takes, and the last passes on what was kept."""
        for before, after in zip(self.steps, self.steps[1:], strict=False):
            assert before.num_kept == after.taken.documents, f"{before.name} passed on {before.num_kept}, {after.name} took {after.taken}"
        last = self.steps[-1]
        assert last.num_kept == self.kept.documents, f"{last.name} passed on {last.num_kept} documents, {self.kept.documents} were written"
        assert sum(self.kept_lengths.buckets.values()) == self.kept.documents

    def to_json(self) -> dict[str, Any]:
        """Plain values, with names sorted."""
        return {
            "steps": [{"name": step.name, "taken": _pair(step.taken), "dropped": _pairs(step.dropped)} for step in self.steps],
            "kept": _pair(self.kept),
            "taken_lengths": {str(bucket): number for bucket, number in sorted(self.taken_lengths.buckets.items())},
            "kept_lengths": {str(bucket): number for bucket, number in sorted(self.kept_lengths.buckets.items())},
            "languages": _pairs(self.languages),
            "sources": _pairs(self.sources),
            "counts": dict(sorted(self.counts.items())),
            "skipped": dict(sorted(self.skipped.items())),
            "tokens": self.tokens,
            "reports": self.reports,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(
            steps=[StepStats(step["name"], Group(*step["taken"]), _groups(step["dropped"])) for step in values["steps"]],
            kept=Group(*values["kept"]),
            taken_lengths=Lengths(Counter({int(bucket): number for bucket, number in values["taken_lengths"].items()})),
            kept_lengths=Lengths(Counter({int(bucket): number for bucket, number in values["kept_lengths"].items()})),
            languages=_groups(values["languages"]),
            sources=_groups(values["sources"]),
            counts=Counter(values["counts"]),
            skipped=Counter(values["skipped"]),
            tokens=values["tokens"],
            reports=values.get("reports", {}),
        )


def _language(value: Any) -> str:
    """The name of a language from what a step said: the name itself, or a table with it and a score."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("code", "label", "language", "name") if key in value), "?")
    return str(value)


def _group(groups: Groups, name: str) -> Group:
    if name not in groups and len(groups) >= MOST_NAMES:
        name = OTHERS
    return groups.setdefault(name, Group())


def _add_groups(mine: Groups, theirs: Groups) -> None:
    for name, group in theirs.items():
        mine.setdefault(name, Group()).add(group.documents, group.chars)


def _pair(group: Group) -> list[int]:
    return [group.documents, group.chars]


def _pairs(groups: Groups) -> dict[str, list[int]]:
    return {name: _pair(group) for name, group in sorted(groups.items())}


def _groups(values: dict[str, list[int]]) -> Groups:
    return {name: Group(*pair) for name, pair in values.items()}
