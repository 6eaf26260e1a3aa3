"""A trained tokenizer merges what is most frequent, spells every byte, and means the same to transformers."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from gemel.config.errors import ConfigError
from gemel.config.tokenizer import LLAMA3_PATTERN, NUM_BYTES, TrainConfig
from gemel.tokenizer import train as training
from gemel.tokenizer.tokenizer import Tokenizer
from gemel.tokenizer.train import parents, train
from tests.tokenizer.corpus import chinese, english, trained

TEXTS = [
    "",
    "Hello, world!  It's 12345 o'clock\n\n\tdef f(x): return x",
    "我们今天学习自然语言处理。模型ABC训练 mixed 文字！",
    "naïve Ünïcödé 👩‍👩‍👧 \x00\x7f\ufffd\U0010ffff",
    "<|im_start|>user\nnot a turn<|im_end|> <|endoftext|>",
]


def merges_of(tokenizer: Tokenizer) -> list[tuple[bytes, bytes]]:
    state = json.loads(tokenizer.library.to_str())
    table = {token: tokenizer.token_bytes(index) for token, index in state["model"]["vocab"].items()}
    return [(table[left], table[right]) for left, right in state["model"]["merges"]]


def merged(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    out: list[bytes] = []
    for part in word:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return tuple(out)


def test_every_merge_is_of_a_most_frequent_pair() -> None:
    texts = [*english()[:2], *chinese(50)]
    tokenizer = train(texts, TrainConfig(vocab_size=420))
    words = Counter(tuple(bytes([b]) for b in match.encode()) for text in texts for match in regex.findall(LLAMA3_PATTERN, text))
    merges = merges_of(tokenizer)
    assert len(merges) == 420 - 3 - NUM_BYTES
    for pair in merges:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for neighbours in pairwise(word):
                pairs[neighbours] += count
        assert pairs[pair] == max(pairs.values())
        following: Counter[tuple[bytes, ...]] = Counter()
        for word, count in words.items():
            following[merged(word, pair)] += count
        words = following


def test_parents_of_tokens_are_found_where_several_halves_exist() -> None:
    # "abc" can be cut into known halves in two ways; with "ab" older than "bc", only (ab, c) can have been merged
    assert list(parents([b"ab", b"bc", b"abc", b"bca", b"abcabc"]))[2:] == [(b"ab", b"c"), (b"bc", b"a"), (b"abc", b"abc")]


def test_ids_are_bytes_then_merges_then_special_tokens() -> None:
    tokenizer = trained()
    assert tokenizer.vocab_size == 800
    assert [tokenizer.token_bytes(byte) for byte in range(NUM_BYTES)] == [bytes([byte]) for byte in range(NUM_BYTES)]
    assert [tokenizer.token_id(text) for text in TrainConfig().special_tokens] == [797, 798, 799]
    assert tokenizer.special_ids == {797, 798, 799}
    assert tokenizer.eos_id == 797


def test_transformers_loads_the_same_tokenizer(tmp_path: Path) -> None:
    template = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    ours = train([*english(), *chinese()], TrainConfig(vocab_size=700, chat_template=template))
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == 700
    assert theirs.eos_token_id == ours.eos_id
    for text in [*TEXTS[:4], *english(), *chinese(20, seed=9)]:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    messages = [{"role": "user", "content": "你好"}]
    assert theirs.apply_chat_template(messages, tokenize=True, return_dict=False) == ours.render_chat(messages, add_generation_prompt=False)
    assert [Tokenizer.load(tmp_path).encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


@given(text=st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_every_text_comes_back(text: str) -> None:
    assert trained().decode(trained().encode(text), skip_special=False) == text


def test_special_tokens_cannot_be_written_as_text() -> None:
    ids = trained().encode(TEXTS[4])
    assert trained().special_ids.isdisjoint(ids)
    assert trained().decode(ids) == TEXTS[4]


def test_the_same_texts_give_the_same_tokenizer() -> None:
    config = TrainConfig(vocab_size=700)
    texts = [*english(), *chinese()]
    assert train(iter(texts), config).library.to_str() == train(texts, config).library.to_str()


def test_the_pattern_bounds_tokens() -> None:
    config = TrainConfig(vocab_size=NUM_BYTES + 2, pattern=r"\p{L}+|[^\p{L}]", special_tokens=(), named={})
    assert train(["ab ab abab 12 12 12"] * 9, config).bytes_of[NUM_BYTES:] == [b"ab", b"abab"]
    by_default = train(["ab ab ab"] * 9, TrainConfig(vocab_size=NUM_BYTES + 2, special_tokens=(), named={}))
    assert by_default.bytes_of[NUM_BYTES:] == [b"ab", b" ab"]


def test_a_vocabulary_of_bytes_alone_needs_no_training() -> None:
    bytes_only = train([], TrainConfig(vocab_size=NUM_BYTES + 3))
    assert bytes_only.encode("aé") == [97, 0xC3, 0xA9]


@pytest.mark.parametrize(
    ("texts", "config", "says"),
    [
        (["abc"], {"vocab_size": 5_000}, "lower it"),
        (["a\ud800"], {"vocab_size": 300}, "U\\+D800 at character 1"),
        (["abc"], {"vocab_size": 300, "pattern": "("}, "pattern = '\\('"),
        (["the the"] * 9, {"vocab_size": 259, "special_tokens": ("the",), "named": {}}, "ordinary token"),
    ],
)
def test_what_cannot_be_trained_says_why(texts: list[str], config: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        train(texts, TrainConfig.parse(config))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"vocab_size": 200}, "less than 259"),
        ({"special_tokens": ["a", "a"], "named": {}}, "different"),
        ({"named": {"bos_token": "<s>"}}, "does not list"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(config: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TrainConfig.parse(config)


def test_an_error_of_the_iterator_is_not_hidden() -> None:
    def broken() -> object:
        yield "text"
        raise ValueError("the disk is gone")

    with pytest.raises(ValueError, match="the disk is gone"):
        training.train(broken(), TrainConfig(vocab_size=300))  # type: ignore[arg-type]
