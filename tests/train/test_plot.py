"""Curves: what is drawn is where the numbers are."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from gemel.train.plot import smooth, svg, terminal, ticks


def test_running_means_by_hand() -> None:
    assert smooth([(0, 2.0), (1, 4.0), (2, 9.0), (3, 2.0)], 3) == [(0, 2.0), (1, 3.0), (2, 5.0), (3, 5.0)]
    assert smooth([(0, 2.0), (1, 4.0)], 1) == [(0, 2.0), (1, 4.0)]


def test_a_falling_line_falls() -> None:
    """One curve: dots from the upper left corner to the lower right one, none elsewhere."""
    lines = terminal({"a": [(x, -x) for x in range(100)]}, "title", width=20, height=10).splitlines()
    rows = [line.split("|", 1)[1] for line in lines[1:11]]
    assert lines[0] == "title" and [len(row) for row in rows] == [20] * 10
    for number, row in enumerate(rows):
        columns = {i // 2 for i, mark in enumerate(row) if mark != " "}
        assert number in columns <= {number, number + 1}  # joined to the next
    assert lines[1].startswith("  0 |") and lines[10].startswith("-99 |") and lines[12].split() == ["0", "99"]


def test_several_curves_have_letters() -> None:
    text = terminal({"up": [(0, 0.0), (9, 9.0)], "down": [(0, 9.0), (9, math.nan), (9, 0.0)]}, "two", width=10, height=4)
    lines = text.splitlines()
    assert lines[1].endswith("|b        a") and lines[4].endswith("|a        b") and lines[-2:] == ["a up", "b down"]


@pytest.mark.parametrize("curves", [{}, {"a": []}, {"a": [(0, math.nan)]}])
def test_nothing_to_draw(curves: dict[str, list[tuple[float, float]]]) -> None:
    assert terminal(curves, "loss") == "loss: nothing to show yet"
    assert ElementTree.fromstring(svg(curves, "t", "x", "y")).tag.endswith("svg")


def test_svg_is_whole_and_its_points_are_in_the_frame() -> None:
    document = svg({"a<b": [(0, 5.0), (10, 1.0), (20, math.inf)], "c": [(0, 3.0), (20, 2.0)]}, "R&D", "step", "loss")
    root = ElementTree.fromstring(document)
    lines = [element for element in root if element.tag.endswith("polyline")]
    points = [[tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()] for line in lines]
    assert points[0] == [(70.0, 40.0), (425.0, 400.0)]  # highest, half way and lowest
    assert all(70 <= x <= 780 and 40 <= y <= 400 for line in points for x, y in line)
    assert {"a<b", "c", "R&D", "step", "loss"} <= {element.text for element in root}


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 250), (1.9, 6.05), (-3e-5, 4e-4), (7, 7)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert all(low <= tick <= high for tick in found) and (len(found) >= 3 or low == high)
    assert all(re.fullmatch(r"-?\d(\.\d)?e[+-]\d+|0.0e\+00", f"{b - a:.1e}") for a, b in pairwise(found))
    assert len({f"{b - a:.6g}" for a, b in pairwise(found)}) <= 1
