"""The terminal conversation, over a model that answers from a script."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import pytest

from gemel.cli.chat import Conversation
from gemel.config.errors import RequestError
from gemel.config.sampling import SamplingParams
from gemel.llm.online import AsyncLLM


@dataclass
class Scripted:
    """Answers each conversation with its number of messages, one word at a time; "hang" never ends, "long" is refused."""

    seen: list[list[dict[str, str]]] = field(default_factory=list)
    num_aborted: int = 0

    @property
    def tokenizer(self) -> SimpleNamespace:
        return SimpleNamespace(render_chat=self._render)

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        self.seen.append(list(messages))
        return [0]

    async def generate(self, prompt: Sequence[int], params: SamplingParams, *, request_id: str) -> AsyncIterator[SimpleNamespace]:
        messages = self.seen[-1]
        if messages[-1]["content"] == "long":
            raise RequestError("the prompt is too long")
        try:
            for word in (f"{len(messages)} ", "messages"):
                yield SimpleNamespace(text=word, error=None)
            if messages[-1]["content"] == "hang":
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.num_aborted += 1
            raise


def talk(monkeypatch: pytest.MonkeyPatch, said: str, system: str | None = None) -> tuple[Scripted, Conversation]:
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    llm = Scripted()
    conversation = Conversation(cast(AsyncLLM, llm), SamplingParams(), system)
    with asyncio.Runner() as runner:
        assert conversation.talk(runner) == 0
    return llm, conversation


def test_answers_build_on_what_was_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, conversation = talk(monkeypatch, "hello\n\nagain\n", system="be brief")
    assert capsys.readouterr().out == "2 messages\n4 messages\n"
    assert [message["role"] for message in conversation.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_reset_forgets_all_but_the_system_prompt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    llm, _ = talk(monkeypatch, "hello\n/reset\nagain\n/exit\nnever\n", system="be brief")
    assert len(llm.seen) == 2
    assert capsys.readouterr().out == "2 messages\n2 messages\n"


def test_unknown_command_is_not_sent_but_a_path_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    llm, _ = talk(monkeypatch, "/rest\n/etc is a folder\n")
    assert [messages[-1]["content"] for messages in llm.seen] == ["/etc is a folder"]
    assert "there is no command /rest" in capsys.readouterr().err


def test_refused_message_is_taken_back(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, conversation = talk(monkeypatch, "long\nhello\n")
    printed = capsys.readouterr()
    assert "gemel: the prompt is too long; /reset starts over" in printed.err
    assert printed.out == "1 messages\n"
    assert [message["content"] for message in conversation.messages] == ["hello", "1 messages"]


def test_interrupt_ends_the_answer_and_keeps_its_beginning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background may have it ignored
    try:
        llm, conversation = talk(monkeypatch, "hang\nhello\n")
    finally:
        signal.signal(signal.SIGINT, before)
    assert llm.num_aborted == 1
    assert capsys.readouterr().out == "1 messages [stopped]\n3 messages\n"
    assert conversation.messages[1] == {"role": "assistant", "content": "1 messages"}
