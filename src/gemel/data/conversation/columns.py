"""What columns, speakers and empty values are called in data sets, in English and Chinese.

A name counts without case, spaces, marks and full-width forms. The first name of a row has most to say: where two columns claim to be the
instruction, the other stays in the metadata.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

from gemel.config.data.conversation import Columns

COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation", "dialog", "dialogue", "dialogs", "turns", "traj", "对话", "消息", "会话"),
    "chosen": ("chosen", "accepted", "preferred", "response_chosen", "answer_chosen", "优选", "好的回答", "选择"),
    "rejected": ("rejected", "dispreferred", "response_rejected", "answer_rejected", "拒绝", "坏的回答"),
    "instruction": ("instruction", "prompt", "question", "query", "指令", "指示", "提示", "问题", "提问", "问", "任务"),
    "input": ("input", "context", "输入", "上下文", "内容", "材料"),
    "output": ("output", "response", "answer", "completion", "target", "reply", "输出", "回答", "答案", "回复", "响应", "答"),
    "history": ("history", "历史", "历史对话"),
    "system": ("system", "systemprompt", "systemmessage", "系统", "系统提示", "系统提示词"),
    "tools": ("tools", "functions", "function", "工具", "函数"),
    "label": ("label", "标签"),
    "id": ("id", "uid", "uuid", "taskid", "编号"),
    "instances": ("instances",),
}
MESSAGE: dict[str, tuple[str, ...]] = {
    "role": ("role", "from", "speaker", "角色", "说话人"),
    "content": ("content", "value", "text", "message", "内容", "文本"),
}
ROLES: dict[str, tuple[str, ...]] = {
    "system": ("system", "developer", "系统"),
    "user": ("user", "human", "prompter", "customer", "question", "用户", "人类", "问", "提问者"),
    "assistant": ("assistant", "gpt", "bot", "chatgpt", "model", "ai", "bing", "bard", "助手", "助理", "机器人", "模型", "答"),
    "call": ("functioncall", "toolcall", "函数调用", "工具调用"),
    "tool": ("tool", "observation", "function", "functionresponse", "toolresponse", "ipython", "工具", "观察"),
}
# inputs that say that there is none
NOTHING = frozenset(
    (
        "noinput",
        "none",
        "null",
        "nan",
        "na",
        "n/a",
        "nil",
        "empty",
        "无输入",
        "没有输入",
        "无需输入",
        "不需要输入",
        "无",
        "没有",
        "空",
        "暂无",
    )
)


def plain(name: str) -> str:
    """A name without what does not count in it."""
    return "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c.isalnum() or c == "/")


def says_nothing(text: str) -> bool:
    """Whether an input is a way to write that there is none, such as `<noinput>` or 无输入。"""
    return len(text) <= 24 and plain(text.replace("&lt;", "").replace("&gt;", "")) in NOTHING


_NAMES = {name: known for known, names in COLUMNS.items() for name in names}
_MESSAGE_NAMES = {name: known for known, names in MESSAGE.items() for name in names}
_ROLE_NAMES = {name: known for known, names in ROLES.items() for name in names}


def named(row: Mapping[str, Any], columns: Columns) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row's known columns under our names, and all others under their own.

    Columns that the mapping names are taken as it says. Of several columns for one thing the first with something in it counts.
    """
    return _sorted(row, _NAMES, {theirs: ours for ours, theirs in columns if theirs is not None and ours in COLUMNS})


def of_message(message: Mapping[str, Any], columns: Columns) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same for the keys of one message: `role`, `content`, and the rest."""
    return _sorted(message, _MESSAGE_NAMES, {theirs: ours for ours, theirs in columns if theirs is not None and ours in MESSAGE})


def role(name: object, roles: Mapping[str, str]) -> str | None:
    """system, user, assistant, tool, or call (the assistant calls a tool); None for a name that is not known."""
    return roles.get(str(name)) or _ROLE_NAMES.get(plain(str(name)))


def _sorted(row: Mapping[str, Any], names: Mapping[str, str], chosen: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    known: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in row.items():
        ours = chosen.get(key) or names.get(plain(str(key)))
        if ours is None or (key not in chosen and ours in chosen.values()):
            rest[str(key)] = value
        elif _is_empty(known.get(ours)):
            known[ours] = value
        elif not _is_empty(value) and value != known[ours]:
            rest[str(key)] = value
    return known, rest


def _is_empty(value: object) -> bool:
    return value is None or value in ("", [], {})
