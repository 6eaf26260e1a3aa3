"""Counts of a fertility report, checked by hand."""

from __future__ import annotations

import pytest

from gemel.tokenizer.encode import Encoder
from gemel.tokenizer.fertility import measure, num_words
from gemel.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.corpus import chinese, trained
from tests.tokenizer.shapes import sentencepiece_library


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, world - it's 3 o'clock.", 5),
        ("我们学习NLP。", 5),  # 我 们 学 习 NLP
        ("ひらがな カタカナ", 8),
        ("नमस्ते दुनिया", 2),
        ("... !!", 0),
        ("", 0),
    ],
)
def test_words(text: str, words: int) -> None:
    assert num_words(text) == words


def test_counts_of_a_byte_level_tokenizer() -> None:
    tokenizer = trained()
    texts = ["我们学习", "é 龘"]  # the last character is in no merge, so that it takes three tokens of a byte each
    found = measure("zh", texts, tokenizer, Encoder(tokenizer))
    ids = [tokenizer.encode(text) for text in texts]
    assert len(tokenizer.encode("龘")) == 3
    assert (found.num_texts, found.num_chars, found.num_bytes, found.num_words) == (2, 7, 18, 6)
    assert found.num_tokens == sum(map(len, ids))
    assert found.num_fallback == 2 + 3
    assert found.bytes_per_token == 18 / found.num_tokens
    assert found.tokens_per_word * found.words_per_token == 1
    assert found.as_json()["language"] == "zh"


def test_text_that_was_trained_on_needs_fewer_tokens() -> None:
    encoder = Encoder(trained())
    known = measure("zh", chinese(50, seed=3), trained(), encoder)
    unknown = measure("ko", ["모든 인간은 태어날 때부터 자유롭고 존엄하다"], trained(), encoder)
    assert known.fallback_share < 0.1
    assert unknown.fallback_share > 0.9
    assert known.chars_per_token > 4 * unknown.chars_per_token


def test_unknown_tokens_count_as_fallback() -> None:
    library = sentencepiece_library("first")
    tokenizer = Tokenizer(library)
    found = measure("en", ["the é"], tokenizer, Encoder(tokenizer))
    assert found.num_fallback == 2  # é is two byte tokens there
    assert measure("en", [], tokenizer, Encoder(tokenizer)).tokens_per_word == 0
