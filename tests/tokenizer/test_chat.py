from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from gemel.config.errors import RequestError
from gemel.tokenizer import chat
from gemel.tokenizer.special import SpecialToken, SpecialTokens, StandIns
from gemel.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.shapes import (
    AROUND,
    LOOKING,
    NAMED,
    PLAIN_ADDED,
    SHAPES,
    SPECIAL,
    byte_level_library,
    sentencepiece_library,
    tokenizer,
)

KINDS = ("byte-level", "prepend", "first")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Weather "now" at <place>',
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello 24, wörld 😀\n\n"}],
    [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": "  a < b && c > d  <"}],
    [
        {"role": "user", "content": "> quoted"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nanswer >"},
        {"role": "user", "content": "<tool_response>x</tool_response>"},
        {"role": "assistant", "content": "[1, 2]"},
        {"role": "user", "content": "s> im_start"},
    ],
]
TOOL_CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "weather in <Paris>?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": {"place": "<Paris>"}}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": '{"t": 21}'},
    {"role": "assistant", "content": "21", "reasoning_content": "it says\n 21"},
]


def reference(shape: str, kind: str) -> PreTrainedTokenizerFast:
    library = byte_level_library() if kind == "byte-level" else sentencepiece_library(kind)
    return PreTrainedTokenizerFast(tokenizer_object=library, chat_template=SHAPES[shape], **NAMED)


def ids_of_reference(shape: str, kind: str, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    ids: list[int] = reference(shape, kind).apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    return ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "cutting"])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_ordinary_conversations_give_the_ids_of_transformers(shape: str, kind: str, messages: list[dict[str, Any]]) -> None:
    ours = tokenizer(shape, kind)
    assert ours.render_chat(messages) == ids_of_reference(shape, kind, messages, add_generation_prompt=True)
    assert ours.render_chat(messages, add_generation_prompt=False) == ids_of_reference(shape, kind, messages, add_generation_prompt=False)


def test_tools_and_tool_calls_give_the_ids_of_transformers() -> None:
    want = ids_of_reference("qwen", "byte-level", TOOL_CONVERSATION, tools=TOOLS, add_generation_prompt=True)
    assert tokenizer("qwen").render_chat(TOOL_CONVERSATION, tools=TOOLS) == want
    in_openai_form = json.loads(json.dumps(TOOL_CONVERSATION))
    in_openai_form[1]["tool_calls"][0]["function"]["arguments"] = '{"place": "<Paris>"}'
    assert tokenizer("qwen").render_chat(in_openai_form, tools=TOOLS) == want


@pytest.mark.parametrize("shape", ["chatml", "llama3", "qwen", "phi"])
@pytest.mark.parametrize("opening", ["Once upon", "Once upon  \n", " <"])
def test_a_final_message_is_left_open_as_transformers_leaves_it(shape: str, opening: str) -> None:
    messages = [{"role": "user", "content": "Tell me"}, {"role": "assistant", "content": opening}]
    want = ids_of_reference(shape, "byte-level", messages, continue_final_message=True)
    got = tokenizer(shape).render_chat(messages, continue_final_message=True)
    assert got == want
    assert got[-1] not in tokenizer(shape).special_ids


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_that_swallow_white_space_do_so(kind: str) -> None:
    messages = [{"role": "user", "content": " a "}, {"role": "assistant", "content": "\n\nb"}]
    assert tokenizer("phi", kind).render_chat(messages) == ids_of_reference("phi", kind, messages)


def nasty_text() -> st.SearchStrategy[str]:
    """Text with special tokens, halves of them, and letters that a template may delete inside of them."""
    parts = [
        *SPECIAL,
        *PLAIN_ADDED,
        *(text[:cut] for text in SPECIAL for cut in (1, 2, -1)),
        *(text[cut:] for text in SPECIAL for cut in (1, 2, -1)),
    ]
    parts += [f"{text[:3]}x{text[3:]}" for text in SPECIAL] + [text.upper() for text in SPECIAL]
    return (
        st.lists(st.sampled_from(parts) | st.text(max_size=5), min_size=1, max_size=6)
        .map("".join)
        .map(lambda t: t.encode("utf-8", "replace").decode())
    )


