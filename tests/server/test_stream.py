"""Leaving, waiting and shutting down, over real sockets."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest

from gemel.config.server import ServerConfig
from tests.server.conftest import MODEL, listening, until, user
from tests.server.fake_llm import FakeLLM

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("body", [user(), user(stream=True), user(n=4), user(n=4, stream=True)])
@pytest.mark.parametrize("tokens", [0, 3])
async def test_leaving_aborts(body: dict, tokens: int) -> None:
    """Before the first token and in the middle, streaming or not."""
    llm = FakeLLM(reply="x" * 100_000, delay_s=0.01 if tokens else 5.0, max_context=200_000)
    async with listening(llm) as url:
        client = httpx.AsyncClient(base_url=url)
        asking = asyncio.create_task(client.post(CHAT, json=body))
        await until(lambda: bool(llm.running) and llm.output_tokens >= tokens)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: not llm.running)
        assert len(llm.aborted) == 1
        await client.aclose()


async def test_leaving_aborts_all_prompts_of_a_batch() -> None:
    llm = FakeLLM(reply="x" * 100_000, delay_s=0.01, max_context=200_000)
    async with listening(llm) as url, httpx.AsyncClient(base_url=url) as client:
        asking = asyncio.create_task(client.post("/v1/completions", json={"prompt": ["a", "b", "c"], "max_tokens": 1000}))
        await until(lambda: len(llm.running) == 3)
        asking.cancel()
        await until(lambda: not llm.running)
    assert len(llm.aborted) == 3


async def test_half_a_body_and_gone(llm: FakeLLM) -> None:
    async with listening(llm) as url:
        _, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        await writer.drain()
        writer.close()
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.post(CHAT, json=user())).status_code == 200
    assert len(llm.seen) == 1


async def test_a_body_that_never_comes_is_408(llm: FakeLLM) -> None:
    async with listening(llm, ServerConfig(read_timeout_s=0.2)) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        answer = await asyncio.wait_for(reader.read(), 10)  # until the server closes
        writer.close()
    assert answer.startswith(b"HTTP/1.1 408") and b'"code":"body_timeout"' in answer


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nA: b\r\n"])
async def test_a_head_that_never_ends_is_let_go(llm: FakeLLM, sent: bytes) -> None:
    async with listening(llm, ServerConfig(read_timeout_s=0.2)) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
        writer.write(sent)
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health HTTP/1.1\r\nX: " + b"a" * 200_000,
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 80_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 80_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 20_000,
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 2\r\nX: " + b"a" * 80_000 + b"\r\n\r\n{}",
    ],
)
async def test_a_giant_head_is_431(llm: FakeLLM, sent: bytes) -> None:
    async with listening(llm) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
        writer.write(sent)
        try:
            answer = await asyncio.wait_for(reader.read(100), 10)
        except ConnectionResetError:
            answer = b"HTTP/1.1 431"  # closed while we still sent
        writer.close()
        assert answer.startswith(b"HTTP/1.1 431"), answer
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/health", headers={"X": "a" * 10_000})).status_code == 200


async def test_pipelining_ends_the_connection() -> None:
    llm = FakeLLM(reply="x" * 1000, delay_s=0.05)
    async with listening(llm) as url:
        _, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
        body = json.dumps(user()).encode()
        one = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
        writer.write(one)
        await until(lambda: len(llm.running) == 1)
        writer.write(one)
        await until(lambda: not llm.running)
        writer.close()
    assert len(llm.seen) == 1


async def test_garbage_is_400_and_the_server_lives(llm: FakeLLM) -> None:
    async with listening(llm) as url:
        for garbage in (b"\x00\x01\x02\r\n\r\n", b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
            writer.write(garbage)
            assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 400")
            writer.close()
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/health")).status_code == 200


async def test_a_silent_stream_sends_comments() -> None:
    llm = FakeLLM(reply="ab", delay_s=0.3)
    async with listening(llm, ServerConfig(keep_alive_s=0.05)) as url, httpx.AsyncClient(base_url=url) as client:
        lines = [
            line
            async for line in (await client.send(client.build_request("POST", CHAT, json=user(stream=True)), stream=True)).aiter_lines()
        ]
    assert lines[0] == ": keep-alive" and lines.count(": keep-alive") >= 3
    assert lines[-2] == "data: [DONE]"


async def test_tokens_come_one_by_one() -> None:
    """The first token arrives while the last is not yet made."""
    llm = FakeLLM(reply="abc", delay_s=0.1)
    async with (
        listening(llm) as url,
        httpx.AsyncClient(base_url=url) as client,
        client.stream("POST", CHAT, json=user(stream=True)) as response,
    ):
        async for line in response.aiter_lines():
            if '"content":"a"' in line:
                assert llm.running
                break


async def test_sixty_four_clients() -> None:
    llm = FakeLLM(reply="Many at once.", delay_s=0.001)
    async with listening(llm) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

        async def ask(number: int) -> str:
            stream = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": str(number)}], stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        assert await asyncio.gather(*(ask(number) for number in range(64))) == [llm.reply] * 64
    assert not llm.running and not llm.aborted


async def test_closing_lets_requests_finish() -> None:
    llm = FakeLLM(reply="x" * 30, delay_s=0.01)
    async with httpx.AsyncClient() as client:
        async with listening(llm) as url:
            asking = [asyncio.create_task(client.post(url + CHAT, json=user(stream=stream))) for stream in (False, True)]
            await until(lambda: len(llm.running) == 2)
        whole, stream = await asyncio.gather(*asking)
    assert whole.json()["choices"][0]["message"]["content"] == llm.reply
    assert stream.text.rstrip().endswith("[DONE]") and not llm.aborted


async def test_what_outlives_the_drain_gets_an_error() -> None:
    llm = FakeLLM(reply="x" * 100_000, delay_s=0.01, max_context=200_000)
    async with httpx.AsyncClient() as client:
        async with listening(llm, ServerConfig(drain_s=0.1)) as url:
            asking = [asyncio.create_task(client.post(url + CHAT, json=user(stream=stream))) for stream in (False, True)]
            await until(lambda: len(llm.running) == 2 and llm.output_tokens > 10)
        whole, stream = await asyncio.gather(*asking)
    assert whole.status_code == 503 and whole.json()["error"]["code"] == "aborted"
    assert json.loads(stream.text.rstrip().rpartition("data: ")[2])["error"]["code"] == "aborted"
