"""What people see of a run: the same figures in tables, as JSON and in the page; samples of what was dropped; damaged files by name."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gemel.config.errors import ConfigError
from gemel.data import inspect, report
from gemel.data.document import Document, Dropped
from gemel.data.inspect import Inspection
from gemel.data.pipeline import Job
from gemel.data.stats import Group, Lengths, Stats
from tests.data.runs import corpus, custom, do, first_of_each, recipe, rows

STEPS = [custom("Upper"), first_of_each(), {"kind": "length", "min_chars": 40}]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    folder = tmp_path_factory.mktemp("run")
    do(recipe(corpus(folder), STEPS), folder / "out")
    return inspect.look(folder / "out")


def test_tables_hold_the_figures_of_the_files(found: Inspection) -> None:
    text = inspect.tables(found)
    dropped = rows(found.output, "dropped")
    for reason in {row["reason"] for row in dropped}:
        num = sum(row["reason"] == reason for row in dropped)
        assert re.search(rf"^{reason} +\w+ +{num} +{num / 200:.2%} ", text, re.MULTILINE), text
    assert re.search(r"^FirstOfEach +197 +20 ", text, re.MULTILINE)
    assert re.search(r"^upper +\d+$", text, re.MULTILINE)
    kept = len(rows(found.output, "kept"))
    assert f": {kept} documents kept, " in text


def test_json_is_complete(found: Inspection) -> None:
    values = inspect.to_json(found)
    assert values["finished"] is True
    assert sum(number for number in values["taken_lengths"].values()) == 200
    assert sum(file["rows"] for name, file in values["files"].items() if name.startswith("kept/")) == values["kept"][0]
    assert Stats.from_json(values).to_json() == found.stats.to_json()


def test_samples_are_real_documents_spread_over_the_files(found: Inspection) -> None:
    texts = [row["text"] for row in rows(found.output, "kept")]
    samples = inspect.kept_samples(found, 5)
    places = [texts.index(sample.text) for sample in samples]
    assert len(samples) == 5
    assert places == sorted(places)
    assert places[-1] > len(texts) // 2
    assert len(inspect.kept_samples(found, 10_000)) == len(texts)
    every = inspect.dropped_samples(found, "length.short", 10_000)
    want = [row["id"] for row in rows(found.output, "dropped") if row["reason"] == "length.short"]
    assert sorted(sample.id for sample in every) == sorted(want)
    assert len(inspect.dropped_samples(found, "length.short", 3)) == 3
    assert inspect.kept_samples(found, 0) == []


def test_reasons_are_found_by_their_beginning_or_listed(found: Inspection) -> None:
    assert inspect.reasons(found, "length") == ["length.short"]
    assert len(inspect.reasons(found, "read")) == 3
    with pytest.raises(ConfigError, match=r"nothing was dropped for 'lengt'; reasons: read\.bad_json, "):
        inspect.reasons(found, "lengt")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    do(recipe(corpus(tmp_path)), tmp_path / "out")
    found = inspect.look(tmp_path / "out")
    assert inspect.verify(found) == []
    first, second = sorted((tmp_path / "out" / "kept").iterdir())[:2]
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    second.unlink()
    assert sorted(inspect.verify(found)) == [f"kept/{first.name} is not what was written", f"kept/{second.name} is gone"]


def test_a_run_that_is_not_finished_can_be_looked_at(tmp_path: Path) -> None:
    job = Job.begin(recipe(corpus(tmp_path), STEPS), tmp_path / "out")
    for index in (0, 1):
        job.perform(job.stages[0], index, lambda part: None)
    found = inspect.look(tmp_path / "out")
    text = inspect.tables(found)
    assert f"not finished: pass-0 2/{len(job.plan.units)}, resolve-0 0/4, conclude-0 0/1, pass-1 0/{len(job.plan.units)}" in text
    assert found.stats.steps[0].taken.documents > 10
    with pytest.raises(ConfigError, match="holds no run"):
        inspect.look(tmp_path)


class Outline(HTMLParser):
    """Checks that elements nest, and collects what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in {"meta"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_loads_nothing_and_shows_text_as_text(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "<script>alert(1)</script> & 中文", "id": "<b>"}\n{"text": "short"}\n')
    do(recipe(tmp_path / "in.jsonl", [{"kind": "length", "min_chars": 10}]), tmp_path / "out")
    text = report.page(inspect.look(tmp_path / "out"), 3)
    outline = Outline()
    outline.feed(text)
    assert outline.open == []
    assert outline.loads == []
    assert "url(" not in text
    assert "@import" not in text
    assert "<script" not in text
    assert "<script>alert(1)</script> & 中文" in outline.text
    assert "1 (50.00%)" in outline.text


def test_plots_are_to_scale(found: Inspection) -> None:
    drawn = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", report.page(found, 1), re.DOTALL)]
    by_name = {svg.get("aria-label"): svg for svg in drawn}
    bars = by_name["documents dropped by reason"].findall("rect")
    counts = [group.documents for _, _, group in found.stats.reasons()]
    widths = [float(bar.get("width", "")) for bar in bars]
    assert [round(width / max(widths) * max(counts)) for width in widths] == counts
    columns = by_name["documents by length"].findall("rect")
    assert len(columns) == len(found.stats.taken_lengths.buckets) + len(found.stats.kept_lengths.buckets)


def test_buckets_have_names() -> None:
    lengths = Lengths()
    for chars in (0, 1, 2, 3, 4, 1023, 1024, 2**20):
        lengths.add(chars)
    assert {inspect.lengths_of(bucket): number for bucket, number in sorted(lengths.buckets.items())} == {
        "0": 1,
        "1": 1,
        "2..4": 2,
        "4..8": 1,
        "512..1k": 1,
        "1k..2k": 1,
        "1M..2M": 1,
    }


def test_chinese_text_takes_two_columns() -> None:
    assert inspect.columns("ab中文") == 6
    assert inspect.wrap("中文中文a", 4, 9) == ["中文", "中文", "a"]
    assert inspect.clip("中" * 100, 11) == "中中..."
    lines = inspect.table(["language", "n"], [["中文", "1"], ["en", "22"]]).splitlines()
    assert [inspect.columns(line) for line in lines] == [12, 12, 12, 12]
    assert [inspect.size(number) for number in (0, 999, 1000, 1.5e12)] == ["0 bytes", "999 bytes", "1.0 kB", "1.5 TB"]


def test_many_sources_do_not_make_many_figures() -> None:
    stats = Stats.empty(["read", "write"])
    for i in range(1000):
        stats.keep(Document("text", str(i), f"source {i}", {"language": "zh" if i % 2 else {"code": "en"}}))
    assert len(stats.sources) == 201
    assert stats.languages == {"zh": Group(500, 2000), "en": Group(500, 2000)}
    assert stats.sources["(others)"] == Group(800, 3200)
    assert inspect.largest(stats.languages, 1) == [("en", Group(500, 2000)), ("(1 more)", Group(500, 2000))]


def test_figures_that_do_not_add_up_are_found() -> None:
    stats = Stats.empty(["read", "length", "write"])
    stats.take(0, 2, 8)
    stats.drop(0, Dropped(Document("text", "a", ""), "read.empty"))
    stats.take(1, 1, 4)
    stats.take(2, 1, 4)
    stats.keep(Document("text", "b", ""))
    stats.check()
    stats.take(1, 1, 4)
    with pytest.raises(AssertionError, match="read passed on 1, length took"):
        stats.check()