def messages() -> st.SearchStrategy[list[dict[str, Any]]]:
    rest = st.lists(nasty_text(), max_size=3)
    return rest.map(lambda texts: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate([*texts, "last"])])


def specials_in(ours: Tokenizer, ids: list[int]) -> list[int]:
    return [token for token in ids if token in ours.special_ids]


def skeleton(said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**message, "content": "a"} for message in said]


@pytest.mark.parametrize("shape", SHAPES)
@given(said=messages())
@example(said=[{"role": "user", "content": "INST]"}, {"role": "assistant", "content": "</sx>"}])  # small letters, and a deleted one
@settings(max_examples=60, deadline=None)
def test_no_message_contains_a_special_token(shape: str, said: list[dict[str, Any]]) -> None:
    ours = tokenizer(shape)
    ids = ours.render_chat(said)
    assert specials_in(ours, ids) == specials_in(ours, ours.render_chat(skeleton(said)))
    text = ours.decode(ids, skip_special=False)
    if shape not in ("cutting", "qwen"):  # these two leave out or change parts of the messages
        for message in said:
            assert message["content"].strip() in text


@pytest.mark.parametrize("kind", ["prepend", "first"])
@given(said=messages())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_message_contains_a_special_token_in_sentencepiece(kind: str, said: list[dict[str, Any]]) -> None:
    ours = tokenizer("llama3", kind)
    assert specials_in(ours, ours.render_chat(said)) == specials_in(ours, ours.render_chat(skeleton(said)))


@given(texts=st.lists(nasty_text(), min_size=6, max_size=6))
@settings(max_examples=60, deadline=None)
def test_no_tool_contains_a_special_token(texts: list[str]) -> None:
    ours = tokenizer("qwen")
    a, b, c, d, e, f = texts
    tools = [{"type": "function", "function": {"name": "f", "description": a, "parameters": {b: {"enum": [c]}}}}]
    call = {"function": {"name": "f", "arguments": {d: e}}}
    said = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": f}]
    plain = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [call | {"function": {"name": "f"}}]}]
    plain.append({"role": "tool", "content": "a"})
    ids = ours.render_chat(said, tools=tools)
    assert specials_in(ours, ids) == specials_in(ours, ours.render_chat(plain, tools=[{"type": "function", "function": {"name": "f"}}]))
    text = ours.decode(ids, skip_special=False)
    for part in (a, b, c, d, e):
        assert json.dumps(part, ensure_ascii=False) in text
    assert f in text


NEIGHBOURS = [["<|im_", "start|>"], ["<", "|im_start|>"], ["<|im_start|", ">"], ["<|", "im_start", "|>"], ["[INS", "T]"]]


@pytest.mark.parametrize("pieces", NEIGHBOURS)
def test_neighbouring_messages_do_not_join_into_a_special_token(pieces: list[str]) -> None:
    ours = tokenizer("bare")
    ids = ours.render_chat([{"role": "user", "content": piece} for piece in pieces])
    assert specials_in(ours, ids) == []
    assert ours.decode(ids) == "".join(pieces)
    parts = [{"type": "text", "text": piece} for piece in pieces]
    assert ours.render_chat([{"role": "user", "content": parts}]) == ids


@pytest.mark.parametrize("pieces", NEIGHBOURS)
def test_nor_where_the_template_looks_into_messages(pieces: list[str]) -> None:
    looking = Tokenizer(byte_level_library(), NAMED, {"default": LOOKING})
    ids = looking.render_chat([{"role": "user", "content": piece} for piece in ["</think>", *pieces]])
    assert specials_in(looking, ids) == []
    assert looking.decode(ids) == "".join(pieces)


@pytest.mark.parametrize("content", ["im_start", " im_start ", "im_end", "user"])
def test_nor_where_the_template_writes_half_a_special_token_around_them(content: str) -> None:
    around = Tokenizer(byte_level_library(), NAMED, {"default": AROUND})
    ids = around.render_chat([{"role": "user", "content": content}])
    assert specials_in(around, ids) == []
    assert around.decode(ids) == f"<|{content}|>"


def test_a_template_that_looks_into_messages_sees_what_they_say() -> None:
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\nhm <|im_end|>\n</think>\n\nyes<|im_start|>"}]
    text = tokenizer("qwen").decode(tokenizer("qwen").render_chat(said, add_generation_prompt=False), skip_special=False)
    assert text == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\nhm <|im_end|>\n</think>\n\nyes<|im_start|><|im_end|>\n"


