"""The page of a run: its figures as plots, its samples to read. One file that loads nothing, so it can be mailed and kept.

Plots are drawn here, as SVG: bars and histograms need no library, and a page that must fetch one cannot be opened on a cluster.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from gemel.data.inspect import Inspection, Sample, all_samples, figure, figure_names, largest, lengths_of, share, size
from gemel.data.stats import Group, Lengths, StepStats

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #667079; --line: #d9dee3; --paper: #fff; --panel: #f6f8fa;
  --kept: #2f7d5b; --read: #b9c6d2; --dropped: #c8553d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #98a2ab; --line: #353c44; --paper: #15191d; --panel: #1d2329;
  --kept: #57b48a; --read: #4a5662; --dropped: #e0785f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 2.5rem 0 .5rem; }
p.note { color: var(--soft); margin: .2rem 0 1rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; }
.tile { background: var(--panel); border-radius: 8px; padding: .6rem 1rem; min-width: 9rem; flex: 1; }
.tile b { display: block; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; } .tile span { color: var(--soft); }
svg { width: 100%; height: auto; display: block; } svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg text.soft { fill: var(--soft); } svg text.end { text-anchor: end; } svg text.mid { text-anchor: middle; }
svg .kept { fill: var(--kept); } svg .read { fill: var(--read); } svg .dropped { fill: var(--dropped); } svg line { stroke: var(--line); }
.key { color: var(--soft); } .key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .35em 0 1em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } th { color: var(--soft); font-weight: 500; }
th, td { text-align: right; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
details { border: 1px solid var(--line); border-radius: 8px; margin: .5rem 0; } summary { cursor: pointer; padding: .5rem .9rem; }
article { padding: .6rem .9rem; border-top: 1px solid var(--line); } article header { color: var(--soft); overflow-wrap: anywhere; }
article em { color: var(--dropped); font-style: normal; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0 0; font: 13px/1.5 ui-monospace, "Noto Sans Mono CJK SC", monospace; }
"""
WIDTH, LABEL, VALUE, ROW = 960, 190, 210, 26  # of a bar plot, in SVG units: all, names on the left, figures on the right, one row


def page(inspection: Inspection, num_samples: int) -> str:
    """The whole page as HTML."""
    stats = inspection.stats
    title = f"{inspection.output}: {stats.kept.documents:,} documents"
    state = "Not finished: " + ", ".join(f"{name} {done}/{tasks}" for name, done, tasks in inspection.stages) if inspection.stages else ""
    parts = [
        f"<h1>{escape(str(inspection.output))}</h1>",
        f'<p class="note">{escape(state)}</p>' if state else "",
        _tiles(inspection),
        _section("What each step kept", "Documents, from the first step down.", _flow(inspection.steps), _key(("kept", "dropped"))),
        _section("Why documents were dropped", "One bar per reason.", _reasons(inspection)),
        _section("Length", "Documents by characters.", _histogram(stats.taken_lengths, stats.kept_lengths), _key(("read", "kept"))),
        _section("Languages of what was kept", "Characters.", _groups(largest(stats.languages, 20), stats.kept)),
        _section("Sources of what was kept", "Characters.", _groups(largest(stats.sources, 20), stats.kept)),
        *(_section(f"What {escape(step)} says", "", _report(report)) for step, report in stats.reports.items()),
        _section("Counted without dropping", "", _counts({**stats.counts, **stats.skipped})),
        _section("Where the time went", "CPU seconds of all workers.", _seconds(inspection)),
        "<h2>Samples</h2>",
        *(_samples(name, samples, i == 0) for i, (name, samples) in enumerate(all_samples(inspection, num_samples))),
    ]
    body = "\n".join(part for part in parts if part)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return f'<!doctype html>\n<html lang="en">\n<head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n'


def _section(title: str, note: str, plot: str, key: str = "") -> str:
    """A plot with its heading; nothing if there is no plot."""
    return f'<h2>{title}</h2>\n<p class="note">{note}{key}</p>\n{plot}' if plot else ""


def _key(names: Sequence[str]) -> str:
    return '<span class="key">' + "".join(f'<i style="background: var(--{name})"></i>{name}' for name in names) + "</span>"


def _tiles(inspection: Inspection) -> str:
    stats = inspection.stats
    read = stats.steps[0].taken
    num_bytes = sum(inspection.entries[name].bytes for name in inspection.names("kept"))
    tiles = [
        (f"{read.documents:,}", "documents read"),
        (f"{stats.kept.documents:,}", f"kept, {share(stats.kept, read):.1%}"),
        (f"{stats.kept.chars:,}", "characters kept"),
        *([(f"{stats.tokens:,}", "tokens")] if stats.tokens is not None else []),
        (size(num_bytes), f"in {len(inspection.names('kept')):,} files"),
    ]
    return '<div class="tiles">' + "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for value, name in tiles) + "</div>"


