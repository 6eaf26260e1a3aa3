"""Everything that must be refused: in OpenAI's shape, naming the field, without a 5xx, and the next good request works."""

from __future__ import annotations

import asyncio
import contextlib
import json

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemel.config.server import ServerConfig
from gemel.server.protocol import REFUSED, ChatBody, CompletionBody, Message
from tests.server.conftest import MODEL, in_process, listening, user
from tests.server.fake_llm import FakeLLM

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"


def error_of(response: httpx.Response, status: int = 400) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    return error


WRONG_FIELDS = {
    "temperature": (-0.1, 101, "hot", [], True, {}),
    "top_p": (0, 1.01, "1"),
    "top_k": (-2, 1.5, "3", 10**30),
    "min_p": (-1, 2),
    "n": (0, -1, 65, 10**9, 10**30, 1.5, "2", True),
    "max_tokens": (0, -5, 1.0, "10"),
    "max_completion_tokens": (0, "x"),
    "min_tokens": (-1,),
    "seed": (2**64, -(2**63) - 1, 1.5, "7"),
    "presence_penalty": (-2.1, 2.1),
    "frequency_penalty": (3,),
    "repetition_penalty": (0, -1, 11),
    "stop": (7, [7], [""], "", ["x"] * 17, ["x"] * 100_000, ["y" * 1001], {"a": 1}),
    "stop_token_ids": ([-1], list(range(17)), 5, ["5"]),
    "logit_bias": ({"a": 1}, {"-1": 1}, {"5": 101}, {"5": "1"}, {"5.0": 1}, {str(k): 1 for k in range(1025)}, [1], {"999999": 1}),
    "top_logprobs": (21, -1, "3", True),
    "logprobs": (1, "true"),
    "stream": ("yes", 1),
    "stream_options": ({"include_usage": True}, {"x": 1}),
    "user": (5, "x" * 257),
    "metadata": ({"a": 1}, {str(k): "" for k in range(17)}, "x"),
    "priority": (1001, "1"),
    "cache_salt": (1, "x" * 257),
    "beam_width": (0, 65, "2"),
    "messages": ([], "hi", [7], [{}], [{"role": "user"}, "x"], [{"role": "root", "content": "x"}], [{"role": "user", "content": 7}]),
    "tools": ("x", [{}], [{"type": "retrieval"}], [{"type": "function", "function": {"name": ""}}]),
    "tool_choice": ("required", {"type": "function", "function": {"name": "f"}}, 5),
    "response_format": ({"type": "json_object"}, {"type": "json_schema", "json_schema": {}}, "text"),
    "add_generation_prompt": ("no",),
    "continue_final_message": (1,),
}


@pytest.mark.parametrize("field", WRONG_FIELDS)
async def test_wrong_values_name_their_field(llm: FakeLLM, field: str) -> None:
    async with in_process(llm) as client:
        for value in WRONG_FIELDS[field]:
            extra = {"logprobs": True} if field == "top_logprobs" else {}
            error = error_of(await client.post(CHAT, json=user(**extra) | {field: value}))
            assert field in (error["param"] or error["message"]), (value, error)
            assert len(error["message"]) < 1000
        assert (await client.post(CHAT, json=user())).status_code == 200
    assert len(llm.seen) == 1 and not llm.running


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"temprature": 1}, "'temperature'"),
        ({"max_token": 1}, "'max_tokens'"),
        ({"messages": [{"role": "user", "contents": "x"}]}, "'content'"),
        ({"messages": [{"role": "user"}]}, "needs 'content'"),
        ({"messages": [{"role": "assistant", "content": None}]}, "needs 'content'"),
        ({"best_of": 2}, "use n"),
        ({"functions": []}, "use tools"),
        ({"store": True}, "nothing is stored"),
        ({"parallel_tool_calls": True}, "not supported"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}]},
            "image_url",
        ),
        ({"response_format": {"type": "json_object"}}, "'text'"),
        ({"tool_choice": "required"}, "'auto'"),
        ({"top_logprobs": 2}, "'logprobs'"),
        ({"stream_options": {}}, "'stream'"),
        ({"beam_width": 2, "stream": True}, "cannot stream"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "give one"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens = 5"),
        ({"beam_width": 2, "n": 3}, "beam_width = 2"),
        ({"beam_width": 2, "top_k": 3}, "does not sample"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "choose one"),
        ({"\u0000": 1}, "unknown field"),
    ],
)
async def test_refusals_say_what_to_do(llm: FakeLLM, body: dict, said: str) -> None:
    async with in_process(llm) as client:
        assert said in error_of(await client.post(CHAT, json=user() | body))["message"]
    assert not llm.seen


