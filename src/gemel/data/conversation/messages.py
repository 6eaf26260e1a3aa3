"""Messages, tools and tool calls as data sets write them: OpenAI's form old and new, ShareGPT's, lists of parts, and transcripts."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from gemel.config.data.conversation import DataSet
from gemel.data.conversation import columns
from gemel.tokenizer.conversation import Json, Message, ToolCall

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant|User|System)\s*: ?")
_MESSAGE_KEYS = ("tool_calls", "function_call", "tool_call_id", "name", "reasoning_content", "reasoning", "train", "weight", "loss")


class Broken(Exception):
    """A row from which nothing can be made: a fixed reason, and what it was."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Repairs(Counter[str]):
    """How often what was mended in a row."""

    def __init__(self, names: Iterable[str] = ()):
        super().__init__(names)

    def add(self, name: str) -> None:
        """Once more."""
        self[name] += 1


def message_list(value: Any, data_set: DataSet, counts: Repairs) -> list[Message]:
    """Messages in order, one call of several tools as one message. Lists in the list (turns of an agent) are laid end to end."""
    if isinstance(value, str):
        value = _json(value, "sft.bad_messages", counts)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise Broken("sft.no_messages", f"messages are {str(value)[:60]!r}")
    flat = [message for part in value for message in (part if isinstance(part, list) else [part])]
    return [_message(message, index, data_set, counts) for index, message in enumerate(flat)]


def _message(message: Any, index: int, data_set: DataSet, counts: Repairs) -> Message:
    if not isinstance(message, dict):
        raise Broken("sft.bad_message", f"message {index} is {str(message)[:60]!r}, not an object")
    known, rest = columns.of_message(message, data_set.columns)
    role = columns.role(known.get("role", ""), data_set.roles)
    if role is None:
        raise Broken("sft.unknown_role", f"message {index} is of {known.get('role')!r}; name it in `roles` of a [[dataset]] table")
    content = known.get("content")
    if role == "call":
        return Message("assistant", tool_calls=_calls(content, counts))
    texts = _parts(content, index, counts)
    calls = _calls(message.get("tool_calls") or message.get("function_call"), counts) if role == "assistant" else ()
    reasoning = str(rest.get("reasoning_content") or rest.get("reasoning") or "")
    if unknown := sorted(key for key, value in rest.items() if key not in _MESSAGE_KEYS and value not in (None, "", [], {})):
        counts.add("ignored.message_keys: " + ", ".join(unknown))
    train = next((bool(rest[key]) for key in ("train", "weight", "loss") if isinstance(rest.get(key), int | float | bool)), None)
    name = str(message.get("name") or "")
    return Message(
        role,
        "".join(texts["text"]),
        "".join(texts["reasoning"]) or reasoning,
        (*calls, *(call for text in texts["tool_call"] for call in _calls(text, counts))),
        str(message.get("tool_call_id") or ""),
        name if _NAME.fullmatch(name) else "",
        train,
    )


def _parts(content: Any, index: int, counts: Repairs) -> dict[str, list[Any]]:
    """A message's content by kind: text, reasoning, calls."""
    texts: dict[str, list[Any]] = {"text": [], "reasoning": [], "tool_call": []}
    if content is None:
        return texts
    if isinstance(content, dict):
        content = [content] if "type" in content else json.dumps(content, ensure_ascii=False)
    if isinstance(content, int | float | bool):
        counts.add("repaired.number_as_text")
        content = str(content)
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        said = next((part[key] for key in ("text", "value", kind) if key in part), None) if isinstance(part, dict) else part
        kind = "reasoning" if kind == "thinking" else kind
        if kind not in texts or said is None or (kind != "tool_call" and not isinstance(said, str)):
            raise Broken("sft.unknown_part", f"message {index} has a part of type {kind!r}; text, reasoning and tool_call are read")
        texts[kind].append(said)
    return texts


def _calls(value: Any, counts: Repairs) -> tuple[ToolCall, ...]:
    """Calls of tools: one or several, as objects or as JSON in a text, in OpenAI's form or as {"name", "arguments"}."""
    if value in (None, "", [], {}):
        return ()
    if isinstance(value, str):
        value = _json(value, "sft.bad_tool_call", counts)
    return tuple(_call(call, counts) for call in (value if isinstance(value, list) else [value]))


def _call(call: Any, counts: Repairs) -> ToolCall:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise Broken("sft.bad_tool_call", f"a call is {str(call)[:60]!r}, not an object")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise Broken("sft.bad_tool_name", f"a call of {name!r}; names are 1 to 64 letters, digits, underscores, dots and dashes")
    arguments: Any = next((function[key] for key in ("arguments", "parameters", "kwargs") if key in function), {})
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", "sft.bad_tool_call", counts)
    if not isinstance(arguments, dict):
        raise Broken("sft.bad_tool_call", f"arguments of {name} are {str(arguments)[:60]!r}, not an object")
    return ToolCall(name, arguments, str(call.get("id") or ""))


def tool_list(value: Any, counts: Repairs) -> tuple[Json, ...]:
    """The tools on offer, in OpenAI's form."""
    if isinstance(value, str) and value.strip():
        value = _json(value, "sft.bad_tools", counts)
    if value in (None, [], {}) or isinstance(value, str):
        return ()
    made = []
    for tool in value if isinstance(value, list) else [value]:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Broken("sft.bad_tools", f"a tool is {str(tool)[:60]!r}, not an object with a name")
        if not _NAME.fullmatch(function["name"]):
            raise Broken("sft.bad_tool_name", f"a tool is called {function['name']!r}")
        parameters = function.get("parameters")
        if isinstance(parameters, dict) and parameters.get("type") == "dict":  # Python's word for it
            function = {**function, "parameters": {**parameters, "type": "object"}}
            counts.add("repaired.tool_schema")
        made.append({"type": "function", "function": function})
    return tuple(made)


def transcript(text: str) -> list[Message]:
    r"""A conversation in one text, as HH-RLHF writes it: "\n\nHuman: ...\n\nAssistant: ..."; nothing if it is not one."""
    if not (match := _TURN.match(text)):
        return []
    spoken = []
    while match is not None:
        following = _TURN.search(text, match.end())
        said = text[match.end() : following.start() if following else len(text)]
        role = {"Human": "user", "User": "user", "Assistant": "assistant", "System": "system"}[match[1]]
        spoken.append(Message(role, said.strip()))
        match = following
    return spoken


def _json(text: str, reason: str, counts: Repairs) -> Any:
    """A value that was written into a text, as JSON or as Python writes it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        value = json.loads(text, strict=False)
        counts.add("repaired.control_characters")
        return value
    except (ValueError, RecursionError):
        pass
    try:
        value = ast.literal_eval(text.strip())
        counts.add("repaired.python_literal")
        return value
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise Broken(reason, f"a text that is no JSON: {text[:80]!r}") from None
