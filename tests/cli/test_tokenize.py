"""`gemel tokenize`: the shards that `gemel data` would have written, by a shorter way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tomli_w

from gemel.cli.main import main
from gemel.data.shards import TokenShards
from gemel.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.corpus import chinese, trained

TEXTS = [*chinese(20), "the quick brown fox"]
LONG = sorted(map(len, TEXTS))[10]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    trained().save(tmp_path / "tok")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"content": text}, ensure_ascii=False) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def tokenized(folder: Path, capsys: pytest.CaptureFixture[str], *argv: str) -> TokenShards:
    out = folder / f"shards {len(list(folder.iterdir()))}"
    assert main(["tokenize", *argv, "--tokenizer", str(folder / "tok"), "--out", str(out), "--workers", "1", "--quiet", "--json"]) == 0
    shards, report = TokenShards.open(out), json.loads(capsys.readouterr().out)
    assert report == {"path": str(out), "documents": len(shards.lengths), "tokens": int(shards.lengths.sum())}
    return shards


def documents(shards: TokenShards) -> list[list[int]]:
    return [shards[number].tolist() for number in range(len(shards.lengths))]


def test_files_and_recipes_become_the_shards_of_gemel_data(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.load(tmp_path / "tok")
    want = [[*tokenizer.encode(text), tokenizer.eos_id] for text in TEXTS]
    assert documents(tokenized(tmp_path, capsys, str(corpus), "--text-field", "content")) == want
    reading = [{"kind": "jsonl", "paths": [str(corpus)], "text_field": "content"}]
    long = {
        "input": reading,
        "step": [{"kind": "length", "min_chars": LONG}],
        "output": {"kind": "jsonl", "path": str(tmp_path / "unused")},
    }
    (tmp_path / "clean.toml").write_text(tomli_w.dumps(long))
    cleaned = documents(tokenized(tmp_path, capsys, str(tmp_path / "clean.toml")))
    assert cleaned == [ids for ids, text in zip(want, TEXTS, strict=True) if len(text) >= LONG] and 0 < len(cleaned) < len(want)
    tokens = {"kind": "tokens", "path": str(tmp_path / "data"), "tokenizer": str(tmp_path / "tok"), "end_of_document": "<|endoftext|>"}
    (tmp_path / "tokens.toml").write_text(tomli_w.dumps(long | {"output": tokens}))
    assert main(["data", str(tmp_path / "tokens.toml"), "--workers", "1", "--quiet", "--json"]) == 0
    assert documents(TokenShards.open(tmp_path / "data")) == cleaned
    assert not (tmp_path / "unused").exists()


def test_mistakes_cost_one_line(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = ["--tokenizer", str(tmp_path / "tok"), "--out", str(tmp_path / "out")]
    assert main(["tokenize", "a.toml", str(corpus), *there]) == 2
    assert "a.toml is a data recipe and says by itself what is read" in capsys.readouterr().err
    assert main(["tokenize", str(corpus), *there, "--end", "<nothing>", "--quiet"]) == 2
    assert "<nothing>" in capsys.readouterr().err


def test_that_nothing_is_left_is_said_with_the_reasons(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["tokenize", str(corpus), "--tokenizer", str(tmp_path / "tok"), "--out", str(tmp_path / "out"), "--workers", "1", "--quiet"]
    assert main(argv) == 2
    assert f"no document is left to tokenize: {len(TEXTS)} " in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    assert main([*argv, "--text-field", "content"]) == 0
