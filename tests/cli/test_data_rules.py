"""The verbs that make models for steps: from files to a model that the step takes, and what they print."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from gemel.cli import data_classify, data_label, data_ngram
from gemel.config.data.rules import ClassifyConfig, PerplexityConfig
from gemel.config.errors import ConfigError
from gemel.data.steps.classify import Classify
from gemel.data.steps.perplexity import Perplexity
from tests.data.steps.prose import english, kept, reason


def run(verb: object, *argv: object) -> int:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)  # type: ignore[attr-defined]
    return int(verb.run(parser.parse_args([str(one) for one in argv])))  # type: ignore[attr-defined]


def test_classify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": str(i), "text": f"{english(3, i)} {'fine' if i % 2 else 'poor'}", "score": 4 if i % 2 else 1} for i in range(200)]
    labels, model = tmp_path / "labels.jsonl", tmp_path / "quality.safetensors"
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(data_classify, labels, "--output", model) == 0
    printed = capsys.readouterr().out
    assert "200 texts, 100 good" in printed and "precision" in printed
    assert run(data_classify, labels, "--output", model, "--json") == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert report[2]["threshold"] == 0.5 and report[2]["accuracy"] > 0.9
    step = Classify(ClassifyConfig(model=str(model)))
    assert (reason(step, rows[1]["text"]), reason(step, rows[0]["text"])) == ("", "classify.low")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="both kinds"):
        run(data_classify, labels, "--output", model, "--good-from", 9)


def test_ngram(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, model = tmp_path / "good.jsonl", tmp_path / "good.safetensors"
    good.write_text("".join(json.dumps({"text": english(8, seed)}) + "\n" for seed in range(120)))
    assert run(data_ngram, good, "--output", model, "--order", 2, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["texts"], printed["held_out"], len(printed["ngrams"])) == (120, 3, 2)
    limit = printed["perplexity"]["p99"] * 1.5
    step = Perplexity(PerplexityConfig(model=str(model), max_perplexity=limit))
    assert kept(step, english(8, 1000)).metadata["perplexity"] < limit
    assert reason(step, english(8, 1000)[::-1]) == "perplexity.high"


def test_label_refuses_an_engine_and_an_endpoint_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave them out"):
        run(data_label, tmp_path / "x.jsonl", "--output", tmp_path / "y", "--engine", "m", "--endpoint", "http://127.0.0.1:9/v1")
    with pytest.raises(ConfigError, match="cannot read"):
        run(data_label, tmp_path / "x.jsonl", "--output", tmp_path / "y", "--prompt", tmp_path / "none")


@pytest.mark.model
def test_label_by_an_engine_in_this_process(tmp_path: Path, capsys: pytest.CaptureFixture[str], smollm2: Path) -> None:
    texts = tmp_path / "x.jsonl"
    texts.write_text(json.dumps({"id": "a", "text": "Water boils at 100 degrees."}) + "\n")
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Repeat exactly: Score: 3\n\n({text})")
    status = run(data_label, texts, "--output", tmp_path / "y.jsonl", "--engine", smollm2, "--prompt", prompt, "--max-tokens", 8)
    (row,) = [json.loads(line) for line in (tmp_path / "y.jsonl").read_text().splitlines()]
    assert row["answer"] and row["error"] in ("", "label.unreadable")
    assert status == int(row["error"] != "")
    assert "label." in capsys.readouterr().out
