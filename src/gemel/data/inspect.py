"""What a run has done, for people to read: figures, and the documents themselves, kept and dropped.

A rule is judged by looking at what it drops. So every reason comes with documents that had it, and a run that is not finished yet can be
looked at too.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from gemel.config.errors import ConfigError
from gemel.data import manifest
from gemel.data.manifest import Entry
from gemel.data.pipeline import READING, WRITING, Job
from gemel.data.read import files
from gemel.data.read.lines import NEWLINE, records
from gemel.data.read.reader import Reading
from gemel.data.stats import Group, Lengths, Stats, StepStats

EXCERPT_CHARS = 400
LONGEST_LINE_BYTES = 2**30  # we wrote the lines ourselves
COLUMNS = 110


@dataclass(frozen=True, slots=True)
class Sample:
    """A document, or the beginning of one. `reason` is empty if it was kept."""

    id: str
    source: str
    text: str
    num_chars: int
    reason: str = ""
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Inspection:
    """An output folder. `stages` are (name, tasks done, tasks) of a run that is not finished; `seconds` is what each step took."""

    output: Path
    stats: Stats
    entries: Mapping[str, Entry]
    seconds: Mapping[str, float]
    stages: tuple[tuple[str, int, int], ...]

    @property
    def steps(self) -> list[StepStats]:
        """The steps; writing only if it dropped something."""
        return [step for step in self.stats.steps if step.name != WRITING or step.dropped]

    def names(self, folder: str) -> list[str]:
        """Files in `kept` or `dropped`, in the order of the input."""
        return sorted(name for name in self.entries if name.startswith(folder + "/"))


def look(output: Path) -> Inspection:
    """Read what a run has left in its folder. Errors: `ConfigError` if there is none."""
    if not (output / "plan.json").exists():
        raise ConfigError(f"{output} holds no run: there is no plan.json; give the folder that `gemel data` wrote to")
    job = Job(output)
    if (found := manifest.read_manifest(output)) is not None:
        seconds = orjson.loads((output / "timing.json").read_bytes())
        return Inspection(output, Stats.from_json(found[1]), found[0], seconds, ())
    stats, entries = job.gathered()
    stages = tuple((stage.name, stage.num_tasks - len(job.missing(stage)), stage.num_tasks) for stage in job.stages)
    return Inspection(output, stats, entries, job.seconds(), stages)


def verify(inspection: Inspection) -> list[str]:
    """Files that are gone or not what was written, by their checksums."""
    bad = []
    for name, entry in inspection.entries.items():
        path = inspection.output / name
        if not path.exists():
            bad.append(f"{name} is gone")
        elif path.stat().st_size != entry.bytes or manifest.checksum(path) != entry.xxh3:
            bad.append(f"{name} is not what was written")
    return bad


def reasons(inspection: Inspection, wanted: str) -> list[str]:
    """The reasons that `wanted` names: itself, or all that begin with it and a dot. Errors: `ConfigError` if there are none."""
    there = [reason for _, reason, _ in inspection.stats.reasons()]
    found = [reason for reason in there if reason == wanted or reason.startswith(wanted + ".")]
    if not found:
        raise ConfigError(f"nothing was dropped for {wanted!r}; reasons: {', '.join(there) or 'none, all was kept'}")
    return found


def kept_samples(inspection: Inspection, num: int) -> list[Sample]:
    """Some kept documents, from files all over the output."""
    found: list[Sample] = []
    names = inspection.names("kept")
    for name, most in _spread(names, num):
        rows = _rows(inspection.output / name)
        found += [_sample(row) for row, _ in zip(rows, range(most), strict=False)]
    return found


def dropped_samples(inspection: Inspection, reason: str, num: int) -> list[Sample]:
    """Some documents that were dropped for one reason."""
    found: list[Sample] = []
    names = inspection.names("dropped")
    for name in dict.fromkeys([*(name for name, _ in _spread(names, num)), *names]):
        for row in _rows(inspection.output / name):
            if row["reason"] == reason:
                found.append(_sample(row))
                if len(found) % max(-(-num // max(len(names), 1)), 1) == 0:
                    break
        if len(found) >= num:
            break
    return found[:num]


def all_samples(inspection: Inspection, num: int) -> Iterator[tuple[str, list[Sample]]]:
    """Kept documents, then those dropped for each reason, with a title."""
    if num and inspection.stats.kept.documents:
        yield "kept", kept_samples(inspection, num)
    for step, reason, group in inspection.stats.reasons():
        if num:
            yield f"dropped by {step.name}: {reason} ({group.documents:,})", dropped_samples(inspection, reason, num)


def _spread(names: Sequence[str], num: int) -> list[tuple[str, int]]:
    """Which files to take samples from, and how many from each."""
    if not names or num < 1:
        return []
    if len(names) >= num:
        return [(names[i * len(names) // num], 1) for i in range(num)]
    return [(name, num // len(names) + (i < num % len(names))) for i, name in enumerate(names)]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=16):
                yield from batch.to_pylist()
    elif ".jsonl" in path.suffixes:
        for record in records(files.contents(str(path), Reading()), NEWLINE, LONGEST_LINE_BYTES):
            yield orjson.loads(record.data)


def _sample(row: dict[str, Any]) -> Sample:
    text = row["text"]
    return Sample(row["id"], row["source"], text[:EXCERPT_CHARS], len(text), row.get("reason", ""), row.get("detail", ""))


def to_json(inspection: Inspection) -> dict[str, Any]:
    """Everything but the samples, as plain values."""
    return {
        "output": str(inspection.output),
        "finished": not inspection.stages,
        "stages": [{"name": name, "done": done, "tasks": tasks} for name, done, tasks in inspection.stages],
        "files": {name: {"rows": entry.rows, "bytes": entry.bytes, "xxh3": entry.xxh3} for name, entry in inspection.entries.items()},
        **inspection.stats.to_json(),
        "seconds": dict(inspection.seconds),
    }


def tables(inspection: Inspection) -> str:
    """All figures as text for a terminal."""
    stats = inspection.stats
    parts = [_head(inspection), _step_table(inspection)]
    if found := stats.reasons():
        total = max(stats.steps[0].taken.documents, 1)
        rows = [[reason, step.name, f"{g.documents:,}", f"{g.documents / total:.2%}", f"{g.chars:,}"] for step, reason, g in found]
        parts.append(table(["dropped for", "by", "documents", "of all", "characters"], rows))
    for title, groups in (("language", stats.languages), ("source", stats.sources)):
        if len(groups) > 1 or (groups and title == "language"):
            rows = [[name, f"{g.documents:,}", f"{share(g, stats.kept):.1%}", f"{g.chars:,}"] for name, g in largest(groups, 15)]
            parts.append(table([f"{title} of kept", "documents", "of kept", "characters"], rows))
    for title, counts in (("counted", stats.counts), ("no documents", stats.skipped)):
        if counts:
            parts.append(table([title, "times"], [[name, f"{number:,}"] for name, number in sorted(counts.items())]))
    for step, report in stats.reports.items():
        figures = [[name, *map(figure, row.values())] for name, row in report.items()]
        parts.append(table([step, *figure_names(report)], figures))
    parts.append(_length_table(stats.taken_lengths, stats.kept_lengths))
    return "\n\n".join(part for part in parts if part)


def figure_names(report: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What the figures of a step's report are called."""
    return [name.replace("_", " ") for name in next(iter(report.values()))]


