"""A conversation survives being written and read, and is what templates take."""

from __future__ import annotations

import json

from gemel.tokenizer.conversation import Conversation, Message, ToolCall
from tests.tokenizer.shapes import tokenizer

TOOL = {"type": "function", "function": {"name": "get_weather", "description": "天气", "parameters": {"type": "object"}}}
FULL = Conversation(
    (
        Message("system", "Be brief."),
        Message("user", "巴黎天气？", name="ada"),
        Message("assistant", reasoning="I must look", tool_calls=(ToolCall("get_weather", {"place": "巴黎"}, "c1"),), train=False),
        Message("tool", '{"t": 21}', tool_call_id="c1"),
        Message("assistant", "21 度。"),
    ),
    "row 3",
    "test",
    tools=(TOOL,),
    metadata={"lang": "zh"},
)
PAIR = Conversation(
    (Message("user", "q"), Message("assistant", "a"), Message("user", "again")),
    "p",
    "test",
    chosen=(Message("assistant", "good"),),
    rejected=(Message("assistant", "bad"),),
    label=True,
)


def test_it_survives_json() -> None:
    for conversation in (FULL, PAIR):
        assert Conversation.from_json(json.loads(json.dumps(conversation.as_json()))) == conversation
    assert "tools" not in PAIR.as_json()
    assert "train" not in PAIR.as_json()["messages"][1]


def test_templates_take_it() -> None:
    ours = tokenizer("qwen")
    text = ours.decode(ours.render_chat([message.as_chat() for message in FULL.messages], tools=list(FULL.tools)), skip_special=False)
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"place": "巴黎"}}\n</tool_call>' in text


def test_who_asks_and_who_answers() -> None:
    assert (FULL.instruction, FULL.answer) == ("巴黎天气？", "21 度。")
    assert (PAIR.instruction, PAIR.answer) == ("q", "good")
    assert [message.trained for message in FULL.messages] == [False, False, False, False, True]


def test_one_answer_of_a_pair_is_trained_alone() -> None:
    bad = PAIR.ending(PAIR.rejected)
    assert [message.content for message in bad.messages] == ["q", "a", "again", "bad"]
    assert [message.trained for message in bad.messages] == [False, False, False, True]
    assert bad.chosen == bad.rejected == ()