async def test_what_is_false_anyway_may_be_said(llm: FakeLLM) -> None:
    async with in_process(llm) as client:
        assert (
            await client.post(CHAT, json=user(store=False, parallel_tool_calls=False, response_format={"type": "text"}))
        ).status_code == 200
        assert (await client.post("/v1/completions", json={"prompt": "x", "echo": False})).status_code == 200
        assert "echo" in error_of(await client.post("/v1/completions", json={"prompt": "x", "echo": True}))["message"]


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [1, "a"], ["a", 1], [[1], "a"], [-1], [2**31], [1.0], [True], {}, 5, [[1], []], [[[1]]], None, [None]]
)
async def test_wrong_prompts(llm: FakeLLM, prompt: object) -> None:
    async with in_process(llm) as client:
        error_of(await client.post("/v1/completions", json={"prompt": prompt}))
    assert not llm.seen


async def test_an_unknown_model_is_404(llm: FakeLLM) -> None:
    async with in_process(llm) as client:
        error = error_of(await client.post(CHAT, json=user(model="gpt-4o")), 404)
    assert error["code"] == "model_not_found" and MODEL in error["message"]


async def test_too_many_tokens(llm: FakeLLM) -> None:
    async with in_process(llm) as client:
        long = error_of(await client.post("/v1/completions", json={"prompt": [5] * 9000, "max_tokens": 1}))
        asked = error_of(await client.post("/v1/completions", json={"prompt": [5] * 8000, "max_tokens": 193}))
        in_chat = error_of(await client.post(CHAT, json=user("x" * 9000)))
        fits = await client.post("/v1/completions", json={"prompt": [5] * 8000, "max_tokens": 192})
    assert long["code"] == asked["code"] == in_chat["code"] == "context_length_exceeded"
    assert long["message"].startswith("This model's maximum context length is 8192 tokens.") and "9000" in long["message"]
    assert "8193" in asked["message"] and (long["param"], in_chat["param"]) == ("prompt", "messages")
    assert fits.status_code == 200


async def test_too_many_outputs(llm: FakeLLM) -> None:
    async with in_process(llm, ServerConfig(max_outputs=8)) as client:
        for body in (
            {"prompt": ["x"] * 9},
            {"prompt": ["x"] * 3, "n": 3},
            {"prompt": ["x"] * 3, "beam_width": 3},
            {"prompt": ["x"] * 100_000},
        ):
            error = error_of(await client.post("/v1/completions", json=body))
            assert error["code"] == "too_many_outputs" and "8" in error["message"]
        assert (await client.post("/v1/completions", json={"prompt": ["x"] * 4, "n": 2})).status_code == 200


INVALID_JSON = {
    "empty": b"",
    "text": b"hello",
    "truncated": b'{"messages": [',
    "array": b"[1]",
    "null": b"null",
    "number": b"5",
    "nan": b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}',
    "infinity": b'{"messages":[{"role":"user","content":"x"}],"temperature":Infinity}',
    "overflow": b'{"messages":[{"role":"user","content":"x"}],"temperature":1e999}',
    "digits": b'{"messages":[{"role":"user","content":"x"}],"seed":' + b"9" * 100_000 + b"}",
    "utf-8": b'{"messages":[{"role":"user","content":"\xff\xfe"}]}',
    "utf-8 surrogate": b'{"messages":[{"role":"user","content":"\xed\xa0\x80"}]}',
    "utf-16": '{"messages":[]}'.encode("utf-16"),
    "bom": b"\xef\xbb\xbf{}",
    "lone surrogate": b'{"messages":[{"role":"user","content":"\\ud800"}]}',
    "lone surrogate key": b'{"\\udfff": 1}',
    "duplicate": b'{"messages":[{"role":"user","content":"x"}],"n":1,"n":2}',
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "deep in tools": b'{"messages":[{"role":"user","content":"x"}],"tools":' + b"[" * 65 + b"]" * 65 + b"}",
    "control": b'{"messages":[{"role":"user","content":"a\nb"}]}',
}


