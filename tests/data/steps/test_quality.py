"""Each rule drops what breaks it and nothing else, in English and in Chinese; what a batch is does not matter."""

from __future__ import annotations

import random
import re

import pytest

from gemel.config.data.rules import QUALITY_RULES, Gopher, QualityConfig
from gemel.config.errors import ConfigError
from gemel.data.document import Document, Dropped
from gemel.data.steps.quality import Quality
from tests.data.steps.prose import chinese, english, kept, reason, run

QUALITY = Quality(QualityConfig())
EN, ZH = english(), chinese()


def lines(count: int, ending: str = ".", seed: int = 50) -> list[str]:
    """Lines of one sentence each, all different, longer than FineWeb's short ones."""
    return [english(1, seed + i).rstrip(".") + ending for i in range(count)]


def words(count: int, length: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghij", k=length)) for _ in range(count)]


def test_prose_passes_unchanged():
    for text in (EN, ZH, EN + "\n" + ZH):
        document = kept(QUALITY, text)
        assert document.text == text
        assert document.metadata == {}


BROKEN = {
    "gopher.short": " ".join(EN.split()[:40]) + ".",
    "gopher.word_length": re.sub(r"\b\w{4,}\b", lambda word: word[0] * 3, EN),
    "gopher.hashes": EN.replace(" of ", " ## "),
    "gopher.ellipses": EN.replace(" of ", " ... ").replace(" and ", " ... "),
    "gopher.bullet_lines": "\n".join("- " + line for line in lines(12)),
    "gopher.ellipsis_lines": "\n".join(lines(12, "...")),
    "gopher.alphabetic_words": EN.replace(" of ", " 17 + ").replace(" and ", " 4 = "),
    "gopher.stop_words": EN.translate(str.maketrans("aehdt", "ozzzz")),
    "gopher.duplicate_lines": EN + "\nAnd so on it goes." * 12,
    "gopher.duplicate_line_characters": EN + "\n" + "\n".join(EN.split("\n")[:2]),
    "c4.lorem_ipsum": EN + " Lorem Ipsum dolor.",
    "c4.curly_bracket": EN + " if (x) { y }.",
    "c4.sentences": EN.replace(".", ",").replace("\n", " ")[:-1] + ".",
    "fineweb.line_punctuation": EN.replace(".\n", "\n")[:-1],
    "fineweb.short_lines": EN + "".join(f"\nIt is {i} and more." for i in range(30)),
    "fineweb.duplicate_line_characters": EN + "\n" + EN.split("\n")[0][-60:] + "\n" + EN.split("\n")[0][-60:],
    "fineweb.newlines": EN + "".join(f"\n{' '.join(words(3, 10, seed))}." for seed in range(1500)),
}


@pytest.mark.parametrize("rule", sorted(BROKEN))
def test_a_document_that_breaks_a_rule_is_dropped_for_it_and_passes_without_it(rule):
    assert reason(QUALITY, BROKEN[rule]) == rule
    without = Quality(QualityConfig(off=("c4.line_punctuation", rule)))
    assert reason(without, BROKEN[rule]) != rule


CHINESE = {
    "gopher.short": ZH[:60],
    "gopher.ellipsis_lines": ZH.replace("。\n", "……\n"),
    "gopher.bullet_lines": "\n".join("· " + chinese(1, seed) for seed in range(20)),
    "gopher.stop_words": ZH.translate(str.maketrans("的是了", "弓早力")).translate({ord(c): "弓" for c in "在和不有为這这也之與与"}),
    "gopher.duplicate_10_gram": ZH + ZH[:20].join(chinese(1, seed) for seed in range(100, 108)),
    "c4.sentences": ZH.replace("。", "，").replace("\n", ""),
    "fineweb.line_punctuation": ZH.replace("。\n", "\n")[:-1],
    "fineweb.short_lines": ZH + "".join(f"\n{chinese(1, seed)[:7]}。" for seed in range(40, 70)),
}


@pytest.mark.parametrize("rule", sorted(CHINESE))
def test_rules_count_characters_in_chinese(rule):
    assert reason(QUALITY, CHINESE[rule]) == rule


def test_paragraphs_that_stand_twice():
    gopher = Quality(QualityConfig(off=("gopher.duplicate_lines", "gopher.duplicate_line_characters", "c4", "fineweb")))
    paragraphs = [english(4, seed) for seed in range(6)]
    assert reason(gopher, "\n\n".join(paragraphs + paragraphs[:2])) == "gopher.duplicate_paragraph_characters"
    assert reason(gopher, "\n\n".join([*paragraphs, *["Short one."] * 6])) == "gopher.duplicate_paragraphs"
    # The same lines without blank ones between them are one paragraph.
    assert not reason(gopher, "\n".join([*paragraphs, *["Short one."] * 6])).startswith("gopher.duplicate_paragraph")


def test_a_mean_word_length_is_not_asked_of_chinese():
    assert reason(QUALITY, ZH) == ""
    assert reason(QUALITY, ZH.replace("，", "incomprehensibilities")) == ""


def test_stop_words_are_those_of_the_language_that_is_known():
    assert reason(QUALITY, EN, language="en") == ""
    assert reason(QUALITY, EN, language="zh") == "gopher.stop_words"
    assert reason(QUALITY, EN, language="fr") == ""  # there is no table for it


def test_a_stop_word_that_cannot_match_is_refused():
    with pytest.raises(ConfigError, match="我们"):
        Quality(QualityConfig(stop_words={"zh": ("我们",)}))


def test_c4_takes_lines_out_and_counts_them():
    good = lines(8)
    text = "\n".join([good[0], "Please enable Javascript to see this page.", good[1], "Our PRIVACY policy has changed.", "Home", *good[2:]])
    document = kept(QUALITY, text)
    assert document.text == "\n".join(good)
    assert document.metadata["counts"] == {"c4.javascript": 1, "c4.policy": 1, "c4.line_words": 1}
    assert kept(QUALITY, ZH + "\n本站的隐私政策如下所示。").text == ZH


def test_c4_takes_citations_out():
    document = kept(QUALITY, EN.replace(", but", "[12], but", 2) + " That is so.[citation needed]")
    assert document.text == EN + " That is so."
    assert document.metadata["counts"] == {"c4.citation": 3}


def test_c4_takes_lines_with_endless_words_out_but_chinese_has_none():
    assert kept(QUALITY, EN + "\nAnd " + "x" * 1001 + " here.").text == EN
    long_line = chinese(60).replace("\n", "")
    assert len(long_line) > 1000
    assert kept(QUALITY, long_line).text == long_line


def test_lines_must_end_like_sentences_only_if_asked():
    text = EN + "\nthis line has no end"
    assert kept(QUALITY, text).text == text
    assert kept(Quality(QualityConfig(off=())), text).text == EN
    assert kept(Quality(QualityConfig(off=())), ZH + "\n这一行的后面没有句号").text == ZH


def test_a_dropped_document_keeps_its_text_as_evidence():
    text = "Home\n" + BROKEN["fineweb.line_punctuation"]
    (answer,) = run(QUALITY, text)
    assert isinstance(answer, Dropped)
    assert answer.document.text == text
    assert answer.detail.endswith("< 0.12")


def test_documents_are_judged_alike_alone_and_together():
    texts = [*BROKEN.values(), *CHINESE.values(), EN, "", "\n", ZH, "#", "a" * 300_000]
    together = run(QUALITY, *texts)
    for text, answer in zip(texts, together, strict=True):
        (alone,) = run(QUALITY, text)
        assert type(alone) is type(answer)
        if isinstance(alone, Dropped) and isinstance(answer, Dropped):
            assert (alone.reason, alone.detail) == (answer.reason, answer.detail)
        else:
            assert isinstance(alone, Document) and isinstance(answer, Document)
            assert (alone.text, alone.metadata) == (answer.text, answer.metadata)


def test_a_huge_document_is_not_read():
    quality = Quality(QualityConfig(max_characters=10_000))
    assert reason(quality, "x " * 10_000) == "gopher.long"
    assert reason(Quality(QualityConfig(gopher=Gopher(max_words=200))), EN) == "gopher.long"


def test_families_and_rules_are_switched_off_by_name():
    assert not any(QualityConfig(off=("gopher", "c4", "fineweb")).asks(rule) for rule in QUALITY_RULES)
    assert reason(Quality(QualityConfig(off=("gopher", "c4", "fineweb"))), "x") == ""
    with pytest.raises(ConfigError, match=r"gopher\.shrt"):
        QualityConfig.parse({"off": ["gopher.shrt"]})
