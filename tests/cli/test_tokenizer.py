"""`gemel tokenizer`: the four actions end to end, and mistakes that cost one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gemel.cli.main import main
from gemel.model import build
from gemel.tokenizer.tokenizer import Tokenizer
from tests import tiny
from tests.model.reference import logits
from tests.tokenizer.corpus import chinese, trained
from tests.tolerance import assert_close


def report(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, object]:
    assert main(["tokenizer", *argv, "--json"]) == 0
    value: dict[str, object] = json.loads(capsys.readouterr().out)
    return value


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = [{"text": text, "lang": "zh"} for text in chinese(200)] + [{"text": "the quick brown fox " * 20, "lang": "en"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_train_then_encode(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[0].content }}")
    argv = ("--vocab-size", "300", "--special", "<end>", "--chat-template", str(template))
    made = report(capsys, "train", str(corpus), "package:json", "--out", str(tmp_path / "tok"), *argv)
    assert made["vocab_size"] == 300
    tokenizer = Tokenizer.load(tmp_path / "tok")
    assert tokenizer.eos_id == 299
    assert tokenizer.templates == {"default": "{{ messages[0].content }}"}
    found = report(capsys, "encode", "--tokenizer", str(tmp_path / "tok"), "--text", "我们<end>")
    assert found["ids"] == tokenizer.encode("我们<end>")
    assert found["library"] == "fastokens"


def test_fertility_by_a_field(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained().save(tmp_path / "tok")
    found = report(capsys, "fertility", "--tokenizer", str(tmp_path / "tok"), str(corpus), "--by", "lang")
    [zh, en] = found[str(tmp_path / "tok")]["languages"]  # type: ignore[index,call-overload]
    assert (zh["language"], zh["num_texts"], en["language"], en["num_words"]) == ("zh", 200, "en", 80)
    assert main(["tokenizer", "fertility", "--tokenizer", str(tmp_path / "tok"), f"all={corpus}"]) == 0
    assert "all         201" in capsys.readouterr().out


def test_extend_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "old"
    small = replace(tiny.build("gqa", vocab_size=trained().vocab_size), eos_token_ids=(797,))
    build.save(small, old)
    trained().save(old)
    (tmp_path / "tokens.txt").write_text("心肌梗死\n pneumothorax\n学习\n", encoding="utf-8")
    argv = ("--tokens", str(tmp_path / "tokens.txt"), "--pad-to-multiple", "128")
    found = report(capsys, "extend", "--from", str(old), "--out", str(tmp_path / "new"), *argv)
    assert found["known"] == ["学习"]
    assert found["model_rows"] == 896
    new, text = Tokenizer.load(tmp_path / "new"), torch.tensor(trained().encode("我们学习自然语言"))
    resized = build.load(tmp_path / "new")
    assert_close(logits(resized.model, text)[:, :800], logits(small.model, text), "fp32_reorder")
    assert new.encode("我们学习自然语言") == text.tolist()
    assert new.encode("心肌梗死 pneumothorax") == [800, 801]
    pieces = trained().encode("心肌梗死")
    assert_close(resized.model.embed.weight[800], small.model.embed.weight[pieces].mean(0), "fp32_reorder")


def test_extend_a_tokenizer_alone_by_learning(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained().save(tmp_path / "old")
    argv = ("extend", "--from", str(tmp_path / "old"), "--learn", "5", str(corpus), "--out", str(tmp_path / "new"))
    assert main(["tokenizer", *argv]) == 0
    assert "5 tokens added" in capsys.readouterr().out
    assert Tokenizer.load(tmp_path / "new").vocab_size == 805


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["train", "nowhere.txt", "--out", "x"], "matches no file"),
        (["train", "package:json", "--out", "x", "--vocab-size", "9"], "less than 259"),
        (["extend", "--from", "x", "--out", "y", "--learn", "5"], "needs TEXTS"),
        (["extend", "--from", "x", "--out", "y", "a.txt"], "give --learn"),
        (["fertility", "--tokenizer", "nowhere", "en=package:json"], "neither a directory"),
    ],
)
def test_a_mistake_costs_one_line(
    argv: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tokenizer", *argv]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1


def test_an_unknown_option_of_an_action_proposes_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["tokenizer", "train", "package:json", "--out", "x", "--vocab-sise", "300"])
    assert end.value.code == 2
    assert "--vocab-size" in capsys.readouterr().err
