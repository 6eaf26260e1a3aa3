"""Shares of repeated sequences against a plain loop over words, and bounds that never hide a document that breaks a rule."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from gemel.config.data.rules import Gopher
from gemel.data.steps.repetition import DUPLICATE, TOP, first_repeats
from gemel.data.steps.segment import Segments

RULES = [(f"gopher.top_{n}_gram", n) for n in TOP] + [(f"gopher.duplicate_{n}_gram", n) for n in DUPLICATE]


def top(words: list[str], n: int, gap: int) -> int:
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    if not counts or counts.most_common(1)[0][1] < 2:
        return 0
    gram, count = counts.most_common(1)[0]
    return count * (sum(map(len, gram)) + gap * (n - 1))


def duplicate(words: list[str], n: int) -> int:
    seen, characters, i = set(), 0, 0
    while i + n <= len(words):
        gram = tuple(words[i : i + n])
        if gram in seen:
            characters += sum(map(len, gram))
            i += n
        else:
            seen.add(gram)
            i += 1
    return characters


def reference(words: list[str], text: str, gap: int, scale: float, gopher: Gopher) -> tuple[str, float] | None:
    limits = (*gopher.max_top_n_gram, *gopher.max_duplicate_n_gram)
    for (rule, n), limit in zip(RULES, limits, strict=True):
        width = round(n * scale)
        share = (top(words, width, gap) if "top" in rule else duplicate(words, width)) / len(text)
        if share > limit:
            return rule, share
    return None


def repetitive(draw: random.Random, alphabet: list[str]) -> list[str]:
    """Words of which some runs stand several times."""
    words: list[str] = []
    while len(words) < 200:
        if words and draw.random() < 0.15:
            start = draw.randrange(len(words))
            words += words[start : start + draw.randint(2, 14)]
        else:
            words += draw.choices(alphabet, k=draw.randint(1, 12))
    return words


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("script", ["spaced", "unspaced"])
def test_first_repeats_are_those_of_the_plain_loop(script, seed):
    draw, gopher = random.Random(seed), Gopher()
    vocabulary = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 9))) for _ in range(draw.choice([30, 300, 3000]))]
    alphabet = vocabulary if script == "spaced" else [chr(0x4E00 + i) for i in range(2000)]
    documents = [repetitive(draw, alphabet) for _ in range(40)]
    separator, scale = (" ", 1.0) if script == "spaced" else ("", 1.8)
    texts = [separator.join(words) for words in documents]
    lengths = np.array([len(text) for text in texts])
    found = first_repeats(Segments(texts), np.ones(40, np.bool_), lengths, gopher, {rule for rule, _ in RULES}, 1.8)
    expected = [reference(words, text, len(separator), scale, gopher) for words, text in zip(documents, texts, strict=True)]
    assert [repeat and (repeat.rule, repeat.share) for repeat in found] == expected
    assert 0 < sum(one is not None for one in expected) < 40 or script == "spaced"


def test_rules_that_are_not_asked_are_passed_over():
    text = "one two three four five six " * 20
    for asked in ({"gopher.top_3_gram"}, {"gopher.duplicate_8_gram"}):
        (repeat,) = first_repeats(Segments([text]), np.ones(1, np.bool_), np.array([len(text)]), Gopher(), asked, 1.8)
        assert repeat is not None and repeat.rule in asked


def test_documents_do_not_repeat_one_another():
    texts = ["one two three four five six seven eight nine ten eleven twelve"] * 5
    found = first_repeats(Segments(texts), np.ones(5, np.bool_), np.array([len(t) for t in texts]), Gopher(), {r for r, _ in RULES}, 1.8)
    assert found == [None] * 5
