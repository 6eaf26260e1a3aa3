"""Counts of the diversity report, checked by hand."""

from __future__ import annotations

import pytest

from gemel.data.conversation.diversity import distinct, intent, report
from tests.data.conversation.talks import talk


def test_distinct_n_grams() -> None:
    assert distinct(["a b a b"], 1) == 2 / 4
    assert distinct(["a b a b"], 2) == 2 / 3
    assert distinct(["学习学习", "学"], 1) == 2 / 5
    assert distinct(["学习 NLP"], 3) == 1.0
    assert distinct([], 2) == 0.0
    assert distinct(["same words again"] * 50_000, 2) == 2 / 20_000


@pytest.mark.parametrize(
    ("instruction", "what"),
    [
        ("Write a short story about a dog.", "write short"),
        ("Please write the story", "write story"),
        ("Could you please summarize this article?", "summarize article"),
        ("What is the capital of France?", "what is"),
        ("How do I boil eggs?", "how do"),
        ("Why?", "why"),
        ("请写一首关于春天的诗", "写"),
        ("为什么天空是蓝色的？", "为什么"),
        ("把下面的句子翻译成英文", "翻译"),
        ("你好", "other"),
        ("...", "other"),
    ],
)
def test_intents(instruction: str, what: str) -> None:
    assert intent(instruction) == what


def test_a_report_of_few_conversations() -> None:
    found = report([talk("写诗", "春眠不觉晓"), talk("写诗", "12"), talk("Write code", "print")])
    assert found["num_conversations"] == 3
    assert found["distinct_instructions"] == 2 / 3
    assert found["intents"] == {"写": 2, "write code": 1}
    assert found["languages"] == {"zh": 1, "none": 1, "latin": 1}
    assert found["turns"] == {1: 3}
    assert found["answer_chars"]["max"] == 5
    assert report([])["num_conversations"] == 0