def _svg(height: float, shapes: Iterable[str], title: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">{"".join(shapes)}</svg>'


def _bars(rows: Sequence[tuple[str, Sequence[tuple[str, float]], str]], title: str) -> str:
    """Horizontal bars: a name, parts as (colour, amount), and figures. The longest bar fills the width."""
    most = max((sum(amount for _, amount in parts) for _, parts, _ in rows), default=0.0)
    if not most:
        return ""
    room = WIDTH - LABEL - VALUE
    shapes = []
    for i, (name, parts, figures) in enumerate(rows):
        y, x = i * ROW, float(LABEL)
        shown = name if len(name) <= 28 else name[:27] + "…"
        shapes.append(f'<text class="end" x="{LABEL - 10}" y="{y + 17}">{escape(shown)}<title>{escape(name)}</title></text>')
        for colour, amount in parts:
            width = amount / most * room
            if amount:
                shapes.append(f'<rect class="{colour}" x="{x:.1f}" y="{y + 4}" width="{max(width, 1):.1f}" height="{ROW - 8}" rx="2"/>')
            x += width
        shapes.append(f'<text class="soft" x="{x + 8:.1f}" y="{y + 17}">{escape(figures)}</text>')
    return _svg(len(rows) * ROW, shapes, title)


def _flow(steps: Sequence[StepStats]) -> str:
    rows = []
    for step in steps:
        lost = f", {step.num_dropped:,} dropped" if step.num_dropped else ""
        parts = (("kept", float(step.num_kept)), ("dropped", float(step.num_dropped)))
        rows.append((step.name, parts, f"{step.num_kept:,} kept{lost}"))
    return _bars(rows, "documents kept and dropped by each step")


def _reasons(inspection: Inspection) -> str:
    read = inspection.stats.steps[0].taken
    rows = [
        (reason, (("dropped", float(group.documents)),), f"{group.documents:,} ({share(group, read):.2%})")
        for _, reason, group in inspection.stats.reasons()
    ]
    return _bars(rows, "documents dropped by reason")


def _groups(groups: Sequence[tuple[str, Group]], whole: Group) -> str:
    rows = [(name, (("kept", float(g.chars)),), f"{g.documents:,} documents, {g.chars / max(whole.chars, 1):.1%}") for name, g in groups]
    return _bars(rows, "characters kept by group")


def _seconds(inspection: Inspection) -> str:
    order = [step.name for step in inspection.stats.steps]
    spent = sorted(inspection.seconds.items(), key=lambda item: order.index(item[0]))
    return _bars([(name, (("read", seconds),), f"{seconds:,.1f} s") for name, seconds in spent], "seconds by step")


def _histogram(taken: Lengths, kept: Lengths) -> str:
    """Columns of powers of two, what was kept in front of what was read."""
    there = taken.buckets.keys() | kept.buckets.keys()
    if not there:
        return ""
    buckets = range(min(there), max(there) + 1)
    most = max(*taken.buckets.values(), *kept.buckets.values())
    height, floor, step = 240, 200, (WIDTH - 60) / len(buckets)
    shapes = [f'<line x1="50" x2="{WIDTH - 10}" y1="{floor}" y2="{floor}"/>']
    for part in (0.5, 1.0):
        y = floor - part * (floor - 20)
        shapes.append(f'<line x1="50" x2="{WIDTH - 10}" y1="{y:g}" y2="{y:g}"/>')
        shapes.append(f'<text class="soft end" x="44" y="{y + 4:g}">{most * part:,.0f}</text>')
    for i, bucket in enumerate(buckets):
        x = 50 + i * step
        for colour, lengths in (("read", taken), ("kept", kept)):
            number = lengths.buckets[bucket]
            tall = number / most * (floor - 20)
            if number:
                hint = f"<title>{lengths_of(bucket)} characters: {number:,} {colour}</title>"
                box = f'x="{x + step * 0.1:.1f}" y="{floor - max(tall, 1):.1f}" width="{step * 0.8:.1f}" height="{max(tall, 1):.1f}"'
                shapes.append(f'<rect class="{colour}" {box} rx="2">{hint}</rect>')
        if len(buckets) <= 14 or i % 2 == 0:
            shapes.append(f'<text class="soft mid" x="{x + step / 2:.1f}" y="{floor + 18}">{lengths_of(bucket).split("..")[0]}</text>')
    shapes.append(f'<text class="soft end" x="{WIDTH - 10}" y="{height - 4}">characters, from</text>')
    return _svg(height, shapes, "documents by length")


def _counts(counts: dict[str, int]) -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{number:,}</td></tr>" for name, number in sorted(counts.items()))
    return f"<table><tr><th>what</th><th>times</th></tr>{rows}</table>" if rows else ""


def _report(report: Mapping[str, Mapping[str, float]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *figure_names(report)))
    rows = ("".join(f"<td>{escape(cell)}</td>" for cell in (name, *map(figure, row.values()))) for name, row in report.items())
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _samples(title: str, samples: Sequence[Sample], unfolded: bool) -> str:
    articles = "".join(_article(sample) for sample in samples)
    return f"<details{' open' if unfolded else ''}><summary>{escape(title)}</summary>{articles}</details>"


def _article(sample: Sample) -> str:
    detail = f" <em>{escape(sample.detail)}</em>" if sample.detail else ""
    more = "…" if sample.num_chars > len(sample.text) else ""
    head = f"{escape(sample.id)} · {sample.num_chars:,} characters · {escape(sample.source)}{detail}"
    return f"<article><header>{head}</header><pre>{escape(sample.text)}{more}</pre></article>"
