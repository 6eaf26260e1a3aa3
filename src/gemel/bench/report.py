"""Measured and planned figures side by side: a table for people, one JSON object for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure over all repeats, and what the plan said. `planned` None: there is no plan for it."""

    median: float
    low: float
    high: float
    planned: float | None

    @property
    def ratio(self) -> float | None:
        """Measured over planned; None where the plan says zero or nothing."""
        return self.median / self.planned if self.planned else None

    def as_json(self) -> dict[str, float | None]:
        """Plain data, the ratio included."""
        return {"median": self.median, "min": self.low, "max": self.high, "planned": self.planned, "ratio": self.ratio}


def join(repeats: Sequence[Mapping[str, float]], planned: Mapping[str, float]) -> dict[str, Figure]:
    """Median, minimum and maximum of each figure over `repeats`, beside its plan."""
    return {
        name: Figure(median(values), min(values), max(values), planned.get(name))
        for name in repeats[0]
        for values in [[repeat[name] for repeat in repeats]]
    }


def table(figures: Mapping[str, Figure]) -> str:
    """A table in plain text: figure, measured (min-max), planned, measured / planned."""
    return aligned(
        [("figure", "measured", "min - max", "planned", "measured/planned"), *(_row(name, figure) for name, figure in figures.items())]
    )


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length under each other, the first of them the head; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for label, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *aligned]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _row(name: str, figure: Figure) -> tuple[str, str, str, str, str]:
    label, scale = _unit(name)
    middle, low, high = (_number(value * scale) for value in (figure.median, figure.low, figure.high))
    planned = "-" if figure.planned is None else _number(figure.planned * scale)
    ratio = "-" if figure.ratio is None else f"{figure.ratio:.2f}"
    return label, middle, f"{low} - {high}", planned, ratio


def _unit(name: str) -> tuple[str, float]:
    """A person's label for a figure's name, and what to multiply it with: seconds are shown in ms, bytes in MB."""
    if name.endswith("_per_s"):
        return name.removesuffix("_per_s").replace("_", " ") + "/s", 1.0
    if name.endswith("_s"):
        return name.removesuffix("_s").replace("_", " ") + ", ms", 1e3
    if name.endswith("_bytes"):
        return name.removesuffix("_bytes").replace("_", " ") + ", MB", 1e-6
    return name.replace("_", " "), 1.0


def _number(value: float) -> str:
    """Three significant digits, and no exponent."""
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
