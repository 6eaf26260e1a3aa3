from __future__ import annotations

import pytest
import xxhash

from gemel.config.data.dedup import EVERYTHING, ExactConfig, ExactPartsConfig
from gemel.config.errors import ConfigError
from gemel.data.document import Document, Dropped
from gemel.data.steps.exact import Exact, ExactParts, hash128, normalized_url
from tests.data import corpus

SAME = [
    "One text.",
    "Another text.",
    "One  text.\n",
    "ONE TEXT",
    "另一段文字，完全一样。",
    "另一段文字，完全一样。",
    "One text.",
    "Ａnother text.",
]


def test_hashes_are_xxh3() -> None:
    digest = xxhash.xxh3_128_intdigest("你好".encode())
    assert hash128(["你好"]).tolist() == [[digest >> 64, digest % 2**64]]
    assert hash128([]).shape == (0, 2)


def test_the_first_of_the_same_is_kept() -> None:
    answers, _ = corpus.run(Exact(ExactConfig()), corpus.documents(*SAME))
    assert corpus.kept(answers) == ["d0", "d1", "d3", "d4"]
    dropped = [(a.document.id, a.reason, a.detail) for a in answers if isinstance(a, Dropped)]
    assert dropped[0] == ("d2", "exact.document", "same as d0")
    assert [name for name, _, _ in dropped] == ["d2", "d5", "d6", "d7"]
    assert [detail for _, _, detail in dropped[1:]] == ["same as d4", "same as d0", "same as d1"]


def test_normalization_is_a_choice() -> None:
    answers, _ = corpus.run(Exact(ExactConfig(normalize=EVERYTHING)), corpus.documents(*SAME))
    assert corpus.kept(answers) == ["d0", "d1", "d4"]


def test_texts_are_not_changed() -> None:
    answers, _ = corpus.run(Exact(ExactConfig(normalize=EVERYTHING)), corpus.documents(*SAME))
    assert [a.document.text if isinstance(a, Dropped) else a.text for a in answers] == SAME


@pytest.mark.parametrize("cutting", corpus.CUTTINGS)
@pytest.mark.parametrize("step", [Exact(ExactConfig()), ExactParts(ExactPartsConfig(by="line", min_part_chars=1, min_chars=1))])
def test_the_result_does_not_depend_on_the_cutting(step: Exact | ExactParts, cutting: tuple[int, int, int]) -> None:
    documents = corpus.documents(*(f"{text}\nline {number % 3}\n{SAME[number % 5]}" for number, text in enumerate(SAME * 2)))
    assert corpus.outcome(corpus.run(step, documents, *cutting)[0]) == corpus.outcome(corpus.run(step, documents)[0])


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("https://www.Example.com:443/a/?b=2&a=1#top", True),
        ("http://example.com/%61?a=1&b=2", True),
        ("http://example.com/a?a=1", False),
        ("http://example.com:8080/a?a=1&b=2", False),
        ("http://example.com/A?a=1&b=2", False),
        ("http://[broken", None),
        ("d17", None),
        ("file:///a", None),
    ],
)
def test_urls(url: str, same: bool | None) -> None:
    found = normalized_url(Document("", url, "s"))
    assert found is None if same is None else (found == "example.com/a?a=1&b=2") == same


def test_duplicates_by_url() -> None:
    documents = [
        Document("a", "http://x.org/", "s"),
        Document("b", "1", "s", {"url": "https://www.x.org"}),
        Document("b", "2", "s"),
        Document("b", "2", "s"),
    ]
    answers, _ = corpus.run(Exact(ExactConfig(by="url")), documents)
    assert [a.detail if isinstance(a, Dropped) else "" for a in answers] == ["", "same as http://x.org/", "", ""]
    assert isinstance(answers[1], Dropped)
    assert answers[1].reason == "exact.url"
    with pytest.raises(ConfigError, match="by = 'document'"):
        ExactConfig.parse({"by": "url", "normalize": {"case": True}})
    ExactConfig.parse({"by": "document", "normalize": {"case": True}})


def test_repeated_lines_go_and_what_is_too_short_is_dropped() -> None:
    footer = "All rights reserved by the owner of this site."
    texts = [
        f"First page.\n{footer}\nMore of it.",
        f"Second page, as long as the first.\n{footer}",
        f"{footer}\n{footer}",
        footer + "\n版权所有，翻印必究。",
    ]
    config = ExactPartsConfig(by="line", min_part_chars=20, min_chars=10)
    answers, _ = corpus.run(ExactParts(config), corpus.documents(*texts), units=3)
    assert [a.text if isinstance(a, Document) else a.reason for a in answers] == [
        texts[0],
        "Second page, as long as the first.",
        "exact.short",
        "版权所有，翻印必究。",
    ]
    assert [a.metadata for a in answers if isinstance(a, Document)] == [{}, {"counts": {"exact.line": 1}}, {"counts": {"exact.line": 1}}]
    assert isinstance(answers[2], Dropped)
    assert answers[2].document.text == texts[2]  # a dropped document can be read as it was
    assert answers[2].detail == "0 of 93 characters left without 2 repeated lines; limit 10"


def test_paragraphs_are_separated_by_empty_lines() -> None:
    one, two, three = "A paragraph\nof two lines.", "Another paragraph.", "第三段，\n也有两行。"
    texts = [f"{one}\n\n{two}", f"{two}\n \n\n{three}", f"{three}\n\n{one}\n\n{two}!"]
    config = ExactPartsConfig(by="paragraph", min_part_chars=5, min_chars=1)
    answers, _ = corpus.run(ExactParts(config), corpus.documents(*texts))
    assert [a.text for a in answers if isinstance(a, Document)] == [texts[0], three, two + "!"]


def test_short_parts_stay() -> None:
    texts = ["}\nlong enough to be compared", "}\nlong enough to be compared\n}"]
    answers, _ = corpus.run(ExactParts(ExactPartsConfig(by="line", min_part_chars=10, min_chars=0)), corpus.documents(*texts))
    assert [a.text for a in answers if isinstance(a, Document)] == [texts[0], "}\n}"]
