"""Curves of runs, in a terminal and as SVG: enough to see how a run goes, without a library.

A curve is points (x, y) under a name. Curves that are noisy are shown as running means; where there are more points than columns, a column
shows the mean of those in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

Point = tuple[float, float]
Curves = Mapping[str, Sequence[Point]]

COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
MARKS = "abcdefghijklmnopqrstuvwxyz"
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a Braille character, by row and column


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Running means over the last `window` points; of fewer at the beginning."""
    means, total = [], 0.0
    for number, (x, y) in enumerate(points):
        total += y - (points[number - window][1] if number >= window else 0.0)
        means.append((x, total / min(number + 1, window)))
    return means


def terminal(curves: Curves, title: str, width: int = 72, height: int = 16) -> str:
    """Lines of text: a frame with Braille dots for one curve, with a letter per curve for several."""
    bounds = _bounds(curves)
    if bounds is None:
        return f"{title}: nothing to show yet"
    left, right, low, high = bounds
    cells = [[" "] * width for _ in range(height)]
    if len(curves) == 1:
        _dots(cells, next(iter(curves.values())), bounds)
    else:
        for mark, points in zip(_marks(len(curves)), curves.values(), strict=True):
            for x, y in _means(points, left, right, width):
                row = height - 1 - _place(y, low, high, height)
                cells[row][_place(x, left, right, width)] = mark
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
    margin = max(map(len, labels))
    lines = [f"{label:>{margin}} |{''.join(row)}" for label, row in zip(labels, cells, strict=True)]
    foot = f"{left:g}".ljust(width - len(f"{right:g}")) + f"{right:g}"
    legend = [] if len(curves) == 1 else [f"{mark} {name}" for mark, name in zip(_marks(len(curves)), curves, strict=True)]
    return "\n".join([title, *lines, " " * margin + " +" + "-" * width, " " * (margin + 2) + foot, *legend])


def _marks(count: int) -> list[str]:
    return [MARKS[i % len(MARKS)] for i in range(count)]


def _dots(cells: list[list[str]], points: Sequence[Point], bounds: tuple[float, float, float, float]) -> None:
    """Two by four dots to a character, joined from column to column."""
    left, right, low, high = bounds
    columns, rows = 2 * len(cells[0]), 4 * len(cells)
    bits = [[0] * len(cells[0]) for _ in cells]
    places = [(_place(x, left, right, columns), rows - 1 - _place(y, low, high, rows)) for x, y in _means(points, left, right, columns)]
    for (column, row), (_, before) in zip(places, [places[0], *places[:-1]], strict=True):
        for dot in range(min(row, before), max(row, before) + 1) if column else [row]:
            bits[dot // 4][column // 2] |= _DOTS[dot % 4][column % 2]
    for line, found in zip(cells, bits, strict=True):
        line[:] = [chr(0x2800 + bit) if bit else " " for bit in found]


def _means(points: Sequence[Point], left: float, right: float, columns: int) -> list[Point]:
    """One point per column that has any."""
    by_column: dict[int, list[Point]] = {}
    for x, y in points:
        if math.isfinite(y):
            by_column.setdefault(_place(x, left, right, columns), []).append((x, y))
    return [(sum(x for x, _ in found) / len(found), sum(y for _, y in found) / len(found)) for found in by_column.values()]


def _bounds(curves: Curves) -> tuple[float, float, float, float] | None:
    """Left, right, low, high."""
    points = [point for found in curves.values() for point in found if math.isfinite(point[1])]
    if not points:
        return None
    xs, ys = zip(*points, strict=True)
    return min(xs), max(xs), min(ys), max(ys)


def _place(value: float, low: float, high: float, count: int) -> int:
    """Which of `count` equal parts of low to high a value is in."""
    return 0 if high == low else min(int((value - low) / (high - low) * count), count - 1)


def svg(curves: Curves, title: str, x_label: str, y_label: str, width: int = 800, height: int = 450) -> str:
    """A whole SVG document."""
    left, right, low, high = _bounds(curves) or (0.0, 1.0, 0.0, 1.0)
    box = (70, 40, width - 20, height - 50)  # left, top, right, bottom of the frame

    def x_of(x: float) -> float:
        return box[0] + (x - left) / ((right - left) or 1) * (box[2] - box[0])

    def y_of(y: float) -> float:
        return box[3] - (y - low) / ((high - low) or 1) * (box[3] - box[1])

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{width / 2}" y="22" text-anchor="middle" font-size="15">{escape(title)}</text>',
        f'<text x="{(box[0] + box[2]) / 2}" y="{height - 12}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text x="16" y="{(box[1] + box[3]) / 2}" text-anchor="middle" transform="rotate(-90 16 {(box[1] + box[3]) / 2})">'
        f"{escape(y_label)}</text>",
    ]
    for tick in ticks(left, right):
        parts.append(f'<line x1="{x_of(tick):.1f}" x2="{x_of(tick):.1f}" y1="{box[1]}" y2="{box[3]}" stroke="#eee"/>')
        parts.append(f'<text x="{x_of(tick):.1f}" y="{box[3] + 16}" text-anchor="middle">{tick:g}</text>')
    for tick in ticks(low, high):
        parts.append(f'<line x1="{box[0]}" x2="{box[2]}" y1="{y_of(tick):.1f}" y2="{y_of(tick):.1f}" stroke="#eee"/>')
        parts.append(f'<text x="{box[0] - 6}" y="{y_of(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for number, (name, points) in enumerate(curves.items()):
        color = COLORS[number % len(COLORS)]
        line = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points if math.isfinite(y))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        parts.append(f'<text x="{box[2] - 6}" y="{box[1] + 16 + 16 * number}" text-anchor="end" fill="{color}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers from low to high."""
    if high <= low:
        return [low]
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    found = [number * step for number in range(first, last + 1)]
    assert all(a < b for a, b in pairwise(found))
    return [float(f"{tick:.12g}") for tick in found]
