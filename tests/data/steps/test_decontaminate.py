from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest

from gemel.config.data.dedup import DecontaminateConfig
from gemel.config.errors import ConfigError
from gemel.data.document import Dropped
from gemel.data.steps.decontaminate import Decontaminate
from tests.data import corpus

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
CHINESE = "小明在四月份卖了四十八个发夹给他的朋友们，五月份又卖了一半，请问他一共卖了多少个发夹？"
OTHER = "Completely unrelated words about the weather in some northern town, which was as dull as it usually is in autumn."


@pytest.fixture
def tests_file(tmp_path: Path) -> Path:
    path = tmp_path / "eval.jsonl"
    rows = [{"question": QUESTION, "answer": "72"}, {"question": CHINESE, "meta": {"note": OTHER}}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def answers(step: Decontaminate, *texts: str) -> list[str]:
    return [a.detail if isinstance(a, Dropped) else "" for a in step(corpus.documents(*texts))]


def test_documents_with_evaluation_text_are_dropped(tests_file: Path) -> None:
    step = Decontaminate(DecontaminateConfig(files=(tests_file,), fields=("question",)))
    texts = [OTHER, f"Homework: {QUESTION.upper()}", f"作业：{CHINESE}完", QUESTION.replace("friends", "pals"), "", CHINESE[:20] + OTHER]
    details = answers(step, *texts)
    assert details[0] == details[3] == details[4] == details[5] == ""
    assert details[1] == "'natalia sold clips to 48 of her friends in april and then she' is in eval.jsonl; 8 such n-grams"
    assert details[2].startswith("'小明在四月份卖了四十八个发夹给他的朋友们 五月份又' is in eval.jsonl")
    [dropped] = step(corpus.documents(texts[1]))
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "decontaminate.ngram"


def test_thirteen_words_are_enough_and_twelve_are_not(tests_file: Path) -> None:
    step = Decontaminate(DecontaminateConfig(files=(tests_file,)))
    words = QUESTION.split()
    assert answers(step, "so " + " ".join(words[3:16]) + " so", "so " + " ".join(words[3:15]) + " so", " ".join(words[:12]))[0]
    assert answers(step, "so " + " ".join(words[3:15]) + " so", " ".join(words[:12])) == ["", ""]
    assert answers(step, CHINESE[3:27].replace("，", "") + "某", CHINESE[3:28] + "某") == ["", answers(step, CHINESE[3:28])[0]]
    assert answers(step, CHINESE[3:28])[0] != ""


def test_fields_choose_what_is_compared(tests_file: Path) -> None:
    assert answers(Decontaminate(DecontaminateConfig(files=(tests_file,))), OTHER) != [""]
    assert answers(Decontaminate(DecontaminateConfig(files=(tests_file,), fields=("meta",))), OTHER, QUESTION)[1] == ""
    with pytest.raises(ConfigError, match="no text under nothing"):
        Decontaminate(DecontaminateConfig(files=(tests_file,), fields=("nothing",)))


def test_several_matches_can_be_demanded(tests_file: Path) -> None:
    text = QUESTION.replace("May", "June")  # 20 words; the last is another
    assert answers(Decontaminate(DecontaminateConfig(files=(tests_file,), min_matches=8)), text, QUESTION)[0] == ""
    assert "8 such" in answers(Decontaminate(DecontaminateConfig(files=(tests_file,), min_matches=8)), text, QUESTION)[1]


def test_text_files_have_an_item_per_paragraph(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "eval.txt.gz"
    path.write_bytes(gzip.compress(f"{QUESTION}\n\nshort\n\n{OTHER}".encode()))
    with caplog.at_level(logging.WARNING):
        step = Decontaminate(DecontaminateConfig(files=(path,)))
    assert "1 of 3 evaluation items are shorter" in caplog.text
    assert [bool(detail) for detail in answers(step, QUESTION, OTHER, f"{QUESTION[:40]} {OTHER[-40:]}")] == [True, True, False]


def test_batches_do_not_matter(tests_file: Path) -> None:
    step = Decontaminate(DecontaminateConfig(files=(tests_file,)))
    texts = [OTHER * 2000, QUESTION, "", "x" * 200_000, CHINESE * 3000, "plain"]
    assert answers(step, *texts) == [answers(step, text)[0] for text in texts]


def test_mistakes_name_their_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the evaluation file"):
        Decontaminate(DecontaminateConfig(files=(tmp_path / "absent.txt",)))
    short = tmp_path / "short.txt"
    short.write_text("five words are not enough")
    with pytest.raises(ConfigError, match="set a smaller ngram"):
        Decontaminate(DecontaminateConfig(files=(short,)))
    assert answers(Decontaminate(DecontaminateConfig(files=(short,), ngram=5)), "Five words are NOT enough!") != [""]
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"a": "b"}\n{"a": ')
    with pytest.raises(ConfigError, match="line 2 is not JSON"):
        Decontaminate(DecontaminateConfig(files=(broken,)))
