"""`gemel data sft`: the account, the preview, and mistakes that cost one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemel.cli.main import main
from tests.tokenizer.shapes import tokenizer


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"指令": "你好？", "输出": "你好！"}, {"instruction": "无答案"}, {"prompt": "q", "chosen": "yes", "rejected": "no"}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_account_and_the_preview(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer("chatml").save(tmp_path / "tok")
    out = tmp_path / "out"
    assert main(["data", "sft", str(rows), "--out", str(out), "--preview", "2", "--tokenizer", str(tmp_path / "tok")]) == 0
    printed = capsys.readouterr().out
    assert "rows.jsonl     3                   2     1              2" in printed
    assert "rows.jsonl: sft.no_output 1" in printed
    assert "⟦你好！<|im_end|>⟧" in printed
    assert "⟦yes<|im_end|>⟧" in printed
    assert "⟦no<|im_end|>⟧" in printed
    assert len((out / "conversations.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_json_and_recipe(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.toml").write_text('[[step]]\nkind = "length"\nmin_answer_chars = 3\n')
    assert main(["data", "sft", str(rows), "--out", str(tmp_path / "out"), "--recipe", str(tmp_path / "r.toml"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == [{"kind": "length", "before": 2, "after": 1, "dropped": {"sft.short_instruction": 1}, "added": 0}]


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--preview", "1"], "go together"), (["--recipe", "nowhere.toml"], "cannot read the recipe nowhere.toml")],
)
def test_a_mistake_costs_one_line(rows: Path, tmp_path: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "sft", str(rows), "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1
