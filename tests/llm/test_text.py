from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemel.config.sampling import SamplingParams
from gemel.engine.request import FinishReason, Output, TokenLogprob
from gemel.llm.text import RequestText, TextStream
from gemel.tokenizer.stream import Detokenizer
from gemel.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.shapes import byte_level_library

PIECES = [b"a", b"b", b"ab", b"ba", b"aba", b"\xc3", b"\xa9", b"", b"b\xc3", b"\xf0\x9f"]
TOKENS = st.lists(st.integers(0, len(PIECES) - 1), max_size=30)
STOPS = st.lists(st.text(alphabet="abé\ufffd", min_size=1, max_size=5), max_size=4)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level_library())


def expected(tokens: list[int], stops: list[str], min_tokens: int) -> tuple[str, str | None, int]:
    """What the text, the stop string and the number of tokens must be, found by looking at every prefix of the text."""
    text, ends = "", []  # for each character, the number of tokens after which it was there
    detokenizer = Detokenizer(PIECES)
    for count, token in enumerate(tokens, 1):
        new = detokenizer.push([token])
        text, ends = text + new, ends + [count] * len(new)
    rest = detokenizer.finish()
    text, ends = text + rest, ends + [len(tokens)] * len(rest)
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete and ends[end - 1] >= min_tokens:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop, ends[end - 1]
    return text, None, len(tokens)


@given(TOKENS, STOPS, st.integers(0, 12), st.lists(st.integers(1, 4), max_size=30))
def test_the_text_does_not_depend_on_how_tokens_arrive(tokens: list[int], stops: list[str], min_tokens: int, portions: list[int]) -> None:
    stream = TextStream(Detokenizer(PIECES), stops, min_tokens)
    said, at = "", 0
    for portion in [*portions, *[1] * len(tokens)]:
        said += stream.push(tokens[at : at + portion])
        at += portion
        if stream.stop is not None:
            break
    said += stream.finish()
    assert (said, stream.stop, stream.num_tokens) == expected(tokens, stops, min_tokens)


@given(TOKENS, STOPS)
def test_only_what_may_begin_a_stop_string_is_held_back(tokens: list[int], stops: list[str]) -> None:
    stream, detokenizer = TextStream(Detokenizer(PIECES), stops), Detokenizer(PIECES)
    said = whole = ""
    for token in tokens:
        said += stream.push([token])
        whole += detokenizer.push([token])
        if stream.stop is not None:
            return
        held = whole[len(said) :]
        assert whole == said + held
        assert held == max((stop[:cut] for stop in stops for cut in range(len(stop)) if whole.endswith(stop[:cut])), key=len, default="")


def test_nothing_is_taken_after_the_end() -> None:
    stream = TextStream(Detokenizer(PIECES), ["b"])
    assert stream.push([0, 1, 0]) == "a"
    assert (stream.stop, stream.num_tokens) == ("b", 2)
    assert stream.push([0]) + stream.finish() == ""


@pytest.mark.parametrize(("stops", "stop", "text"), [(["bc", "abcd"], "bc", "xa"), (["abcd", "bcd"], "abcd", "x"), (["d"], "d", "xabc")])
def test_the_stop_string_that_is_complete_first_wins_and_of_two_the_longer(stops: list[str], stop: str, text: str) -> None:
    stream = TextStream(Detokenizer([b"xabcd"]), stops)
    assert stream.push([0]) == text
    assert stream.stop == stop


def output(tokens: list[int], index: int = 0, reason: FinishReason | None = None, stop_token: int | None = None) -> Output:
    logprobs = tuple(TokenLogprob(token, -1.0) for token in tokens)
    return Output("r", index, tuple(tokens), 0, logprobs, reason, stop_token, cached_tokens=3)


def test_a_stop_string_ends_an_output_that_the_engine_would_continue() -> None:
    ids = tokenizer().encode("Hello. More")
    text = RequestText(tokenizer(), SamplingParams(stop=(".",), n=2), num_prompt=5)
    delta = text.take(output(ids))
    assert delta is not None
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("Hello", FinishReason.STOP, ".")
    assert (delta.num_prompt, delta.num_output, delta.cached_tokens) == (5, len(delta.tokens), 3)
    assert tokenizer().decode(delta.tokens) == "Hello."
    assert [item.token for item in delta.logprobs] == list(delta.tokens)
    assert text.take(output(ids)) is None
    assert text.is_open


def test_held_back_text_comes_with_the_end() -> None:
    text = RequestText(tokenizer(), SamplingParams(stop=("o!",)), num_prompt=1)
    first = text.take(output(tokenizer().encode("Hello")))
    last = text.take(output([], reason=FinishReason.STOP, stop_token=9))
    assert first is not None
    assert last is not None
    assert (first.text, last.text, last.stop_reason) == ("Hell", "o", 9)
    assert not text.is_open


def test_outputs_that_the_engine_never_mentioned_end_with_the_others() -> None:
    text = RequestText(tokenizer(), SamplingParams(n=3), num_prompt=1)
    text.take(output(tokenizer().encode("a"), index=1))
    assert [delta.index for delta in text.end(FinishReason.ERROR, "why", unmentioned=True)] == [0, 2]
    (last,) = text.end(FinishReason.ABORT)
    assert (last.index, last.finish_reason, last.num_output) == (1, FinishReason.ABORT, 1)
    assert not text.is_open
