"""New tokens are used, and text without them is encoded as before."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from gemel.config.errors import ConfigError, UnsupportedError
from gemel.config.tokenizer import ExtendConfig
from gemel.tokenizer.encode import Encoder
from gemel.tokenizer.extend import Extension, describe, extend
from gemel.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.corpus import chinese, english, trained
from tests.tokenizer.shapes import NAMED, byte_level_library, sentencepiece_library

GIVEN = ExtendConfig(tokens=("pneumothorax", "心肌梗死", " myocardial infarction"), special_tokens=("<|tool|>",))
DOMAIN = [
    "心肌梗死患者的心电图检查。",
    "患者心电图正常，没有心肌梗死。",
    "The patient's electrocardiogram shows myocardial infarction.",
] * 20
LEARN = ExtendConfig(learn=40, min_count=5)


def given_tokens() -> Extension:
    return extend(trained(), GIVEN)


def learnt_tokens() -> Extension:
    return extend(trained(), LEARN, DOMAIN)


def test_given_tokens_are_one_token_wherever_they_stand() -> None:
    new = given_tokens().tokenizer
    first = trained().vocab_size
    assert [new.token_id(text) for text in GIVEN.tokens] == [first, first + 1, first + 2]
    assert new.encode("心肌梗死") == [first + 1]
    assert new.encode("x心肌梗死y") == [*trained().encode("x"), first + 1, *trained().encode("y")]
    assert (
        new.decode(new.encode("a pneumothorax, 急性心肌梗死 and myocardial infarction"))
        == "a pneumothorax, 急性心肌梗死 and myocardial infarction"
    )
    assert first + 3 in new.special_ids
    assert first + 3 not in new.encode("<|tool|>")


def test_given_tokens_are_what_add_tokens_of_transformers_makes(tmp_path: Path) -> None:
    trained().save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_tokens(list(GIVEN.tokens))
    theirs.add_tokens(["<|tool|>"], special_tokens=True)
    new = given_tokens().tokenizer
    for text in ["pneumothorax", "急性心肌梗死。", "a myocardial infarction", "pneumo thorax", *english()]:
        assert new.encode(text) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("extension", [given_tokens, learnt_tokens])
@given(
    text=st.lists(
        st.sampled_from(["心", "肌", "梗死", "患者", "the", " patient", "cardio", "gram", "pneumo", "我们", "\n", " "])
        | st.text(max_size=4)
    ).map("".join)
)
@settings(max_examples=150, deadline=None)
def test_text_without_new_tokens_is_encoded_as_before(extension: object, text: str) -> None:
    new = (_given if extension is given_tokens else _learnt).tokenizer
    ids = new.encode(text)
    assert new.decode(ids, skip_special=False) == text
    if max(ids, default=0) < trained().vocab_size:
        assert ids == trained().encode(text)


_given, _learnt = given_tokens(), learnt_tokens()


def test_learnt_tokens_shorten_text_of_the_domain() -> None:
    new, first = _learnt.tokenizer, trained().vocab_size
    assert new.vocab_size == first + 40
    assert new.token_bytes(first + 39)
    before, after = (sum(len(tokenizer.encode(text)) for text in DOMAIN) for tokenizer in (trained(), new))
    assert after < 0.5 * before
    assert "".join(describe(trained(), _learnt)[0]["pieces"]) == describe(trained(), _learnt)[0]["text"]


def test_the_first_learnt_token_is_the_most_frequent_pair() -> None:
    sequences = [trained().library.encode(text).ids for text in DOMAIN]
    boundaries = trained().library.pre_tokenizer
    counts: dict[tuple[int, ...], int] = {}
    for text in DOMAIN:
        for word, _ in boundaries.pre_tokenize_str(text):
            for pair in pairwise([token.id for token in trained().library.model.tokenize(word)]):
                counts[pair] = counts.get(pair, 0) + 1
    assert sequences
    assert counts[_learnt.pieces[trained().vocab_size]] == max(counts.values())


@pytest.mark.parametrize("extension", [_given, _learnt], ids=["given", "learnt"])
def test_pieces_spell_the_new_tokens(extension: Extension) -> None:
    assert list(extension.pieces) == list(range(trained().vocab_size, extension.tokenizer.vocab_size))
    for index, pieces in extension.pieces.items():
        assert b"".join(map(trained().token_bytes, pieces)) == extension.tokenizer.token_bytes(index)
        assert all(piece < trained().vocab_size for piece in pieces)


@pytest.mark.parametrize("extension", [_given, _learnt], ids=["given", "learnt"])
def test_saved_it_means_the_same_to_transformers_and_the_fast_encoder(extension: Extension, tmp_path: Path) -> None:
    new = extension.tokenizer
    new.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*DOMAIN[:3], "a pneumothorax", *english(), *chinese(10)]
    assert [theirs.encode(text, add_special_tokens=False) for text in texts] == [new.encode(text) for text in texts]
    fast = Encoder(Tokenizer.load(tmp_path), texts, "fastokens")
    assert [ids.tolist() for ids in fast(texts)] == [new.encode(text) for text in texts]


def test_added_tokens_outside_of_the_vocabulary_keep_their_ids() -> None:
    # as in Llama 3: special tokens are numbered behind the vocabulary, and a library would number them anew when it grows
    state = json.loads(trained().library.to_str())
    for token in state["added_tokens"]:
        del state["model"]["vocab"][token["content"]]
    import tokenizers

    old = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)), trained().named)
    assert old.special_ids == trained().special_ids
    new = extend(old, LEARN, DOMAIN).tokenizer
    assert new.special_ids == old.special_ids
    assert new.eos_id == old.eos_id
    assert new.encode(DOMAIN[0]) == _learnt.tokenizer.encode(DOMAIN[0])


def test_given_and_learnt_together() -> None:
    both = extend(trained(), ExtendConfig(tokens=("心肌梗死", "心"), learn=40, min_count=5), DOMAIN)
    assert both.tokenizer.encode("心肌梗死") == [trained().vocab_size]
    assert both.tokenizer.vocab_size == trained().vocab_size + 42 - len(both.known)
    assert both.tokenizer.decode(both.tokenizer.encode(DOMAIN[0])) == DOMAIN[0]


def test_whole_words_are_not_found_inside_of_others() -> None:
    new = extend(trained(), ExtendConfig(tokens=("tho",), whole_words=True)).tokenizer
    assert trained().vocab_size in new.encode("a tho!")
    assert trained().vocab_size not in new.encode("method those")


def test_what_is_one_token_already_is_not_added() -> None:
    extension = extend(trained(), ExtendConfig(tokens=("学习", "e", "pneumothorax"), special_tokens=("<|im_end|>",)))
    assert extension.known == ("学习", "e", "<|im_end|>")
    assert extension.tokenizer.vocab_size == trained().vocab_size + 1


@pytest.mark.parametrize(("token", "says"), [("Ödem", "decoded wrong"), ("ĠtheĠ", "decoded wrong")])
def test_tokens_that_would_come_back_wrong_are_refused(token: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        extend(trained(), ExtendConfig(tokens=(token,)))
    way_out = extend(trained(), ExtendConfig(tokens=(f" {token}",))).tokenizer
    assert way_out.decode(way_out.encode(f"a {token}")) == f"a {token}"


def test_too_little_text_to_learn_from_says_how_far_it_went() -> None:
    with pytest.raises(ConfigError, match=r"has only \d+ new tokens that occur min_count = 5 times"):
        extend(trained(), ExtendConfig(learn=5000, min_count=5), DOMAIN)


def test_nothing_to_add_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to add"):
        ExtendConfig.parse({})


def test_sentencepiece_with_a_space_before_every_stretch_is_refused_and_others_work() -> None:
    with pytest.raises(UnsupportedError, match="extend a byte-level tokenizer"):
        extend(Tokenizer(sentencepiece_library("prepend"), NAMED), ExtendConfig(tokens=("abc",)))
    with pytest.raises(UnsupportedError, match="go on learning"):
        extend(Tokenizer(sentencepiece_library("first"), NAMED), LEARN, DOMAIN)
    old = Tokenizer(sentencepiece_library("first"), NAMED)
    new = extend(old, ExtendConfig(tokens=("abc",))).tokenizer
    assert new.encode("in the thing") == old.encode("in the thing")
    assert new.decode(new.encode("in abcthe")) == "in abcthe"


def test_other_byte_level_pipelines_are_extended_too() -> None:
    old = Tokenizer(byte_level_library(), NAMED)
    new = extend(old, ExtendConfig(learn=10, min_count=2), DOMAIN).tokenizer
    assert new.decode(new.encode(DOMAIN[0])) == DOMAIN[0]
    assert new.special_ids == old.special_ids
