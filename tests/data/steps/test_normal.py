from __future__ import annotations

import unicodedata

import pytest

from gemel.config.data.dedup import EVERYTHING, Normalize
from gemel.data.steps.normal import BLOCK_CHARS, groups, normal

TEXTS = [
    "",
    "  Plain   text,\n\twith tabs ",
    "Ｆｕｌｌ－ｗｉｄｔｈ　１２３，全角，半角。",
    "naïve cafe\u0301 Ελλάδα ёлка",
    "soft\u00adhyphen zero\u200bwidth \ufeff",
    "v1.2.30 ٣٤٥ 100",
    "ｶﾞｷﾞ 한국어 ภาษาไทย",
    "\U0001f600 \U00020000\U00020001 \ud800 lone",
    "\n\n",
    "7",
    "7",
]


def plain(text: str, config: Normalize) -> str:
    """The same by hand, one character at a time."""
    out: list[str] = []
    for char in text:
        wide = unicodedata.normalize("NFKC", char)
        char = wide if len(wide) == 1 else char
        category = unicodedata.category(char)
        if char.isspace() or category == "Cc" or (config.punctuation and category[0] in "PS"):
            out.append(" ")
        elif category == "Cf" or (config.accents and "\u0300" <= char <= "\u036f"):
            continue
        elif config.numbers and char.isdecimal():
            out += [] if out and out[-1] == "0" else ["0"]
        else:
            if config.accents and all("\u0300" <= mark <= "\u036f" for mark in unicodedata.normalize("NFD", char)[1:]):
                char = unicodedata.normalize("NFD", char)[0]
            out.append(char.lower() if config.case and len(char.lower()) == 1 else char)
    return " ".join("".join(out).split())


@pytest.mark.parametrize("config", [Normalize(), EVERYTHING, Normalize(numbers=True), Normalize(accents=True), Normalize(case=True)])
def test_the_table_does_what_a_loop_over_characters_does(config: Normalize) -> None:
    assert normal(TEXTS, config).strings() == [plain(text, config) for text in TEXTS]


def test_what_counts_as_the_same() -> None:
    strings = normal(["Café ＃１２： Ｔｅｓｔ，第３版！", "cafe\u0301 # 99 - TEST 第007版"], EVERYTHING).strings()
    assert strings == ["cafe 0 test 第0版"] * 2


def test_texts_do_not_touch() -> None:
    assert normal(["a1", "2b", "", "3", "4"], Normalize(numbers=True)).strings() == ["a0", "0b", "", "0", "0"]
    assert normal(["a ", " b"], Normalize()).strings() == ["a", "b"]


def test_part_of_a_text() -> None:
    text = normal(["one  two\nthree"], Normalize())
    assert text.string(0, len(text.codes)) == "one two three"
    assert text.string(5, 9) == "two"


def test_groups_cover_all_texts_once() -> None:
    sizes = [1, BLOCK_CHARS, 5, 5, 3 * BLOCK_CHARS, 0, 2]
    parts = list(groups(["x" * size for size in sizes]))
    assert [number for group in parts for number in range(group.start, group.stop)] == list(range(len(sizes)))
    assert list(groups([])) == []
    assert all(sum(sizes[group]) <= BLOCK_CHARS or group.stop - group.start == 1 for group in parts)
