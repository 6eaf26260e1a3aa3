"""What tests of runs share: a corpus, a recipe over it, a run in this process, and a folder as one value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemel.config.data.pipeline import Recipe
from gemel.data.pipeline import Job
from gemel.data.stats import Stats

WORDS = ("alpha", "beta", "gamma", "delta", "文档", "数据", "清洗")


def corpus(folder: Path, num: int = 200) -> Path:
    """JSON lines of growing length; every tenth begins as one before it, and some lines are broken."""
    lines: list[bytes] = []
    for i in range(num):
        start = f"{i - 7 if i % 10 == 9 else i:05d} "
        text = start + " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 3 + i % 40))
        lines.append(json.dumps({"text": text, "id": f"doc-{i}", "n": i}, ensure_ascii=i % 2 == 0).encode())
    lines[3] = b'{"id": "no text"}'
    lines[5] = b'{"text": "cut off'
    lines[8] = b'{"text": "not utf-8: \xff"}'
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder / "corpus.jsonl"


def recipe(path: Path, steps: list[dict[str, Any]] | None = None, **tables: Any) -> Recipe:
    """Over JSON lines, in units of two kilobytes."""
    made: dict[str, Any] = {
        "input": {"kind": "jsonl", "paths": [str(path)], "unit_bytes": 2048},
        "step": steps if steps is not None else [{"kind": "length", "min_chars": 40}],
        "output": {"kind": "jsonl"},
    }
    return Recipe.parse({**made, **tables})


def first_of_each(num_chars: int = 5) -> dict[str, Any]:
    """A step that needs the whole corpus."""
    return {"kind": "custom", "target": "tests.data.custom_steps:FirstOfEach", "arguments": {"num_chars": num_chars}}


def custom(name: str, **arguments: Any) -> dict[str, Any]:
    """Another step of `custom_steps`."""
    return {"kind": "custom", "target": f"tests.data.custom_steps:{name}", "arguments": arguments}


def do(what: Recipe, output: Path) -> Stats:
    """All tasks that are missing, here and one after the other."""
    job = Job.begin(what, output)
    for stage in job.stages:
        for index in job.missing(stage):
            job.perform(stage, index, lambda part: None)
    return job.finish()


def contents(output: Path) -> dict[str, bytes]:
    """Every file, but the times."""
    files = (path for path in sorted(output.rglob("*")) if path.is_file() and path.name != "timing.json")
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def kept(output: Path) -> list[dict[str, Any]]:
    """The rows of the output, in order."""
    return rows(output, "kept")


def rows(output: Path, folder: str) -> list[dict[str, Any]]:
    """The rows of all files of a folder, in the order of the units."""
    from gemel.data.inspect import _rows

    return [row for path in sorted((output / folder).glob("*")) for row in _rows(path)]
