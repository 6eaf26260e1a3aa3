from __future__ import annotations

import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import in_process, user
from tests.server.fake_llm import FakeLLM

pytestmark = pytest.mark.anyio


async def scrape(client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = (await client.get("/metrics")).text
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in text_string_to_metric_families(text) for s in family.samples}


async def test_counts_equal_what_the_client_saw(llm: FakeLLM) -> None:
    async with in_process(llm) as client:
        num_tokens = 0
        for n in (1, 2, 3):
            num_tokens += (await client.post("/v1/chat/completions", json=user(n=n))).json()["usage"]["completion_tokens"]
        await client.post("/v1/chat/completions", json=user(max_tokens=1, stream=True))
        await client.post("/v1/chat/completions", json=user(n=0))
        await client.get("/wp-admin.php")
        found = await scrape(client)
    assert found["gemel_output_tokens_total", ()] == num_tokens + 1 == llm.output_tokens
    assert found["gemel_outputs_finished_total", (("reason", "stop"),)] == 6
    assert found["gemel_outputs_finished_total", (("reason", "length"),)] == 1
    assert found["gemel_time_to_first_token_seconds_count", ()] == 4  # one per request
    assert found["gemel_time_per_output_token_seconds_count", ()] == 6  # outputs of more than one token
    path = ("path", "/v1/chat/completions")
    assert found["gemel_http_responses_total", (path, ("status", "200"))] == 4
    assert found["gemel_http_responses_total", (path, ("status", "400"))] == 1
    assert found["gemel_http_responses_total", (("path", "other"), ("status", "404"))] == 1
    assert found["gemel_kv_blocks", ()] == 100 and found["gemel_kv_blocks_used", ()] == 0 and found["gemel_kv_blocks_cached", ()] == 7
    assert found["gemel_prefix_hit_tokens_total", ()] == 30
    assert found["gemel_prefix_miss_tokens_total", (("reason", "cold"),)] == 60
    assert found["gemel_sequences_running", ()] == found["gemel_sequences_waiting", ()] == 0
    assert found["gemel_preemptions_total", ()] == 1 and found["gemel_healthy", ()] == 1


async def test_times_are_a_clients(llm: FakeLLM) -> None:
    llm.delay_s = 0.02
    async with in_process(llm) as client:
        await client.post("/v1/chat/completions", json=user(max_tokens=5))
        found = await scrape(client)
    assert found["gemel_time_to_first_token_seconds_sum", ()] >= 0.02
    assert found["gemel_time_per_output_token_seconds_sum", ()] >= 0.02


async def test_two_apps_do_not_share_counters(llm: FakeLLM) -> None:
    async with in_process(llm) as one, in_process(FakeLLM()) as two:
        await one.post("/v1/chat/completions", json=user())
        assert (await scrape(one))["gemel_time_to_first_token_seconds_count", ()] == 1
        assert (await scrape(two))["gemel_time_to_first_token_seconds_count", ()] == 0


async def test_the_panel(llm: FakeLLM) -> None:
    async with in_process(llm) as client:
        before = (await client.get("/stats")).json()
        assert before["ttft_s"] is None and before["output_tokens_per_s"] == 0
        await client.post("/v1/chat/completions", json=user())
        after = (await client.get("/stats")).json()
    assert after["output_tokens"] == len(llm.reply) and after["output_tokens_per_s"] > 0 and after["ttft_s"] > 0
    assert after["prefix_hit_rate"] == 0.3 and (after["blocks_used"], after["blocks_cached"], after["blocks_total"]) == (0, 7, 100)


async def test_health(llm: FakeLLM) -> None:
    async with in_process(llm) as client:
        assert (await client.get("/health")).json() == {"status": "ok"}
        llm.healthy = False
        assert (await client.get("/health")).status_code == 503
        llm.healthy, llm.draining = True, True
        response = await client.get("/health")
    assert (response.status_code, response.json()) == (503, {"status": "draining"})


async def test_one_log_line_per_request_that_nobody_can_forge(llm: FakeLLM, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gemel.access")
    async with in_process(llm) as client:
        response = await client.post("/v1/chat/completions", json=user(user="eve\nPOST / 200", metadata={"k\r": "v"}))
        await client.get("/a%0d%0aPOST%20/forged")
    first, second = (record.getMessage() for record in caplog.records if record.name == "gemel.access")
    assert f"200 id={response.headers['x-request-id']}" in first and "output=26" in first and "ttft=" in first and "finish=stop" in first
    assert r'user="eve\nPOST / 200"' in first and r'metadata={"k\r": "v"}' in first
    assert "404" in second
    assert not any(ch in line for line in (first, second) for ch in "\r\n")
