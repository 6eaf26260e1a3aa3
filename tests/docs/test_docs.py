"""Documents that cannot go stale: links lead to files, generated pages are current, the changelog knows the version."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

import gemel

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)]+)\)")


@pytest.fixture(scope="module")
def generate_docs() -> ModuleType:
    loader = SourceFileLoader("generate_docs", str(ROOT / "scripts" / "generate_docs"))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name} links to {target}, which does not exist"


def test_path_of_a_request_visits_ten_stations_and_the_model() -> None:
    text = (ROOT / "docs" / "path_of_a_request.md").read_text()
    assert len(re.findall(r"^\d+\. ", text, re.MULTILINE)) == 10
    assert "../src/gemel/model/model.py" in LINK.findall(text)


def test_generated_pages_are_current() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / "generate_docs", "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_changelog_begins_with_the_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == gemel.__version__


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        (None, ""),
        ("One.", "One."),
        ("One two. Three.", "One two."),
        ("One\ntwo. Three", "One two."),
        ("Rotary positions (Su et al. 2021). On all of it.", "Rotary positions (Su et al. 2021)."),
        ("By Vaswani et al. and others. More.", "By Vaswani et al. and others."),
        ("No stop\n\nNext paragraph. End.", "No stop"),
        ("Version 1.5 is it. Yes.", "Version 1.5 is it."),
    ],
)
def test_first_sentence(generate_docs: ModuleType, docstring: str | None, sentence: str) -> None:
    assert generate_docs.first_sentence(docstring) == sentence


def test_map_sees_modules_and_arrows_wherever_the_import_stands(generate_docs: ModuleType, tmp_path: Path) -> None:
    for room, source in {"high": '"""High."""\n', "low": '"""Low."""\n'}.items():
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text(source)
    (tmp_path / "high" / "one.py").write_text('"""One thing. More."""\n\ndef f():\n    from gemel.low import x\n')
    modules = {module.name: module for module in generate_docs.read_modules(tmp_path)}
    assert set(modules) == {"high", "high.one", "low"}
    assert modules["high.one"] == generate_docs.Module("high.one", "high", 4, "One thing.", frozenset({"low"}))
