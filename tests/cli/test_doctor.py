"""The doctor's report: complete here, and plain about what is missing."""

from __future__ import annotations

import json
from importlib import metadata

import pytest

from gemel.cli import doctor
from gemel.cli import main as cli


def test_report_has_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)["findings"]
    assert list(dict.fromkeys(finding["section"] for finding in found)) == ["hardware", "libraries", "fast paths", "models"]
    assert status == int(any(finding["state"] == "broken" for finding in found))
    assert {"dtype", "threads", "native bf16", "prepacked linear"} <= {finding["name"] for finding in found}


def test_what_is_off_or_broken_comes_with_advice() -> None:
    for finding in (*doctor.libraries(), *doctor.fast_paths(), *doctor.models()):
        assert finding.state not in ("off", "broken") or finding.advice or finding.name == "vector code"


def test_missing_and_old_libraries_break(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=999", "no-such-thing>=1", "pytest>=9; extra == 'dev'"])
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "! torch" in printed
    assert "-m pip install 'torch>=999'" in printed
    assert "! no-such-thing" in printed
    assert "pytest" not in printed
    assert "fast paths" not in printed  # asking for them would import what is missing


def test_table_groups_and_aligns() -> None:
    found = [
        doctor.Finding("a", "x", "on", "good"),
        doctor.Finding("a", "longer", "off", "bad", "mend it"),
        doctor.Finding("b", "y", "fact", "1"),
    ]
    assert doctor.table(found).splitlines() == [
        "a",
        "+ x       good",
        "- longer  bad",
        "          -> mend it",
        "",
        "b",
        "  y       1",
    ]
