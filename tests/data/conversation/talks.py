"""Conversations for tests, and functions that recipes name."""

from __future__ import annotations

from gemel.data.document import Dropped
from gemel.tokenizer.conversation import Conversation, Message


def talk(question: str, answer: str, name: str = "c", source: str = "test", **parts: object) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), name, source, metadata={}, **parts)  # type: ignore[arg-type]


def reasons(answers: object) -> list[str]:
    """For each answer of a step its reason, or nothing if it is kept."""
    return [answer.reason if isinstance(answer, Dropped) else "" for answer in answers]  # type: ignore[attr-defined]


def longer_than_the_question(question: str, answer: str) -> float:
    return len(answer) / len(question)


def first_letter(text: str) -> str:
    return text[0]


NO_FUNCTION = 3
