from __future__ import annotations

import pytest

from tests.server.conftest import MODEL, in_process
from tests.server.fake_llm import FIRST_BYTE, FakeLLM
from tests.server.test_chat import sse_events

pytestmark = pytest.mark.anyio


async def test_prompts_as_text_or_ids(llm: FakeLLM) -> None:
    ids = llm.tokenizer.encode("ab")
    for prompt, want in (("ab", [ids]), (ids, [ids]), (["ab", "c"], [ids, llm.tokenizer.encode("c")]), ([ids, [7]], [ids, [7]])):
        llm.seen.clear()
        async with in_process(llm) as client:
            body = (await client.post("/v1/completions", json={"model": MODEL, "prompt": prompt, "max_tokens": 5, "n": 2})).json()
        assert [list(seen[0]) for seen in llm.seen] == want
        assert [c["index"] for c in body["choices"]] == list(range(2 * len(want)))
        assert all(c["text"] == llm.reply[:5] and c["finish_reason"] == "length" for c in body["choices"])
        assert body["usage"]["prompt_tokens"] == sum(map(len, want)) and body["usage"]["completion_tokens"] == 10 * len(want)
        assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 4 * len(want)}
        assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")


async def test_sixteen_tokens_unless_told(llm: FakeLLM) -> None:
    async with in_process(llm) as client:
        body = (await client.post("/v1/completions", json={"prompt": "x"})).json()
    assert body["choices"][0]["text"] == llm.reply[:16]


async def test_streams_several_prompts_side_by_side(llm: FakeLLM) -> None:
    async with in_process(llm) as client:
        request = {"prompt": ["x", "y"], "n": 2, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5}
        events = sse_events(await client.post("/v1/completions", json=request))
    assert events[-1]["usage"]["completion_tokens"] == 20 and events[-1]["choices"] == []
    for index in range(4):
        mine = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in mine) == llm.reply[:5] and mine[-1]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_in_the_completions_shape(llm: FakeLLM, stream: bool) -> None:
    async with in_process(llm) as client:
        response = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 3, "logprobs": 2, "stream": stream})
    if stream:
        parts = [e["choices"][0]["logprobs"] for e in sse_events(response) if e["choices"][0]["logprobs"]]
        got = {key: [item for part in parts for item in part[key]] for key in parts[0]}
    else:
        got = response.json()["choices"][0]["logprobs"]
    assert got == {
        "tokens": ["H", "e", "l"],
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [{"a": -0.5, "b": -1.5}] * 3,
        "text_offset": [0, 1, 2],
    }


async def test_a_failing_prompt_ends_its_siblings(llm: FakeLLM) -> None:
    llm.fail_after = 2
    async with in_process(llm) as client:
        response = await client.post("/v1/completions", json={"prompt": ["x", "y", "z"]})
    assert response.status_code == 500
    assert not llm.running


async def test_tokenize_and_back(llm: FakeLLM) -> None:
    async with in_process(llm) as client:
        body = (await client.post("/tokenize", json={"prompt": "né"})).json()
        assert body == {"tokens": [b + FIRST_BYTE for b in "né".encode()], "count": 3, "max_model_len": 8192}
        assert (await client.post("/detokenize", json={"tokens": body["tokens"]})).json() == {"text": "né"}
        chat = (
            await client.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": False})
        ).json()
        assert chat["tokens"] == [1, *llm.tokenizer.encode("user: x"), 2]
        for wrong in ({}, {"prompt": "a", "messages": [{"role": "user", "content": "x"}]}, {"prompt": "a", "promt": "b"}):
            assert (await client.post("/tokenize", json=wrong)).status_code == 400
        for ids in ([llm.engine.vocab_size], [-1], ["a"], [True], [10**30]):
            response = await client.post("/detokenize", json={"tokens": ids})
            assert response.status_code == 400 and response.json()["error"]["param"].startswith("tokens")


async def test_models(llm: FakeLLM) -> None:
    async with in_process(llm) as client:
        (card,) = (await client.get("/v1/models")).json()["data"]
        assert card["id"] == MODEL and card["object"] == "model" and card["max_model_len"] == 8192
        assert (await client.get(f"/v1/models/{MODEL}")).json() == card
        missing = await client.get("/v1/models/other")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