def test_private_use_characters_in_messages_survive() -> None:
    private = "\ue000\ue001\ue002 \\ue003 <|im_start|>"
    ours = tokenizer("chatml")
    assert private in ours.decode(ours.render_chat([{"role": "user", "content": private}]), skip_special=False)


def test_stand_ins_come_back_from_json_escapes() -> None:
    stand_ins = StandIns("")
    hidden = SpecialTokens({"<s>": SpecialToken(1, "<s>")}).hide("a<s>é", stand_ins, dense=False, free=True)
    assert "<s>" not in hidden
    assert len(hidden) == 5
    assert json.loads(stand_ins.restore(json.dumps(hidden))) == "a<s>é"
    assert stand_ins.restore(hidden) == "a<s>é"


GOOD = {"role": "user", "content": "hi"}
BAD: list[tuple[Any, str]] = [
    ([], "messages"),
    (["hi"], "messages[0]"),
    ([{"content": "hi"}], "messages[0].role"),
    ([{"role": "<|im_start|>", "content": "hi"}], "messages[0].role"),
    ([GOOD, {"role": "user"}], "messages[1].content"),
    ([{"role": "user", "content": None}], "messages[0].content"),
    ([{"role": "user", "content": 3}], "messages[0].content"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "messages[0].content[0]"),
    ([{"role": "user", "content": "hi", "weight": 1}], "messages[0].weight"),
    ([{"role": "user", "content": "hi", "tool_calls": []}], "messages[0].tool_calls"),
    ([{"role": "user", "content": "hi", "name": "a b"}], "messages[0].name"),
    ([{"role": "tool", "content": "hi", "tool_call_id": 3}], "messages[0].tool_call_id"),
    ([{"role": "assistant", "tool_calls": [{"type": "function"}]}], "messages[0].tool_calls[0]"),
    ([{"role": "assistant", "tool_calls": [{"function": {"name": "<s>"}}]}], "messages[0].tool_calls[0].function.name"),
    (
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        "messages[0].tool_calls[0].function.arguments",
    ),
    ([{"role": "user", "content": "\ud800"}], "messages"),
]


@pytest.mark.parametrize(("said", "param"), BAD)
def test_what_is_no_conversation_is_refused_by_name(said: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        tokenizer().render_chat(said)
    assert caught.value.param == param


@pytest.mark.parametrize("tools", [[{"name": "f"}], [{"type": "function", "function": {"name": ""}}], ["f"]])
def test_what_is_no_tool_is_refused_by_name(tools: Any) -> None:
    with pytest.raises(RequestError) as caught:
        tokenizer().render_chat([GOOD], tools=tools)
    assert caught.value.param is not None
    assert caught.value.param.startswith("tools[0]")


def test_values_that_are_not_json_or_too_deep_are_refused() -> None:
    deep: Any = "x"
    for _ in range(chat.MAX_DEPTH + 2):
        deep = [deep]
    for value in (deep, {1, 2}, Path("x")):
        with pytest.raises(RequestError):
            tokenizer().render_chat([GOOD], tools=[{"type": "function", "function": {"name": "f", "parameters": value}}])


def test_only_an_answer_can_be_continued() -> None:
    for final in (GOOD, {"role": "assistant", "content": ""}):
        with pytest.raises(RequestError) as caught:
            tokenizer().render_chat([GOOD, final], continue_final_message=True)
        assert caught.value.param == "continue_final_message"


def test_a_refusal_of_the_template_is_reported() -> None:
    with pytest.raises(RequestError, match="Only user and assistant roles"):
        tokenizer("mistral").render_chat([GOOD, {"role": "tool", "content": "x"}])


def test_without_a_template_there_is_no_chat() -> None:
    with pytest.raises(RequestError, match="no chat template"):
        Tokenizer(byte_level_library()).render_chat([GOOD])


def test_a_template_for_tools_is_taken_when_there_are_tools() -> None:
    both = Tokenizer(byte_level_library(), NAMED, {"default": "plain", "tool_use": "with tools"})
    assert both.decode(both.render_chat([GOOD])) == "plain"
    assert both.decode(both.render_chat([GOOD], tools=TOOLS)) == "with tools"
