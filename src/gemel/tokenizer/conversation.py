"""The one form of a conversation: what data sets of all shapes are read into, what templates render, what training learns from.

A preference pair is a conversation too: what both answers follow is in `messages`, the answers themselves in `chosen` and `rejected`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The assistant wants a tool to run with these arguments."""

    name: str
    arguments: Json = field(default_factory=dict)
    id: str = ""

    def as_chat(self) -> Json:
        """As the OpenAI API writes it, but with the arguments as an object, which is what templates expect."""
        return ({"id": self.id} if self.id else {}) | {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class Message:
    """What one side says. `role` is system, user, assistant or tool; `train` None means that the assistant's are trained."""

    role: str
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""
    train: bool | None = None

    @property
    def trained(self) -> bool:
        """Whether training learns to say this."""
        return self.role == "assistant" and self.train is not False

    def as_chat(self) -> Json:
        """As chat templates read it."""
        said: Json = {"role": self.role, "content": self.content}
        named = {"reasoning_content": self.reasoning, "tool_call_id": self.tool_call_id, "name": self.name}
        said |= {key: value for key, value in named.items() if value}
        return said | ({"tool_calls": [call.as_chat() for call in self.tool_calls]} if self.tool_calls else {})

    def as_json(self) -> Json:
        """As it is stored: the chat form, and `train` where it was set."""
        return self.as_chat() | ({} if self.train is None else {"train": self.train})


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, the tools on offer (in OpenAI's form), and where they come from.

    `label` says of a single answer whether it is a good one (KTO). `metadata` holds plain JSON values; `metadata["counts"]` what was
    repaired.
    """

    messages: tuple[Message, ...]
    id: str
    source: str
    tools: tuple[Json, ...] = ()
    chosen: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()
    label: bool | None = None
    metadata: Json = field(default_factory=dict)

    @property
    def instruction(self) -> str:
        """What the user asks first."""
        return next((message.content for message in self.messages if message.role == "user"), "")

    @property
    def answer(self) -> str:
        """What the assistant says last; of a pair, the chosen one."""
        spoken = [message.content for message in (*self.messages, *self.chosen) if message.role == "assistant"]
        return spoken[-1] if spoken else ""

    def ending(self, answer: Sequence[Message]) -> Conversation:
        """With one of a pair's answers at its end, and nothing else trained."""
        before = tuple(replace(message, train=False) if message.role == "assistant" else message for message in self.messages)
        return replace(self, messages=(*before, *answer), chosen=(), rejected=())

    def as_json(self) -> Json:
        """As one line of a file; what is empty is left out."""
        stored: Json = {"id": self.id, "source": self.source, "messages": [message.as_json() for message in self.messages]}
        sides = {"chosen": [m.as_json() for m in self.chosen], "rejected": [m.as_json() for m in self.rejected]}
        rest = {"tools": list(self.tools), **sides, "metadata": self.metadata}
        stored |= {key: value for key, value in rest.items() if value}
        return stored if self.label is None else stored | {"label": self.label}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Conversation:
        """What `as_json` wrote. Files of other shapes are read by `gemel.data.conversation`."""
        return cls(
            tuple(map(_message, stored["messages"])),
            stored["id"],
            stored["source"],
            tuple(stored.get("tools", ())),
            tuple(map(_message, stored.get("chosen", ()))),
            tuple(map(_message, stored.get("rejected", ()))),
            stored.get("label"),
            stored.get("metadata", {}),
        )


def _message(stored: Mapping[str, Any]) -> Message:
    calls = [(call["function"], call.get("id", "")) for call in stored.get("tool_calls", ())]
    return Message(
        stored["role"],
        stored.get("content", ""),
        stored.get("reasoning_content", ""),
        tuple(ToolCall(function["name"], function["arguments"], name) for function, name in calls),
        stored.get("tool_call_id", ""),
        stored.get("name", ""),
        stored.get("train"),
    )
