"""The official client, unchanged, against a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest

from gemel.config import CapacityError
from gemel.config.server import ServerConfig
from tests.server.conftest import MODEL, listening
from tests.server.fake_llm import FakeLLM

pytestmark = pytest.mark.anyio
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
async def client(llm: FakeLLM) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        listening(llm, ServerConfig(api_key="key")) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as client,
    ):
        yield client


async def test_chat(client: openai.AsyncOpenAI, llm: FakeLLM) -> None:
    done = await client.chat.completions.create(model=MODEL, messages=HI, n=2, seed=1, logprobs=True, top_logprobs=1, user="ann")
    assert [c.message.content for c in done.choices] == [llm.reply] * 2 and done.usage is not None
    assert done.choices[0].logprobs.content[0].token == "H" and done.choices[0].logprobs.content[0].bytes == [72]
    assert done.usage.prompt_tokens_details.cached_tokens == 4
    again = await client.chat.completions.create(model=MODEL, messages=[*HI, done.choices[0].message, *HI])
    assert again.choices[0].finish_reason == "stop"


async def test_streamed_chat(client: openai.AsyncOpenAI, llm: FakeLLM) -> None:
    stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == llm.reply
    assert chunks[-1].usage.completion_tokens == len(llm.reply)


async def test_the_streaming_helper_accumulates(client: openai.AsyncOpenAI, llm: FakeLLM) -> None:
    async with client.chat.completions.stream(model=MODEL, messages=HI) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == llm.reply and final.choices[0].finish_reason == "stop"


async def test_completions_and_models(client: openai.AsyncOpenAI, llm: FakeLLM) -> None:
    done = await client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=5, logprobs=1)
    assert [c.text for c in done.choices] == [llm.reply[:5]] * 2 and done.choices[0].logprobs.tokens == list(llm.reply[:5])
    assert (
        "".join([c.choices[0].text async for c in await client.completions.create(model=MODEL, prompt="a", stream=True)]) == llm.reply[:16]
    )
    assert [m.id async for m in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).owned_by == "gemel"


async def test_extensions_and_tools(client: openai.AsyncOpenAI, llm: FakeLLM) -> None:
    tool = {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}}}
    await client.chat.completions.create(model=MODEL, messages=HI, tools=[tool], tool_choice="auto", extra_body={"top_k": 5, "min_p": 0.1})
    prompt, params, _, _ = llm.seen[0]
    assert "now" in llm.tokenizer.decode(prompt) and (params.top_k, params.min_p) == (5, 0.1)


async def test_errors_are_the_clients_own_classes(client: openai.AsyncOpenAI, llm: FakeLLM) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model=MODEL, messages=HI, temperature=1000)
    assert bad.value.param == "temperature" and bad.value.code == "invalid_value" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="other", messages=HI)
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong").models.list()
    llm.refuse = CapacityError("full")
    with pytest.raises(openai.InternalServerError) as full:
        await client.chat.completions.create(model=MODEL, messages=HI)
    assert full.value.status_code == 503
    llm.refuse, llm.fail_after = None, 2
    with pytest.raises(openai.APIError, match="failed on this request"):
        async for _ in await client.chat.completions.create(model=MODEL, messages=HI, stream=True):
            pass


async def test_closing_a_stream_aborts(client: openai.AsyncOpenAI, llm: FakeLLM) -> None:
    from tests.server.conftest import until

    llm.delay_s = 0.05
    stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
    await anext(aiter(stream))
    await stream.close()
    await until(lambda: len(llm.aborted) == 1 and not llm.running)
