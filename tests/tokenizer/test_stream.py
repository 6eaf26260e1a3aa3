from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemel.tokenizer.stream import Detokenizer
from tests.tokenizer.shapes import byte_level_library, sentencepiece_library, tokenizer

BYTE_LEVEL = byte_level_library()
IDS = st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=60)


def cut(tokens: list[int], cuts: list[int]) -> list[list[int]]:
    edges = [0, *sorted({c % (len(tokens) + 1) for c in cuts}), len(tokens)]
    return [tokens[a:b] for a, b in pairwise(edges)]


@given(IDS, st.lists(st.integers(0, 1000), max_size=20), st.booleans())
def test_any_ids_in_any_portions_give_what_the_library_decodes(ids: list[int], cuts: list[int], skip: bool) -> None:
    ours = tokenizer()
    stream = ours.detokenizer(skip_special=skip)
    streamed = "".join(stream.push(part) for part in cut(ids, cuts)) + stream.finish()
    assert streamed == ours.decode(ids, skip_special=skip) == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)


@given(st.text(max_size=40))
def test_whole_characters_come_as_soon_as_their_last_byte(text: str) -> None:
    stream = Detokenizer([bytes([byte]) for byte in range(256)])
    said = ""
    for character in text.encode("utf-8", "surrogatepass").decode("utf-8", "replace"):
        pieces = [stream.push([byte]) for byte in character.encode()]
        assert pieces[:-1] == [""] * (len(pieces) - 1)
        assert pieces[-1] == character
        said += pieces[-1]
    assert stream.finish() == ""


def test_an_unfinished_character_is_replaced_at_the_end_only() -> None:
    stream = Detokenizer([bytes([byte]) for byte in range(256)])
    assert stream.push("é".encode()[:1]) == ""
    assert stream.finish() == "\ufffd"
    assert Detokenizer([b"\xff", b"a"]).push([0, 1]) == "\ufffda"


def test_ids_without_a_token_have_no_text() -> None:
    ours = tokenizer()
    assert ours.decode([ours.vocab_size, ours.vocab_size + 7, *ours.encode("hi")]) == "hi"
    assert ours.token_bytes(ours.vocab_size) == b""


@pytest.mark.parametrize("prefix", ["prepend", "first", "always"])
@given(text=st.text(alphabet="abthein .é😀", max_size=30))
def test_sentencepiece_text_comes_back(prefix: str, text: str) -> None:
    library, ours = sentencepiece_library(prefix), tokenizer("chatml", prefix)
    ids = ours.encode(text, add_bos=False)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == library.decode(ids)
    if prefix == "prepend" or not text.startswith(" "):  # Metaspace adds no space where there is one, so one is lost
        assert ours.decode(ids) == text


def test_a_continuation_keeps_the_space_before_its_first_word() -> None:
    ours = tokenizer("chatml", "prepend")
    ids = ours.encode("the in", add_bos=False)
    assert ours.decode(ids) == "the in"
    assert ours.detokenizer().push(ids) == ours.decode(ids, continues=True) == " the in"
