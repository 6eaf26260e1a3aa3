from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import websockets
from websockets.asyncio.client import ClientConnection, connect

from gemel.config.server import ServerConfig
from tests.server.conftest import listening, until, user
from tests.server.fake_llm import FakeLLM

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def open_socket(llm: FakeLLM, config: ServerConfig | None = None, **options: object) -> AsyncIterator[ClientConnection]:
    async with listening(llm, config) as url, connect(url.replace("http", "ws") + "/v1/stream", **options) as socket:
        yield socket


async def say(socket: ClientConnection, **message: object) -> None:
    await socket.send(json.dumps(message))


async def hear(socket: ClientConnection, last: str = "done") -> list[dict]:
    """Messages up to the first of type `last`."""
    heard: list[dict] = []
    while not heard or heard[-1]["type"] != last:
        heard.append(json.loads(await socket.recv()))
    return heard


async def test_streams_a_chat_and_a_completion(llm: FakeLLM) -> None:
    async with open_socket(llm) as socket:
        await say(socket, type="start", **user(logprobs=True))
        started, *deltas, done = await hear(socket)
        assert started["type"] == "started" and {d["type"] for d in deltas} == {"delta"}
        assert "".join(d["text"] for d in deltas) == llm.reply and deltas[0]["logprobs"]["content"][0]["token"] == "H"
        assert done["finish_reason"] == "stop" and done["usage"]["completion_tokens"] == len(llm.reply)
        await say(socket, type="start", prompt="x", max_tokens=5)
        *deltas, done = (await hear(socket))[1:]
        assert "".join(d["text"] for d in deltas) == llm.reply[:5] and done["finish_reason"] == "length"


async def test_cancel_then_continue() -> None:
    llm = FakeLLM(reply="x" * 1000, delay_s=0.005)
    async with open_socket(llm) as socket:
        await say(socket, type="start", prompt="once", max_tokens=1000, temperature=0)
        seen = "".join(m.get("text", "") for m in [json.loads(await socket.recv()) for _ in range(5)])
        await say(socket, type="cancel")
        *rest, done = await hear(socket)
        seen += "".join(m["text"] for m in rest)
        assert done["finish_reason"] == "cancelled" and done["usage"]["completion_tokens"] == len(seen) < 1000
        assert len(llm.aborted) == 1 and not llm.running
        await say(socket, type="continue", max_tokens=7)
        *deltas, done = (await hear(socket))[1:]
        assert len("".join(d["text"] for d in deltas)) == 7
        await say(socket, type="continue", max_tokens=1)
        await hear(socket)
    prompts = [llm.tokenizer.decode(prompt) for prompt, *_ in llm.seen]
    assert prompts == ["once", "once" + seen, "once" + seen + "x" * 7]
    assert llm.seen[1][1].max_tokens == 7 and llm.seen[1][1].temperature == 0


async def test_errors_leave_the_socket_open(llm: FakeLLM) -> None:
    async with open_socket(llm) as socket:
        for message in (
            "no json", "[1]", "{}", "[" * 10_000, '{"type":"sing"}', '{"type":"cancel"}', '{"type":"continue"}', '{"type":"start"}',
            '{"type":"start","prompt":"x","temprature":1}', '{"type":"start","prompt":["a","b"]}', '{"type":"start","prompt":"x","n":2}',
            '{"type":"start","messages":[]}', '{"type":"start","prompt":"x","temperature":1e999}', '{"type":"start","prompt":"\\ud800"}',
            "\u0000", b"\xff",
        ):  # fmt: skip
            await socket.send(message)
            (error,) = await hear(socket, "error")
            assert set(error["error"]) == {"message", "type", "param", "code"}, message
        await say(socket, type="start", prompt="x")
        await hear(socket)
        for wrong in ({"max_tokens": 0}, {"max_tokens": "5"}, {"max_tokens": 10**9}, {"temperature": 1}):
            await say(socket, type="continue", **wrong)
            await hear(socket, "error")
        await say(socket, type="continue", max_tokens=3)
        assert (await hear(socket))[-1]["finish_reason"] == "length"
    assert len(llm.seen) == 2


async def test_one_generation_at_a_time() -> None:
    llm = FakeLLM(reply="x" * 100, delay_s=0.01)
    async with open_socket(llm) as socket:
        await say(socket, type="start", **user())
        await hear(socket, "started")
        await say(socket, type="start", **user())
        assert "running" in (await hear(socket, "error"))[-1]["error"]["message"]
        assert (await hear(socket))[-1]["usage"]["completion_tokens"] == 100


async def test_leaving_aborts() -> None:
    llm = FakeLLM(reply="x" * 100_000, delay_s=0.01, max_context=200_000)
    async with listening(llm) as url:
        socket = await connect(url.replace("http", "ws") + "/v1/stream")
        await say(socket, type="start", **user())
        await hear(socket, "delta")
        socket.transport.abort()  # no closing handshake: the machine is gone
        await until(lambda: len(llm.aborted) == 1 and not llm.running)


async def test_an_engine_failure_is_an_error_message(llm: FakeLLM) -> None:
    llm.fail_after = 3
    async with open_socket(llm) as socket:
        await say(socket, type="start", **user())
        error = (await hear(socket, "error"))[-1]["error"]
        assert error["type"] == "server_error" and "NaN" not in error["message"]
        llm.fail_after = None
        await say(socket, type="start", **user())
        assert (await hear(socket))[-1]["finish_reason"] == "stop"


async def test_the_key_and_strangers(llm: FakeLLM) -> None:
    async with listening(llm, ServerConfig(api_key="key")) as url:
        address = url.replace("http", "ws") + "/v1/stream"
        for status, headers in (
            (401, {}),
            (401, {"Authorization": "Bearer no"}),
            (403, {"Authorization": "Bearer key", "Origin": "http://evil.example"}),
        ):
            with pytest.raises(websockets.InvalidStatus) as refused:
                await connect(address, additional_headers=headers)
            assert refused.value.response.status_code == status
        async with connect(address, additional_headers={"Authorization": "Bearer key"}) as socket:
            await say(socket, type="start", **user())
            await hear(socket)


async def test_a_message_over_the_limit_closes(llm: FakeLLM) -> None:
    async with open_socket(llm, ServerConfig(max_body_bytes=10_000)) as socket:
        await socket.send("x" * 10_001)
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await socket.recv()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009
