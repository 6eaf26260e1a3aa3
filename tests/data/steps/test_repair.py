"""What encodings broke is made whole; what only looks odd stays."""

from __future__ import annotations

import unicodedata

import pytest

from gemel.config.data.rules import RepairConfig
from gemel.data.steps.repair import Repair
from tests.data.steps.prose import chinese, kept, reason

REPAIR = Repair(RepairConfig())


@pytest.mark.parametrize("charset", ["cp1252", "latin-1"])
@pytest.mark.parametrize("text", ["It’s — isn’t it?", "Größe und Maß, naïve café", "déjà vu à l’été"])
def test_utf8_that_was_read_as_something_else(charset, text):
    document = kept(REPAIR, text.encode().decode(charset))
    assert document.text == text
    assert document.metadata["counts"]["repair.mojibake"] == 1


def test_lines_are_repaired_one_by_one():
    good = "Größe 東京 «ça» Ã la carte"
    assert kept(REPAIR, good + "\nItâ€™s").text == good + "\nIt’s"


@pytest.mark.parametrize("text", [chinese(), "ＡＢＣ１２３，。！？", "ﾊﾝｶｸ", "می‌خواهم", "👩‍👩‍👧", "Ã", "x² ﬁ", "a\tb\nc"])
def test_what_is_a_choice_stays(text):
    document = kept(REPAIR, text)
    assert document.text == text
    assert document.metadata == {}


def test_control_characters_and_line_ends():
    document = kept(REPAIR, "\ufeffa\x00b\r\nc\rd\u2028e\u200bf\x1b[0m")
    assert document.text == "ab\nc\nd\nef[0m"
    assert document.metadata["counts"] == {"repair.control_characters": 4}


def test_composed():
    document = kept(REPAIR, unicodedata.normalize("NFD", "été Ångström 한국"))
    assert document.text == "été Ångström 한국"
    assert document.metadata["counts"] == {"repair.normalised": 1}


def test_text_that_was_lost_before():
    assert reason(REPAIR, "a\ufffd" * 10) == "repair.undecodable"
    assert kept(REPAIR, "a" * 200 + "\ufffd").text.endswith("\ufffd")


def test_each_repair_is_a_switch():
    nothing = Repair(RepairConfig(mojibake=False, normalise=False, control_characters=False, max_replacements=1.0))
    text = "Itâ€™s e\u0301 \x00\r\n\ufffd"
    assert kept(nothing, text).text == text