def figure(value: float) -> str:
    """One of them."""
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def _head(inspection: Inspection) -> str:
    kept, entries = inspection.stats.kept, inspection.entries
    num_bytes = sum(entries[name].bytes for name in inspection.names("kept"))
    tokens = inspection.stats.tokens
    budget = f", {tokens:,} tokens" if tokens is not None else ""
    lines = [f"{inspection.output}: {kept.documents:,} documents kept, {kept.chars:,} characters{budget}, {size(num_bytes)} in files"]
    if inspection.stages:
        lines.append("not finished: " + ", ".join(f"{name} {done}/{tasks}" for name, done, tasks in inspection.stages))
    return "\n".join(lines)


def _step_table(inspection: Inspection) -> str:
    rows = []
    for step in inspection.steps:
        taken, spent = step.taken, inspection.seconds.get(step.name, 0.0)
        rate = f"{taken.chars / spent / 1e6:,.1f}" if spent > 0.05 else ""
        dropped = f"{step.num_dropped / max(taken.documents, 1):.1%}" if step.num_dropped else ""
        rows.append([step.name, f"{taken.documents:,}", f"{step.num_dropped:,}", dropped, f"{step.num_kept:,}", f"{spent:,.1f}", rate])
    if READING in inspection.seconds and inspection.steps[-1].name != WRITING:
        rows.append([WRITING, f"{inspection.stats.kept.documents:,}", "", "", "", f"{inspection.seconds.get(WRITING, 0.0):,.1f}", ""])
    return table(["step", "documents in", "dropped", "", "kept", "CPU s", "Mchar/s"], rows)


