from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from gemel.config.errors import RequestError, UnsupportedError
from gemel.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.shapes import NAMED, PLAIN_ADDED, SPECIAL, byte_level_library, sentencepiece_library, tokenizer

MIXED = st.lists(
    st.sampled_from(SPECIAL + PLAIN_ADDED + ["PAD", "\u2581"]) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=8
).map("".join)


def spelling_library(ignore_merges: bool) -> tokenizers.Tokenizer:
    """A vocabulary whose ordinary entries include the text of a special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "PA", "PAD"])}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("P", "A"), ("PA", "D")], ignore_merges=ignore_merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["PAD", "<s>"])
    return library


@given(MIXED)
@settings(max_examples=300)
def test_text_never_becomes_special_tokens_and_comes_back(text: str) -> None:
    ours = tokenizer()
    ids = ours.encode(text)
    assert not ours.special_ids & set(ids)
    assert ours.decode(ids, skip_special=False) == text == b"".join(map(ours.token_bytes, ids)).decode()


@pytest.mark.parametrize("ignore_merges", [False, True])
@given(MIXED)
def test_nor_when_the_vocabulary_spells_a_special_token(ignore_merges: bool, text: str) -> None:
    ours = Tokenizer(spelling_library(ignore_merges))
    ids = ours.encode(text)
    assert not ours.special_ids & set(ids)
    assert ours.decode(ids) == text


@given(MIXED)
def test_nor_in_sentencepiece(text: str) -> None:
    ours = tokenizer("chatml", "prepend")
    ids = ours.encode(text, add_bos=False)
    assert not ours.special_ids & set(ids)
    assert ours.decode(ids, skip_special=False) == text.replace("\u2581", " ")


def test_added_tokens_that_are_not_special_are_still_found() -> None:
    ours, library = tokenizer(), byte_level_library()
    text = "a <tool_call>b</tool_call> <think>"
    assert ours.encode(text) == library.encode(text).ids
    assert {library.token_to_id("<tool_call>"), library.token_to_id("<think>")} <= set(ours.encode(text))


def test_tokens_that_end_a_text_are_special_even_where_the_vocabulary_does_not_say_so() -> None:
    library = byte_level_library()
    library.add_tokens([AddedToken("<end>", special=False), AddedToken("<stop>", special=False)])
    stop = library.token_to_id("<stop>")
    ours = Tokenizer(library, {"eos_token": "<end>"}, eos_ids=[stop])
    assert ours.eos_ids == (library.token_to_id("<end>"), stop)
    assert not set(ours.eos_ids) & set(ours.encode("a<end>b<stop>"))
    assert ours.decode(ours.encode("a<end>b<stop>")) == "a<end>b<stop>"
    assert ours.decode([stop]) == ""


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_unpaired_surrogates_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer().encode(text)


def test_every_byte_has_its_token() -> None:
    ours = tokenizer()
    assert {bytes([byte]) for byte in range(256)} <= set(ours.bytes_of)
    assert ours.token_bytes(ours.encode("Ġ")[0]) == "Ġ".encode()[:1]
    space = ours.token_id("<|a b|>")
    assert space is not None
    assert ours.token_bytes(space) == b"<|a b|>"
    assert tokenizer("chatml", "prepend").token_bytes(3 + 0xAB) == b"\xab"


# --- BOS -----------------------------------------------------------------------------------------------------------------------------


def test_bos_is_put_where_the_checkpoint_asks_for_it_and_once() -> None:
    ours = tokenizer("llama3", "prepend")
    assert ours.bos_id is not None
    assert ours.encode("the")[:1] == [ours.bos_id]
    assert ours.encode("the", add_bos=False) == ours.encode("the")[1:]
    assert ours.encode("<s>the").count(ours.bos_id) == 1
    assert ours.render_chat([{"role": "user", "content": "<s>the"}]).count(ours.bos_id) == 1
    assert tokenizer("chatml", "prepend").render_chat([{"role": "user", "content": "the"}]).count(ours.bos_id) == 0


def test_an_explicit_choice_wins_over_the_post_processor() -> None:
    assert Tokenizer(sentencepiece_library(), NAMED, add_bos=False).encode("the") == tokenizer("chatml", "prepend").encode("the")[1:]
    explicit = Tokenizer(byte_level_library(), NAMED, add_bos=True)
    assert explicit.encode("the") == [explicit.bos_id, *tokenizer().encode("the")]
    assert Tokenizer(byte_level_library(), {}, add_bos=True).encode("the") == tokenizer().encode("the")


def test_an_end_token_that_the_checkpoint_appends_is_not_part_of_a_prompt() -> None:
    library = byte_level_library()
    names = [(token, library.token_to_id(token)) for token in ("<s>", "</s>")]
    library.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=names)
    ours = Tokenizer(library, NAMED)
    assert ours.encode("the") == [ours.bos_id, *tokenizer().encode("the")]


def test_truncation_and_padding_that_the_file_carries_are_off() -> None:
    library = byte_level_library()
    library.enable_truncation(3)
    library.enable_padding(length=50)
    assert Tokenizer(library).encode("The quick brown fox " * 9) == tokenizer().encode("The quick brown fox " * 9)


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.Sequence([decoders.Replace("a", "b")])])
def test_decoders_that_are_not_bytes_are_refused(decoder: decoders.Decoder | None) -> None:
    library = byte_level_library()
    library.decoder = decoder
    with pytest.raises(UnsupportedError, match="decoder"):
        Tokenizer(library)


def test_a_special_token_of_one_character_cannot_be_written() -> None:
    library = spelling_library(ignore_merges=False)
    library.add_special_tokens(["P"])
    with pytest.raises(RequestError, match="'P' is a special token"):
        Tokenizer(library).encode("OPEN")
