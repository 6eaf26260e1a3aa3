from __future__ import annotations

import asyncio
import json
import threading

import httpx
import pytest

from gemel.config import CapacityError
from tests.server.conftest import MODEL, in_process, user
from tests.server.fake_llm import FakeLLM

pytestmark = pytest.mark.anyio


def sse_events(response: httpx.Response) -> list[dict]:
    """The JSON of every event; the last line must be [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


async def test_answers_in_one_piece(llm: FakeLLM) -> None:
    async with in_process(llm) as client:
        response = await client.post("/v1/chat/completions", json=user("Hi"))
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "chat.completion" and body["model"] == MODEL and body["id"] == f"chatcmpl-{response.headers['x-request-id']}"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": llm.reply, "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    num_prompt = len("user: Hi") + 3  # turn marks around it and the open turn behind
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": len(llm.reply),
        "total_tokens": num_prompt + len(llm.reply),
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert llm.aborted == []


async def test_streams_the_same_text(llm: FakeLLM) -> None:
    llm.reply = "Grüße, 世界 and 🙂."
    async with in_process(llm) as client:
        response = await client.post("/v1/chat/completions", json=user(stream=True, stream_options={"include_usage": True}))
    assert response.headers["content-type"].startswith("text/event-stream")
    events = sse_events(response)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1]) == llm.reply
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 2) + ["stop"]
    assert all(e["usage"] is None for e in events[:-1])
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == len(llm.reply.encode())
    assert len({e["id"] for e in events}) == 1


async def test_a_stream_without_usage_has_no_usage_key(llm: FakeLLM) -> None:
    async with in_process(llm) as client:
        events = sse_events(await client.post("/v1/chat/completions", json=user(stream=True)))
    assert all("usage" not in e and e["choices"] for e in events)


async def test_every_sampling_field_reaches_the_engine(llm: FakeLLM) -> None:
    fields: dict[str, object] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1,
        "repetition_penalty": 1.5, "logit_bias": {"5": 3, "9": -100}, "seed": 12, "stop": "x", "stop_token_ids": [5], "ignore_eos": True,
        "max_tokens": 40, "min_tokens": 2, "n": 3,
    }  # fmt: skip
    async with in_process(llm) as client:
        response = await client.post(
            "/v1/chat/completions", json=user(**fields, priority=-2, cache_salt="tenant", logprobs=True, top_logprobs=2)
        )
    assert response.status_code == 200, response.text
    ((_, params, priority, salt),) = llm.seen
    for name, value in fields.items():
        want = {"logit_bias": {5: 3.0, 9: -100.0}, "stop": ("x",), "stop_token_ids": (5,)}.get(name, value)
        assert getattr(params, name) == want, name
    assert params.logprobs == 2 and (priority, salt) == (-2, "tenant")


async def test_defaults_are_openais(llm: FakeLLM) -> None:
    async with in_process(llm) as client:
        await client.post("/v1/chat/completions", json=user())
    params = llm.seen[0][1]
    assert (params.temperature, params.top_p, params.n, params.max_tokens, params.logprobs) == (1.0, 1.0, 1, None, None)


async def test_nulls_mean_not_given(llm: FakeLLM) -> None:
    nothing = dict.fromkeys(["temperature", "stop", "n", "seed", "tools", "logit_bias", "max_tokens", "stream", "user", "response_format"])
    async with in_process(llm) as client:
        response = await client.post("/v1/chat/completions", json=user(**nothing))
    assert response.status_code == 200, response.text


async def test_n_outputs_and_stop_string(llm: FakeLLM) -> None:
    async with in_process(llm) as client:
        body = (await client.post("/v1/chat/completions", json=user(n=3, stop=["from"]))).json()
        events = sse_events(await client.post("/v1/chat/completions", json=user(n=3, stream=True)))
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert {c["stop_reason"] for c in body["choices"]} == {"from"} and {c["finish_reason"] for c in body["choices"]} == {"stop"}
    for index in range(3):
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in mine) == llm.reply
        assert mine[0]["delta"]["role"] == "assistant"


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_in_the_chat_shape(llm: FakeLLM, stream: bool) -> None:
    llm.reply = "é!"  # two tokens that are half a character each, one whole
    async with in_process(llm) as client:
        response = await client.post("/v1/chat/completions", json=user(logprobs=True, top_logprobs=2, stream=stream))
    if stream:
        content = [t for e in sse_events(response) for t in (e["choices"][0]["logprobs"] or {"content": []})["content"]]
    else:
        content = response.json()["choices"][0]["logprobs"]["content"]
    assert [t["bytes"] for t in content] == [[0xC3], [0xA9], [33]]
    assert content[2] == {
        "token": "!",
        "logprob": -0.5,
        "bytes": [33],
        "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}, {"token": "b", "logprob": -1.5, "bytes": [98]}],
    }


async def test_length_is_a_finish_reason(llm: FakeLLM) -> None:
    async with in_process(llm) as client:
        for name in ("max_tokens", "max_completion_tokens"):
            body = (await client.post("/v1/chat/completions", json=user(**{name: 5}))).json()
            assert body["choices"][0]["message"]["content"] == llm.reply[:5] and body["choices"][0]["finish_reason"] == "length"


async def test_continues_the_last_turn(llm: FakeLLM) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}]
    async with in_process(llm) as client:
        body = {"messages": turns, "continue_final_message": True}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        assert llm.tokenizer.decode(llm.seen[0][0]).endswith("assistant: Well,") and llm.seen[0][0][-1] != 2
        refused = await client.post("/v1/chat/completions", json={"messages": turns[:1], "continue_final_message": True})
        assert refused.status_code == 400 and "'user'" in refused.json()["error"]["message"]


async def test_messages_reach_the_template(llm: FakeLLM) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], "name": "ann"},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "annotations": [],
            "audio": None,
            "function_call": None,
            "tool_calls": [call],
        },
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    ]
    rendered = []
    original = llm.tokenizer.render_chat
    llm.tokenizer.render_chat = lambda *args: rendered.append(args) or original(*args)  # type: ignore[method-assign]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"default": None}}}}}
    async with in_process(llm) as client:
        for choice, want in (("auto", [tool]), ("none", None)):
            response = await client.post("/v1/chat/completions", json={"messages": turns, "tools": [tool], "tool_choice": choice})
            assert response.status_code == 200, response.text
            messages, tools, *_ = rendered[0]
            assert tools == want
            rendered.clear()
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert messages[1] == {"role": "user", "content": "one two", "name": "ann"}
    assert messages[2] == {"role": "assistant", "content": "", "tool_calls": [call | {"function": {"name": "f", "arguments": {"a": 1}}}]}
    assert messages[3] == {"role": "tool", "content": "3", "tool_call_id": "c1"}


async def test_tools_that_the_template_does_not_show_are_refused(llm: FakeLLM) -> None:
    llm.tokenizer.shows_tools = False
    tool = {"type": "function", "function": {"name": "f"}}
    async with in_process(llm) as client:
        for path, body in (("/v1/chat/completions", user(tools=[tool])), ("/tokenize", user(tools=[tool]))):
            response = await client.post(path, json=body)
            assert response.status_code == 400 and response.json()["error"]["param"] == "tools"
        assert (await client.post("/v1/chat/completions", json=user(tools=[tool], tool_choice="none"))).status_code == 200
        assert (await client.post("/v1/chat/completions", json=user(tools=[]))).status_code == 200


async def test_tokenizing_does_not_hold_up_the_others(llm: FakeLLM) -> None:
    """Rendering and encoding wait for an answer to another request; on the event loop that would never come."""
    answered = threading.Event()

    def patient(original):
        def call(*args, **kwargs):
            assert answered.wait(10)
            return original(*args, **kwargs)

        return call

    llm.tokenizer.encode, llm.tokenizer.render_chat = patient(llm.tokenizer.encode), patient(llm.tokenizer.render_chat)  # type: ignore[method-assign]
    async with in_process(llm) as client:
        for path, body in (("/v1/chat/completions", user()), ("/v1/completions", {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
            answered.clear()
            asking = asyncio.create_task(client.post(path, json=body))
            await asyncio.sleep(0.02)
            assert (await client.get("/health")).status_code == 200
            answered.set()
            assert (await asking).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_is_503_with_retry_after(llm: FakeLLM, stream: bool) -> None:
    llm.refuse = CapacityError("the queue holds 1024 requests already; try again later")
    async with in_process(llm) as client:
        response = await client.post("/v1/chat/completions", json=user(stream=stream))
        assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
        assert response.json()["error"]["code"] == "overloaded" and "1024" in response.json()["error"]["message"]
        llm.refuse = None
        assert (await client.post("/v1/chat/completions", json=user())).status_code == 200


@pytest.mark.parametrize("how", ["fail_after", "crash_after"])
async def test_a_failure_ends_only_its_request_and_tells_nothing(llm: FakeLLM, how: str) -> None:
    setattr(llm, how, 3)
    async with in_process(llm) as client:
        whole = await client.post("/v1/chat/completions", json=user())
        stream = await client.post("/v1/chat/completions", json=user(stream=True))
        setattr(llm, how, None)
        assert (await client.post("/v1/chat/completions", json=user())).status_code == 200
    assert whole.status_code == 500 and whole.json()["error"]["type"] == "server_error"
    assert whole.headers["x-request-id"] in whole.json()["error"]["message"]
    events = stream.text.strip().split("\n\n")
    assert stream.status_code == 200 and "[DONE]" not in stream.text
    assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert "Hel" in "".join(json.loads(e.removeprefix("data: "))["choices"][0]["delta"].get("content", "") for e in events[:-1])
    for text in (whole.text, stream.text):
        assert "NaN" not in text and "secret" not in text and "Traceback" not in text
    assert not llm.running