def _length_table(taken: Lengths, kept: Lengths) -> str:
    buckets = sorted(taken.buckets.keys() | kept.buckets.keys())
    if not buckets:
        return ""
    most = max(*taken.buckets.values(), *kept.buckets.values(), 1)
    rows = []
    for bucket in range(buckets[0], buckets[-1] + 1):
        read, stayed = taken.buckets[bucket], kept.buckets[bucket]
        rows.append([lengths_of(bucket), f"{read:,}", f"{stayed:,}", _bar(read, stayed, most, 40)])
    return table(["characters", "read", "kept", "= kept  - read"], rows, left=(3,))


def _bar(read: int, kept: int, most: int, width: int) -> str:
    wide, full = round(read / most * width), round(kept / most * width)
    return "=" * full + "-" * max(wide - full, 0)


def lengths_of(bucket: int) -> str:
    """The lengths that a bucket of `Lengths` stands for."""
    if bucket <= 1:
        return str(bucket)
    return f"{_short(2 ** (bucket - 1))}..{_short(2**bucket)}"


def _short(number: int) -> str:
    return f"{number}" if number < 1024 else f"{number // 1024}k" if number < 2**20 else f"{number // 2**20}M"


def largest(groups: Mapping[str, Group], num: int) -> list[tuple[str, Group]]:
    """The largest groups by characters; what is left is one more."""
    ordered = sorted(groups.items(), key=lambda item: (-item[1].chars, item[0]))
    rest = ordered[num:]
    if rest:
        ordered = [*ordered[:num], (f"({len(rest)} more)", Group(sum(g.documents for _, g in rest), sum(g.chars for _, g in rest)))]
    return ordered


def share(part: Group, whole: Group) -> float:
    """Part of all documents."""
    return part.documents / max(whole.documents, 1)


def size(num_bytes: float) -> str:
    """Bytes for people, in powers of 1000."""
    units = iter(("bytes", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while num_bytes >= 1000 and unit != "TB":
        num_bytes, unit = num_bytes / 1000, next(units)
    return f"{num_bytes:,.{0 if unit == 'bytes' else 1}f} {unit}"


def show(title: str, samples: Sequence[Sample]) -> str:
    """Samples as text for a terminal."""
    lines = [title]
    for sample in samples:
        head = f"{sample.id}  ({sample.num_chars:,} characters{', ' + sample.source if sample.source else ''})"
        lines += ["", "  " + clip(head, COLUMNS)]
        if sample.detail:
            lines.append("  -> " + clip(sample.detail, COLUMNS))
        excerpt = " ".join(sample.text.split())
        lines += ["     " + line for line in wrap(excerpt, COLUMNS - 5, 3)]
    return "\n".join(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """Columns of text: the first and those in `left` flush left, the others flush right."""
    flush_left = {0, *left, *((1,) if head[1:2] == ["by"] else ())}
    widths = [max(columns(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = []
    for row in (head, ["-" * width for width in widths], *rows):
        cells = []
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            blank = " " * (width - columns(cell))
            cells.append(cell + blank if i in flush_left else blank + cell)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def columns(text: str) -> int:
    """How wide a terminal shows a text: Chinese characters take two columns, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def wrap(text: str, width: int, most_lines: int) -> list[str]:
    """A text in at most so many lines of at most so many columns, broken anywhere; control characters are shown as a dot."""
    lines, line, used = [], "", 0
    for char in text:
        char = char if char.isprintable() else "·"
        wide = columns(char)
        if used + wide > width:
            lines.append(line)
            line, used = "", 0
            if len(lines) == most_lines:
                return [*lines[:-1], lines[-1][:-3] + "..."]
        line, used = line + char, used + wide
    return [*lines, line] if line else lines


def clip(text: str, width: int) -> str:
    """The beginning of a text, in one line."""
    return (wrap(" ".join(text.split()), width, 1) or [""])[0]
