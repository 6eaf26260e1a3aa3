"""Batches are encoded as the reference does, whoever does it, and a library that differs is not used."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemel.config.errors import RequestError, UnsupportedError
from gemel.tokenizer import encode
from gemel.tokenizer.encode import Encoder, probes
from gemel.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.corpus import chinese, english, trained
from tests.tokenizer.shapes import NAMED, SPECIAL, byte_level_library, sentencepiece_library

TEXTS = ["", "Hello world 12345", "我们学习。", *SPECIAL, "a <|im_end|> b\n", *english(), *chinese(20)]


@pytest.mark.parametrize("library", ["fastokens", "tokenizers"])
def test_ids_are_those_of_the_tokenizer(library: encode.Library) -> None:
    encoder = Encoder(trained(), TEXTS, library)
    assert encoder.library == library
    got = encoder(TEXTS)
    assert [array.dtype for array in got] == [np.uint32] * len(TEXTS)
    assert [array.tolist() for array in got] == [trained().encode(text) for text in TEXTS]
    assert encoder([]) == []


@given(texts=st.lists(st.text(max_size=40), max_size=5))
@settings(max_examples=100, deadline=None)
def test_so_are_those_of_any_text(texts: list[str]) -> None:
    fast = _encoder()
    assert [array.tolist() for array in fast(texts)] == [trained().encode(text) for text in texts]


def _encoder() -> Encoder:
    if not hasattr(_encoder, "made"):
        _encoder.made = Encoder(trained(), library="fastokens")  # type: ignore[attr-defined]
    return _encoder.made  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("library", [byte_level_library(), sentencepiece_library("prepend"), sentencepiece_library("first")])
def test_other_kinds_of_tokenizer_are_encoded_right_or_not_by_the_fast_library(library: object) -> None:
    tokenizer = Tokenizer(library, NAMED)
    encoder = Encoder(tokenizer)
    assert [array.tolist() for array in encoder(TEXTS)] == [tokenizer.encode(text, add_bos=False) for text in TEXTS]
    assert encoder.reason


def test_two_splits_in_one_are_the_same_splits(smollm2: object) -> None:
    tokenizer = Tokenizer.load(smollm2)  # type: ignore[arg-type]
    encoder = Encoder(tokenizer, english())
    assert encoder.library == "fastokens"
    texts = [*probes(tokenizer), " 1", "  1 2", "a  1", "  ٣٤ Ⅻ", "\n\n12\n 3", "x \u3000 9", *english()]
    assert [array.tolist() for array in encoder(texts)] == [tokenizer.encode(text, add_bos=False) for text in texts]


def test_bytes_that_a_vocabulary_lacks_go_to_the_reference(smollm2: object) -> None:
    tokenizer = Tokenizer.load(smollm2)  # type: ignore[arg-type]
    texts = ["before", "a\U00050000b", "after"]
    got = Encoder(tokenizer, library="fastokens")(texts)
    assert [array.tolist() for array in got] == [tokenizer.encode(text) for text in texts]


def test_a_library_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = encode._Fast.encode

    def wrong(self: encode._Fast, texts: list[str]) -> tuple[encode.Ids, object]:
        ids, ends = right(self, texts)
        return np.where(ids == trained().encode("字")[0], 5, ids).astype(np.uint32), ends

    monkeypatch.setattr(encode._Fast, "encode", wrong)
    encoder = Encoder(trained())
    assert encoder.library == "tokenizers"
    assert "differs from tokenizers on" in encoder.reason
    assert encoder(["字"])[0].tolist() == trained().encode("字")
    with pytest.raises(UnsupportedError, match="take 'auto'"):
        Encoder(trained(), library="fastokens")


def test_samples_of_the_caller_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = "a very particular sample " * 200
    assert sample[:2000] in probes(trained(), [sample])
    assert sample[2000:4000] in probes(trained(), [sample])
    assert len(probes(trained(), ["x" * 2000] * 5000)) < len(probes(trained())) + 1001


def test_without_the_fast_library_the_reference_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    encoder = Encoder(trained())
    assert (encoder.library, encoder.reason) == ("tokenizers", "fastokens is not installed: pip install 'gemel[data]'")


@pytest.mark.parametrize("library", ["fastokens", "tokenizers"])
def test_text_that_is_not_unicode_is_named(library: encode.Library) -> None:
    with pytest.raises(RequestError, match=r"text 1 has an unpaired surrogate \(U\+DC00\) at character 2"):
        Encoder(trained(), library=library)(["fine", "ab\udc00"])