@pytest.mark.parametrize("name", INVALID_JSON)
async def test_bodies_that_are_not_json(llm: FakeLLM, name: str) -> None:
    async with in_process(llm) as client:
        error = error_of(await client.post(CHAT, content=INVALID_JSON[name], headers={"content-type": "application/json"}))
        assert error["code"] == "invalid_json" and error["type"] == "invalid_request_error"
        assert (await client.post(CHAT, json=user())).status_code == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


def fuzz(path: str, bodies: st.SearchStrategy[dict]) -> None:
    """Whatever `bodies` makes is answered or refused in the error shape, and the next good request works."""

    @settings(max_examples=120, deadline=None)
    @given(body=bodies)
    def one(body: dict) -> None:
        async def ask() -> None:
            llm = FakeLLM()
            async with in_process(llm) as client:
                response = await client.post(path, content=json.dumps(body).encode())
                if response.status_code != 200:
                    assert response.status_code in (400, 404), response.text
                    error_of(response, response.status_code)
                assert (await client.post(CHAT, json=user())).status_code == 200
            assert not llm.running

        asyncio.run(ask())

    one()


def test_fuzzed_chats() -> None:
    field = st.sampled_from(sorted({*ChatBody.model_fields, *REFUSED}))
    fuzz(CHAT, st.builds(lambda fields: user() | fields, st.dictionaries(field, JSON, min_size=1, max_size=3)))


def test_fuzzed_messages() -> None:
    field = st.sampled_from(sorted(Message.model_fields))
    known = st.sampled_from(["user", "assistant", "text", "function", "", "x"])
    message = st.dictionaries(field, JSON | known, max_size=4)
    fuzz(CHAT, st.builds(lambda turns: {"messages": turns}, st.lists(message, max_size=3)))


def test_fuzzed_completions() -> None:
    prompt = JSON | st.lists(st.integers(-5, 300), max_size=5) | st.lists(st.lists(st.integers(0, 300), max_size=3), max_size=3)
    field = st.sampled_from(sorted(CompletionBody.model_fields))
    fuzz("/v1/completions", st.builds(lambda fields, p: fields | {"prompt": p}, st.dictionaries(field, JSON, max_size=2), prompt))


async def test_a_nul_is_a_character(llm: FakeLLM) -> None:
    async with in_process(llm) as client:
        assert (await client.post(CHAT, json=user("a\u0000b"))).status_code == 200
    assert 3 in llm.seen[0][0]


async def test_unknown_routes_and_methods(llm: FakeLLM) -> None:
    async with in_process(llm) as client:
        assert error_of(await client.get("/v1/nothing"), 404)["code"] == "unknown_route"
        assert error_of(await client.get("/health/"), 404)["code"] == "unknown_route"
        response = await client.get(CHAT)
        assert error_of(response, 405)["code"] == "method_not_allowed" and "POST" in response.headers["allow"]


async def test_bodies_over_the_limit(llm: FakeLLM) -> None:
    limit = 20_000

    async def chunks(count: int):  # no Content-Length: sent chunked
        for _ in range(count):
            yield b" " * 1000

    exact = json.dumps(user("x")).encode()
    async with listening(llm, ServerConfig(max_body_bytes=limit)) as url, httpx.AsyncClient(base_url=url) as client:
        assert error_of(await client.post(CHAT, content=b"x" * (limit + 1)), 413)["code"] == "body_too_large"
        assert error_of(await client.post(CHAT, content=chunks(limit // 1000 + 1)), 413)["code"] == "body_too_large"
        assert (await client.post(CHAT, content=exact + b" " * (limit - len(exact)))).status_code == 200
        assert (await client.post(CHAT, json=user())).status_code == 200


async def test_fifty_megabytes_are_refused_before_they_are_read(llm: FakeLLM) -> None:
    async with listening(llm) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        with contextlib.suppress(httpx.WriteError, httpx.ReadError):  # the server may close while we still send
            error_of(await client.post(CHAT, content=b"x" * 50_000_000), 413)
        assert (await client.post(CHAT, json=user())).status_code == 200
