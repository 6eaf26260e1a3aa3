"""The doctor's report: complete here, and plain about what is missing."""

from __future__ import annotations

import json
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from gemel.cli import doctor
from gemel.cli import main as cli
from gemel.ops import hardware, triton
from gemel.ops.cpu import native


def test_report_has_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)["findings"]
    assert list(dict.fromkeys(finding["section"] for finding in found)) == ["hardware", "libraries", "fast paths", "models"]
    assert status == int(any(finding["state"] == "broken" for finding in found))
    assert {"dtype", "threads", "CPU kernels", "native step", "native bf16", "prepacked linear"} <= {finding["name"] for finding in found}


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


def kernels(monkeypatch: pytest.MonkeyPatch, found: tuple[object | None, str], isa: tuple[str, ...] = ()) -> list[doctor.Finding]:
    monkeypatch.setattr(native, "find", lambda: found)
    monkeypatch.setattr(hardware, "isa", lambda: isa)
    return list(doctor.kernels())


def test_the_best_kernels_are_told_with_what_better_ones_need(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = kernels(monkeypatch, (object(), "avx2"), ("avx2", "fma", "f16c", "avx512f"))
    assert (finding.state, finding.value) == ("on", "avx2; avx512 needs avx512_bf16, avx512_vnni")


def test_kernels_that_were_not_compiled_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    best, second = kernels(monkeypatch, (object(), "avx2"), ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni"))
    assert (best.state, best.value) == ("on", "avx2")
    assert (second.name, second.state) == ("avx512 kernels", "off") and "reinstall" in str(second.advice)


@pytest.mark.parametrize(("compiler", "says"), [("/usr/bin/c++", "/usr/bin/c++ is here"), (None, "there is no c++ on the PATH")])
def test_without_kernels_the_compiler_is_looked_for(monkeypatch: pytest.MonkeyPatch, compiler: str | None, says: str) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: compiler)
    (finding,) = kernels(monkeypatch, (None, "they were not compiled: install a C++ compiler"))
    assert (finding.state, finding.value) == ("off", "they were not compiled")
    assert str(finding.advice).startswith("install a C++ compiler") and says in str(finding.advice)


@pytest.mark.parametrize(
    ("known", "why_not", "state", "says"),
    [
        (True, None, "on", "one call per step"),
        (True, "width is odd", "off", "width is odd"),
        (False, None, "off", "before there is a model"),
    ],
)
def test_the_default_models_step(known: bool, why_not: str | None, state: str, says: str) -> None:
    finding = doctor._native_step(known, why_not)
    assert finding.state == state and says in finding.value
    assert finding.state == "on" or finding.advice


@pytest.mark.parametrize(
    ("why_not", "state", "says"),
    [(None, "on", "Triton for"), (triton.MISSING, "off", "not installed"), ("compute capability 7.5", "off", "capability 7.5")],
)
def test_what_a_gpu_trains_with(monkeypatch: pytest.MonkeyPatch, why_not: str | None, state: str, says: str) -> None:
    card = SimpleNamespace(name="a card", total_memory=2**34, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(triton, "why_not", lambda device: why_not)
    _, finding = doctor._cuda()
    assert (finding.name, finding.state) == ("cuda:0 kernels", state) and says in finding.value
    assert ("pip install triton" in str(finding.advice)) == (why_not == triton.MISSING)
