from __future__ import annotations

import pytest

from gemel.config.data.dedup import LinesConfig
from gemel.data.document import Document, Dropped
from gemel.data.steps.lines import Lines
from tests.data import corpus

MENU, COOKIES = "Home | News | About us", "本站使用 Cookie，共 3 种。"
TEXTS = [f"{MENU}\n\nStory number {'ab' * number} is told here.\n\n{COOKIES.replace('3', str(number))}" for number in range(6)]


def test_frequent_lines_go_from_all_documents() -> None:
    texts = [*TEXTS, f"{MENU}\n{MENU}", "Rare line.\nRare line.\nRare line."]
    answers, verdicts = corpus.run(Lines(LinesConfig(min_documents=6, min_chars=10)), corpus.documents(*texts))
    want = [f"Story number {'ab' * number} is told here." for number in range(6)]
    assert [a.text for a in answers if isinstance(a, Document)] == [*want, texts[7]]
    assert isinstance(answers[6], Dropped)
    assert answers[6].reason == "lines.short"
    assert answers[0].metadata == {"counts": {"lines.line": 2}}  # type: ignore[union-attr]
    assert sorted(verdicts["documents"].to_pylist()) == [6, 7]


def test_a_line_counts_once_a_document() -> None:
    answers, _ = corpus.run(Lines(LinesConfig(min_documents=2, min_chars=0)), corpus.documents("Twice.\nTwice.", "Once."))
    assert corpus.outcome(answers) == [("d0", "", "Twice.\nTwice."), ("d1", "", "Once.")]


def test_the_same_words_in_another_order_are_another_line() -> None:
    answers, verdicts = corpus.run(
        Lines(LinesConfig(min_documents=2, min_chars=0)), corpus.documents("ab cd", "cd ab", "abcd", "人山", "山人")
    )
    assert corpus.kept(answers) == [f"d{number}" for number in range(5)]
    assert len(verdicts) == 0


def test_short_lines_stay() -> None:
    config = LinesConfig(min_documents=2, min_line_chars=3, min_chars=0)
    answers, _ = corpus.run(Lines(config), corpus.documents("a b\nab c", "a b\nAB, c!\nab c d"))
    assert [a.text for a in answers if isinstance(a, Document)] == ["a b", "a b\nab c d"]


@pytest.mark.parametrize("cutting", corpus.CUTTINGS)
def test_the_result_does_not_depend_on_the_cutting(cutting: tuple[int, int, int]) -> None:
    step, documents = Lines(LinesConfig(min_documents=6, min_chars=10)), corpus.documents(*TEXTS, MENU)
    assert corpus.outcome(corpus.run(step, documents, *cutting)[0]) == corpus.outcome(corpus.run(step, documents)[0])
