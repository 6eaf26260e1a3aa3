"""Rows of all shapes become the same conversations, and rows of none say why."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gemel.config.data.conversation import DataSet
from gemel.data.conversation.read import conversations
from gemel.data.document import Dropped
from gemel.tokenizer.conversation import Conversation, Message, ToolCall

PLAIN = DataSet(files="*")
ASK, ANSWER, BAD = Message("user", "问"), Message("assistant", "答"), Message("assistant", "坏")
CALL = Message("assistant", tool_calls=(ToolCall("get", {"x": 1}),))
TOOL = {"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}


def one(row: Any, data_set: DataSet = PLAIN) -> Conversation:
    [found] = conversations(row, data_set, "test", "row 1")
    assert isinstance(found, Conversation), found
    return found


def said(row: Any, data_set: DataSet = PLAIN) -> tuple[Message, ...]:
    return one(row, data_set).messages


def why(row: Any, data_set: DataSet = PLAIN) -> str:
    [found] = conversations(row, data_set, "test", "row 1")
    assert isinstance(found, Dropped), found
    assert json.loads(found.document.text) == row
    return found.reason


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "问", "input": "", "output": "答"},
        {"指令": "问", "输出": "答"},
        {"指示": "问", "输入": None, "输出": "答"},
        {"Instruction ": "问", "INPUT": "<noinput>", "Output:": "答"},
        {"instruction": "", "input": "问", "output": "答"},
        {"prompt": "问", "response": "答"},
        {"question": "问", "answer": "答"},
        {"问题": "问", "回答": "答"},
        {"instruction": "问", "input": "无输入。", "output": ["答"]},
        {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]},
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
        {"对话": [{"角色": "用户", "内容": "问"}, {"角色": "助手", "内容": "答"}]},
        {"messages": json.dumps([{"role": "User", "content": "问"}, {"role": "BOT", "text": "答"}])},
        [
            {"role": "user", "content": [{"type": "text", "text": "问"}]},
            {"role": "assistant", "content": [{"type": "text", "value": "答"}]},
        ],
        {"prompt": [{"role": "user", "content": "问"}], "completion": "答"},
        {"text": "unused", "prompt": "\n\nHuman: 问\n\nAssistant: 答"},
        {"conversations": [], "instruction": "问", "output": "答"},
        {"instances": [{"input": "", "output": "答"}], "instruction": "问"},
    ],
    ids=lambda row: ",".join(row) if isinstance(row, dict) else "list",
)
def test_one_question_and_one_answer_in_every_shape(row: Any) -> None:
    assert said(row) == (ASK, ANSWER)


def test_input_history_and_system() -> None:
    row = {
        "system": "简短",
        "history": [["a", "b"], ["c", "d"]],
        "instruction": "翻译",
        "input": "hello",
        "output": "你好",
        "id": 7,
        "lang": "zh",
    }
    found = one(row)
    assert [(m.role, m.content) for m in found.messages] == [
        ("system", "简短"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
        ("user", "翻译\nhello"),
        ("assistant", "你好"),
    ]
    assert (found.id, found.source, found.metadata) == ("7", "test", {"lang": "zh"})
    assert said({**row, "history": json.dumps(row["history"])}) == found.messages


def test_repairs_are_counted() -> None:
    assert one({"指令": "问", "输出": "答"}).metadata["counts"] == {"repaired.absent_input": 1}
    assert one({"instruction": "", "input": "问", "output": 3}).metadata["counts"] == {
        "repaired.input_as_instruction": 1,
        "repaired.number_as_text": 1,
    }
    assert "counts" not in one({"instruction": "问", "input": "", "output": "答"}).metadata


def test_what_else_a_row_says_is_kept() -> None:
    found = one(
        {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}], "instruction": "other", "score": 3}
    )
    assert found.metadata == {"instruction": "other", "score": 3}
    both = one({"instruction": "问", "question": "another", "input": "", "output": "答"})
    assert both.metadata == {"question": "another"}
    assert both.instruction == "问"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "", "function": {"name": "get", "arguments": '{"x": 1}'}}]}],
        [{"role": "assistant", "content": "", "function_call": {"name": "get", "arguments": {"x": 1}}}],
        [{"from": "function_call", "value": '{"name": "get", "arguments": {"x": 1}}'}],
        [{"from": "function_call", "value": "{'name': 'get', 'arguments': {'x': 1}}"}],
        [{"role": "assistant", "content": [{"type": "tool_call", "value": '[{"name": "get", "arguments": {"x": 1}}]'}]}],
    ],
)
def test_tool_calls_in_every_form(messages: list[dict[str, Any]]) -> None:
    result = {"from": "observation", "value": "1"}
    row = {"messages": [ASK.as_json(), *messages, result, ANSWER.as_json()], "tools": json.dumps([TOOL["function"]])}
    found = one(row)
    assert found.messages == (ASK, CALL, Message("tool", "1"), ANSWER)
    assert found.tools == (TOOL,)


def test_reasoning_names_ids_and_train_flags_are_read() -> None:
    parts = [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "答"}]
    first = {"role": "assistant", "content": parts, "train": False}
    row = {"messages": [ASK.as_json(), first, ASK.as_json(), {"role": "assistant", "content": "b", "reasoning_content": "ok"}]}
    found = one(row)
    assert found.messages[1] == Message("assistant", "答", "hm", train=False)
    assert found.messages[3].reasoning == "ok"
    assert one(found.as_json()).messages == found.messages


def test_preference_pairs_in_every_form() -> None:
    want = ((ASK,), (ANSWER,), (BAD,))
    rows: list[dict[str, Any]] = [
        {"prompt": "问", "chosen": "答", "rejected": "坏"},
        {"instruction": "问", "input": "", "output": "答", "rejected": "坏"},
        {"conversations": [{"from": "human", "value": "问"}], "chosen": {"from": "gpt", "value": "答"}, "rejected": "坏"},
        {"chosen": "\n\nHuman: 问\n\nAssistant: 答", "rejected": "\n\nHuman: 问\n\nAssistant: 坏"},
        {"chosen": [ASK.as_json(), ANSWER.as_json()], "rejected": [ASK.as_json(), BAD.as_json()]},
        {"prompt": [ASK.as_json()], "chosen": [ANSWER.as_json()], "rejected": [BAD.as_json()]},
        {"prompt": "问", "chosen": [ASK.as_json(), ANSWER.as_json()], "rejected": [ASK.as_json(), BAD.as_json()]},
    ]
    for row in rows:
        found = one(row)
        assert (found.messages, found.chosen, found.rejected) == want, row


def test_a_label_is_kept() -> None:
    row = {"messages": [ASK.as_json(), ANSWER.as_json()], "label": False}
    assert one(row).label is False
    assert why({**row, "label": "maybe"}) == "sft.bad_label"


def test_what_cannot_be_learnt_is_not_trained() -> None:
    found = one([{"from": "gpt", "value": "hi"}, ASK.as_json(), ANSWER.as_json(), {"from": "human", "value": "and?"}])
    assert [message.trained for message in found.messages] == [False, False, True]
    assert found.metadata["counts"] == {"repaired.trailing_question": 1, "repaired.leading_answer": 1}
    empty = one([ASK.as_json(), {"role": "assistant", "content": " "}, ASK.as_json(), ANSWER.as_json()])
    assert [message.trained for message in empty.messages] == [False, False, False, True]


def test_several_instances_are_several_conversations() -> None:
    row = {"id": "t", "instruction": "add", "instances": [{"input": "1 1", "output": "2"}, {"input": "2 2", "output": "4"}]}
    found = conversations(row, PLAIN, "test", "row 1")
    assert [(c.id, c.instruction, c.answer) for c in found if isinstance(c, Conversation)] == [
        ("t#1", "add\n1 1", "2"),
        ("t#2", "add\n2 2", "4"),
    ]


def test_a_mapping_names_columns_speakers_and_a_system_prompt() -> None:
    columns = {"instruction": "问句", "output": "客服答复"}
    mapped = DataSet.parse({"files": "*", "columns": columns, "system": "你是客服"})
    assert said({"问句": "问", "客服答复": "答", "output": "not this"}, mapped) == (Message("system", "你是客服"), ASK, ANSWER)
    assert one({"问句": "问", "客服答复": "答", "output": "not this"}, mapped).metadata["output"] == "not this"
    talk = DataSet.parse(
        {"files": "*", "columns": {"messages": "轮次", "role": "谁", "content": "说"}, "roles": {"买家": "user", "客服": "assistant"}}
    )
    assert said({"轮次": [{"谁": "买家", "说": "问"}, {"谁": "客服", "说": "答"}]}, talk) == (ASK, ANSWER)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "问", "output": ""}, "sft.no_output"),
        ({"instruction": "问"}, "sft.no_output"),
        ({"instruction": " ", "input": "", "output": "答"}, "sft.no_instruction"),
        ({"text": "x"}, "sft.unknown_columns"),
        ({}, "sft.unknown_columns"),
        ({"instruction": {"a": 1}, "output": "答"}, "sft.not_text"),
        ({"instruction": "问", "history": "gibberish", "output": "答"}, "sft.bad_history"),
        ({"instruction": "问", "history": [1], "output": "答"}, "sft.bad_history"),
        ({"messages": []}, "sft.no_messages"),
        ({"messages": "[oops"}, "sft.bad_messages"),
        ({"messages": ["hi"]}, "sft.bad_message"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "sft.unknown_role"),
        ({"messages": [{"role": "user", "content": "x"}]}, "sft.no_answer"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "sft.no_instruction"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}, "sft.no_answer"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "sft.unknown_part"),
        ({"messages": [{"from": "function_call", "value": "call it"}]}, "sft.bad_tool_call"),
        ({"messages": [{"from": "function_call", "value": '{"name": "a b", "arguments": {}}'}]}, "sft.bad_tool_name"),
        ({"messages": [{"from": "function_call", "value": '{"name": "a", "arguments": [1]}'}]}, "sft.bad_tool_call"),
        ({"instruction": "问", "output": "答", "tools": "[{]"}, "sft.bad_tools"),
        ({"prompt": "问", "chosen": "答", "rejected": "答"}, "sft.pair_is_equal"),
        ({"prompt": "问", "chosen": " ", "rejected": "坏", "output": ""}, "sft.no_output"),
        ({"chosen": "答", "rejected": "坏"}, "sft.no_instruction"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: c"}, "sft.pair_diverges_early"),
        ({"instances": [], "instruction": "问"}, "sft.no_output"),
    ],
)
def test_rows_from_which_nothing_can_be_made_say_why(row: Any, reason: str) -> None:
    assert why(row) == reason
