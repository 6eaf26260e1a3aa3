"""Length in characters: the limits themselves are allowed, and Chinese counts as it is written."""

from __future__ import annotations

from gemel.config.data.pipeline import LengthConfig
from gemel.data.document import Document, Dropped
from gemel.data.steps.length import Length


def test_limits_are_allowed_and_characters_are_not_bytes() -> None:
    texts = ["一二", "一二三", "一二三四五", "一二三四五六", "abc"]
    answers = list(Length(LengthConfig(kind="length", min_chars=3, max_chars=5))([Document(text, text, "") for text in texts]))
    assert [answer.reason if isinstance(answer, Dropped) else "" for answer in answers] == ["length.short", "", "", "length.long", ""]
    assert [answer.detail for answer in answers if isinstance(answer, Dropped)] == [
        "2 characters, min_chars = 3",
        "6 characters, max_chars = 5",
    ]


def test_without_limits_everything_stays() -> None:
    documents = [Document("", "a", ""), Document("x" * 1000, "b", "")]
    assert list(Length(LengthConfig(kind="length"))(documents)) == documents
