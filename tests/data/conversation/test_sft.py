"""The whole job: every row is a conversation or a named loss, and the folder is complete or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemel.config.data.conversation import SftRecipe, load
from gemel.config.errors import ConfigError
from gemel.data.conversation import sft
from gemel.tokenizer.conversation import Conversation

MIXED = [
    {"instruction": "列出三种水果", "input": "", "output": "苹果、梨、桃"},
    {"指令": "解释光合作用", "输出": "植物用光制造养分。"},
    {"conversations": [{"from": "human", "value": "hello there"}, {"from": "gpt", "value": "I'm sorry, I can't help with that."}]},
    {"instruction": "没有答案的问题"},
    {"prompt": "question", "chosen": "good answer", "rejected": "bad answer"},
    {"问句": "怎么退货", "答复": "请联系客服"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    text = json.dumps(MIXED, ensure_ascii=False)
    (tmp_path / "in" / "mixed.json").write_text(text[:-1] + ', {"instruction": "cut', encoding="utf-8")
    (tmp_path / "in" / "shop_1.jsonl").write_text(json.dumps(MIXED[5]) + "\n\n" + '{"broken": \n', encoding="utf-8")
    (tmp_path / "in" / "empty.jsonl").write_text("")
    return tmp_path


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_row_is_accounted_for(folder: Path) -> None:
    recipe = SftRecipe.parse(
        {
            "dataset": [{"files": "shop_*", "source": "shop", "columns": {"instruction": "问句", "output": "答复"}}],
            "step": [{"kind": "refusal"}, {"kind": "paraphrase", "share": 1.0}],
        }
    )
    report = sft.run([str(folder / "in")], recipe, folder / "out")
    by_name = {Path(path).name: tally for path, tally in report["files"].items()}
    assert by_name["mixed.json"] == {
        "rows": 7,
        "rows_with_conversations": 4,
        "conversations": 4,
        "lost": {"sft.no_output": 1, "sft.unknown_columns": 1, "sft.broken_off": 1},
        "repaired": {"repaired.broken_list": 4, "repaired.absent_input": 2},
    }
    assert by_name["shop_1.jsonl"]["lost"] == {"sft.broken_off": 1}
    assert by_name["empty.jsonl"]["lost"] == {"sft.empty_file": 1}
    kept = [Conversation.from_json(line) for line in lines(folder / "out" / "conversations.jsonl")]  # type: ignore[arg-type]
    dropped = lines(folder / "out" / "dropped.jsonl")
    assert len(kept) == report["kept"] == 8
    assert [conversation.source for conversation in kept].count("shop") == 2
    assert report["dropped"] == {
        "sft.no_output": 1,
        "sft.unknown_columns": 1,
        "sft.broken_off": 2,
        "sft.empty_file": 1,
        "sft.refusal": 1,
    }
    assert sorted(line["reason"] for line in dropped) == sorted(r for r, n in report["dropped"].items() for _ in range(n))  # type: ignore[type-var]
    assert json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))["kept"] == 8
    assert report["steps"][0] == {"kind": "refusal", "before": 5, "after": 4, "dropped": {"sft.refusal": 1}, "added": 0}
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted(sft.OUTPUTS)


def test_what_was_written_is_read_back_the_same(folder: Path) -> None:
    sft.run([str(folder / "in" / "mixed.json")], SftRecipe(), folder / "one")
    sft.run([str(folder / "one" / "conversations.jsonl")], SftRecipe(), folder / "two")
    first, second = (lines(folder / name / "conversations.jsonl") for name in ("one", "two"))
    keys = ("messages", "chosen", "rejected", "id")
    assert [[line.get(key) for key in keys] for line in first] == [[line.get(key) for key in keys] for line in second]


def test_surrogates_are_written_as_escapes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"instruction": "a\\ud800b", "output": "c"}\n')
    sft.run([str(tmp_path / "a.jsonl")], SftRecipe(), tmp_path / "out")
    assert lines(tmp_path / "out" / "conversations.jsonl")[0]["messages"][0]["content"] == "a\ud800b"  # type: ignore[index]


def test_a_result_is_never_written_over(folder: Path) -> None:
    sft.run([str(folder / "in")], SftRecipe(), folder / "out")
    with pytest.raises(ConfigError, match="not an empty folder"):
        sft.run([str(folder / "in")], SftRecipe(), folder / "out")


def test_recipes_are_files(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[[dataset]]\nfiles = "*.json"\n[dataset.columns]\ninstruction = "问"\n[[step]]\nkind = "length"\n')
    recipe = load(tmp_path / "a.toml")
    assert recipe.dataset[0].columns.instruction == "问"
    assert recipe.step[0].kind == "length"
    (tmp_path / "b.toml").write_text('[[dataset]]\nfiles = "*"\n[dataset.columns]\ninstructoin = "问"\n')
    with pytest.raises(ConfigError, match="instructoin"):
        load(tmp_path / "b.toml")
    (tmp_path / "c.toml").write_text("[[")
    for name in ("c.toml", "d.toml"):
        with pytest.raises(ConfigError, match=name):
            load(tmp_path / name)
