"""Every object of a file is found, however the file is broken, and everything else is named."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemel.data.conversation.salvage import Lost, Row, decode, objects, read

ROWS = [{"instruction": f'问题 {i}, [a] {{b}} "c"', "output": f"答案\n{i}"} for i in range(8)]
DUMPED = [json.dumps(row, ensure_ascii=False) for row in ROWS]
WHOLE = json.dumps(ROWS, ensure_ascii=False, indent=4)


def split(text: str) -> tuple[list[object], list[str]]:
    found = list(objects(text))
    return [row.value for row in found if isinstance(row, Row)], [lost.reason for lost in found if isinstance(lost, Lost)]


@pytest.mark.parametrize(
    "text",
    [
        WHOLE,
        "\ufeff" + WHOLE,
        "\n".join(DUMPED),
        "\r\n".join(DUMPED) + "\r\n\r\n",
        ",\n".join(DUMPED) + ",",
        "".join(DUMPED),
        json.dumps({"data": ROWS}),
        WHOLE[:-2] + ",\n]   ",
        WHOLE[:-1],
        WHOLE + "\n" + WHOLE[:1],
        "\n".join(json.dumps(row, ensure_ascii=False, indent=2) for row in ROWS),
    ],
    ids=["list", "mark", "lines", "crlf", "commas", "glued", "wrapped", "comma", "open", "again", "pretty"],
)
def test_whole_objects_are_found_in_files_of_all_shapes(text: str) -> None:
    assert split(text) == (ROWS, [])


def test_a_list_that_breaks_off_in_an_object() -> None:
    cut = WHOLE.index("问题 5")
    assert split(WHOLE[: cut + 2]) == (ROWS[:5], ["sft.broken_off"])
    [lost] = [found for found in objects(WHOLE[: cut + 2]) if isinstance(found, Lost)]
    assert lost.place == f"line {WHOLE[:cut].count(chr(10))}"
    assert "问题" in lost.text


@given(at=st.integers(0, len(WHOLE)))
@settings(max_examples=150, deadline=None)
def test_wherever_a_list_breaks_off_the_rows_before_are_there(at: int) -> None:
    rows, lost = split(WHOLE[:at])
    assert rows == ROWS[: len(rows)]
    num_whole = sum(WHOLE.index(json.dumps(row["output"], ensure_ascii=False)) + 20 < at for row in ROWS)
    assert len(rows) >= num_whole
    assert len(rows) + len(lost) >= WHOLE[:at].count("{\n")


@pytest.mark.parametrize("damage", ['"output', '": "', '"}', "题 3", "{"])
def test_an_object_broken_in_the_middle_costs_only_itself(damage: str) -> None:
    broken = DUMPED[3].replace('"output"', damage) if damage == '"output' else DUMPED[3].replace(damage, '"\\', 1)
    for text in ("[" + ",\n ".join([*DUMPED[:3], broken, *DUMPED[4:]]) + "]", "\n".join([*DUMPED[:3], broken, *DUMPED[4:]])):
        rows, lost = split(text)
        assert rows == ROWS[:3] + ROWS[4:]
        assert len(lost) == 1


def test_parts_of_a_broken_conversation_are_not_taken_for_rows() -> None:
    good = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    broken = json.dumps(good).replace('"b"', '"b')
    rows, lost = split(f"[{json.dumps(good)}, {broken}, {json.dumps(good)}]")
    assert rows == [good, good]
    assert lost == ["sft.broken_json"]


def test_what_can_be_mended_is_mended_and_says_so() -> None:
    lines = [
        '{"instruction": "a, }", "output": "b",}',
        "{'instruction': 'it\\'s', 'output': None}",
        '{"instruction": "x\ty", "output": "z"}',
    ]
    found = list(objects("\n".join([*DUMPED, *lines])))[len(DUMPED) :]
    assert [row.repairs for row in found if isinstance(row, Row)] == [
        ("repaired.trailing_comma",),
        ("repaired.python_literal",),
        ("repaired.control_characters",),
    ]
    assert [row.value for row in found if isinstance(row, Row)] == [
        {"instruction": "a, }", "output": "b"},
        {"instruction": "it's", "output": None},
        {"instruction": "x\ty", "output": "z"},
    ]


def test_what_is_no_object_is_named() -> None:
    assert split('[1, "a", {"output": "b"}]') == ([{"output": "b"}], ["sft.not_object", "sft.not_object"])
    assert split("\n".join([*DUMPED, "hello", "3"])) == (ROWS, ["sft.not_object", "sft.not_object"])
    assert split("just text") == ([], ["sft.not_object"])
    assert split("") == ([], [])
    assert split('"text"')[1] == ["sft.not_object"]


def test_lists_of_messages_are_rows() -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert split(json.dumps([talk, talk])) == ([talk, talk], [])
    assert split(json.dumps(talk) + "\n" + json.dumps(talk)) == ([talk, talk], [])


def test_encodings(tmp_path: Path) -> None:
    assert decode(WHOLE.encode("gb18030")) == (WHOLE, "gb18030", 0)
    assert decode(WHOLE.encode("utf-16")) == (WHOLE, "utf-16", 0)
    assert decode(b"\xef\xbb\xbf" + WHOLE.encode()) == (WHOLE, "", 0)
    one_bad = WHOLE.encode().replace("答案".encode(), b"\xff\xfe", 1)
    text, encoding, num_bad = decode(one_bad)
    assert (encoding, num_bad) == ("", 2)
    assert "问题 7" in text
    (tmp_path / "a.json").write_bytes(one_bad)
    found = list(read(str(tmp_path / "a.json")))
    assert sum(isinstance(item, Row) for item in found) == 8
    assert [item.reason for item in found if isinstance(item, Lost)] == ["sft.not_utf8"]
    (tmp_path / "b.json").write_bytes(WHOLE.encode("gb18030"))
    assert all(isinstance(item, Row) and item.repairs == ("repaired.gb18030",) for item in read(str(tmp_path / "b.json")))


def test_a_truncated_archive_gives_what_is_in_it(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [{"instruction": str(draw.random()), "output": str(draw.random())} for _ in range(500)]
    data = gzip.compress("\n".join(map(json.dumps, rows)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    found = list(read(str(tmp_path / "a.jsonl.gz")))
    values = [item.value for item in found if isinstance(item, Row)]
    assert 150 < len(values) < 350
    assert values == rows[: len(values)]
    assert [item.reason for item in found if isinstance(item, Lost)][-1] == "sft.truncated"


def test_ten_thousand_broken_rows_do_not_take_for_ever() -> None:
    rows, lost = split("[" + ",\n".join(['{"instruction": "a" "output": "b"}', '{"instruction": "a", "output": "b"}'] * 5_000) + "]")
    assert (len(rows), len(lost)) == (5_000, 5_000)
