from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import cache

import pytest

from gemel.config.errors import CapacityError, CheckpointError, RequestError
from gemel.config.sampling import SamplingParams
from gemel.engine.request import FinishReason
from gemel.llm.online import AsyncLLM, Delta
from gemel.tokenizer.tokenizer import Tokenizer
from tests.llm.fake_engine import STOP_TOKEN, FakeEngine
from tests.tokenizer.shapes import byte_level_library


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level_library())


@asynccontextmanager
async def serving(engine: FakeEngine) -> AsyncIterator[AsyncLLM]:
    llm = AsyncLLM(engine, tokenizer())  # type: ignore[arg-type]
    engine.thread = None
    await llm.start()
    try:
        yield llm
    finally:
        await llm.close()


async def collect(llm: AsyncLLM, prompt: str, params: SamplingParams, request_id: str) -> list[Delta]:
    return [delta async for delta in llm.generate(tokenizer().encode(prompt), params, request_id=request_id)]


async def until(true: object) -> None:
    deadline_s = time.monotonic() + 20
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline_s, "it did not happen"
        await asyncio.sleep(0.001)


def text_of(prompt: str, num_tokens: int, index: int = 0) -> str:
    ids = tokenizer().encode(prompt)
    return tokenizer().decode([ids[(index + i) % len(ids)] for i in range(num_tokens)])


def test_many_callers_get_each_their_own() -> None:
    async def main() -> None:
        engine = FakeEngine()
        async with serving(engine) as llm:
            calls = [collect(llm, f"caller {i}", SamplingParams(max_tokens=5 + i, n=1 + i % 3), f"r{i}") for i in range(30)]
            for i, deltas in enumerate(await asyncio.gather(*calls)):
                for index in range(1 + i % 3):
                    mine = [delta for delta in deltas if delta.index == index]
                    assert "".join(delta.text for delta in mine) == text_of(f"caller {i}", 5 + i, index)
                    assert [delta.num_output for delta in mine] == list(range(1, 6 + i))
                    assert [delta.finish_reason for delta in mine] == [None] * (4 + i) + [FinishReason.LENGTH]
                    assert mine[0].num_prompt == len(tokenizer().encode(f"caller {i}"))
            await until(lambda: engine.num_checks > 0)
            assert llm.healthy
            assert llm.stats().output_tokens == sum((5 + i) * (1 + i % 3) for i in range(30))
        assert not llm.healthy

    asyncio.run(main())


def test_stop_strings_end_an_output_through_the_engine() -> None:
    async def main() -> None:
        engine = FakeEngine()
        async with serving(engine) as llm:
            deltas = await collect(llm, "one. two", SamplingParams(stop=(". t",)), "r")
            assert "".join(delta.text for delta in deltas) == "one"
            assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.STOP, ". t")
            assert engine.stopped == [("r", 0)]
            ended = [delta async for delta in llm.generate([300, STOP_TOKEN], request_id="s")]
            assert (ended[-1].stop_reason, ended[-1].tokens, ended[-1].num_output) == (STOP_TOKEN, (), 1)

    asyncio.run(main())


def test_leaving_aborts_within_a_step() -> None:
    async def main() -> None:
        engine = FakeEngine(step_s=0.002)
        async with serving(engine) as llm:
            async with aclosing(llm.generate([300], request_id="left")) as deltas:
                async for _ in deltas:
                    break
            num_steps = engine.num_steps
            await until(lambda: engine.aborted == ["left"])
            assert engine.num_steps <= num_steps + 2

            task = asyncio.create_task(collect(llm, "a", SamplingParams(), "cancelled"))
            await until(lambda: "cancelled" in engine.jobs)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: engine.aborted == ["left", "cancelled"])
            again = await collect(llm, "again", SamplingParams(max_tokens=2), "left")
            assert "".join(delta.text for delta in again) == text_of("again", 2)
            assert llm.healthy

    asyncio.run(main())


def test_an_abort_from_elsewhere_tells_the_caller() -> None:
    async def main() -> None:
        engine = FakeEngine(step_s=0.001)
        async with serving(engine) as llm:
            task = asyncio.create_task(collect(llm, "a b", SamplingParams(n=2), "r"))
            await until(lambda: "r" in engine.jobs)
            llm.abort("r")
            llm.abort("nobody")
            assert [delta.finish_reason for delta in (await task)[-2:]] == [FinishReason.ABORT] * 2
            assert not engine.jobs

    asyncio.run(main())


def test_refusals_reach_their_caller_only() -> None:
    async def main() -> None:
        engine = FakeEngine(max_waiting=1, step_s=0.001)
        async with serving(engine) as llm:
            with pytest.raises(RequestError, match="empty"):
                await collect(llm, "", SamplingParams(), "empty")
            task = asyncio.create_task(collect(llm, "a", SamplingParams(), "r"))
            await until(lambda: "r" in engine.jobs)
            with pytest.raises(CapacityError, match="the limit is 1"):
                await collect(llm, "b", SamplingParams(), "more")
            with pytest.raises(RequestError, match="in use"):
                await collect(llm, "b", SamplingParams(), "r")
            assert "r" in engine.jobs
            llm.abort("r")
            assert (await task)[-1].finish_reason is FinishReason.ABORT
            assert llm.healthy

    asyncio.run(main())


def test_a_failing_step_ends_its_requests_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        engine = FakeEngine()

        def fail(step: int) -> None:
            if step == 3:
                raise RuntimeError("boom")

        engine.fail = fail
        async with serving(engine) as llm:
            deltas = await collect(llm, "a b", SamplingParams(n=2), "r")
            assert [delta.finish_reason for delta in deltas[-2:]] == [FinishReason.ERROR] * 2
            assert deltas[-1].error == "the engine failed: RuntimeError: boom"
            assert not llm.healthy
            assert "".join(delta.text for delta in await collect(llm, "next", SamplingParams(max_tokens=2), "s")) == text_of("next", 2)
            assert llm.healthy

    asyncio.run(main())
    assert "boom" in caplog.text


def test_a_leak_makes_it_unhealthy_for_good() -> None:
    async def main() -> None:
        engine = FakeEngine()
        async with serving(engine) as llm:
            engine.broken = True
            await collect(llm, "a", SamplingParams(max_tokens=1), "r")
            await until(lambda: not llm.healthy)
            engine.broken = False
            assert len(await collect(llm, "a", SamplingParams(max_tokens=1), "s")) == 1
            assert not llm.healthy

    asyncio.run(main())


def test_an_idle_engine_is_checked_once_and_left_alone() -> None:
    async def main() -> None:
        engine = FakeEngine()
        async with serving(engine) as llm:
            await until(lambda: engine.num_checks == 1)
            await collect(llm, "a", SamplingParams(max_tokens=1), "r")
            await until(lambda: engine.num_checks == 2)
            num_calls = engine.num_calls
            await asyncio.sleep(0.05)
            assert (engine.num_calls, engine.num_checks) == (num_calls, 2)

    asyncio.run(main())


def test_an_engine_that_waits_is_not_hammered() -> None:
    async def main() -> None:
        engine = FakeEngine(idle_steps=20)
        async with serving(engine) as llm:
            begin_s = time.monotonic()
            await collect(llm, "a", SamplingParams(max_tokens=1), "r")
            assert time.monotonic() - begin_s >= 0.019  # at least a millisecond of sleep in each of the twenty

    asyncio.run(main())


def test_one_wakeup_of_the_loop_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        engine = FakeEngine()
        async with serving(engine) as llm:
            loop, calls = asyncio.get_running_loop(), []
            wake = loop.call_soon_threadsafe

            def counted(callback: object, *args: object, **named: object) -> object:
                calls.append(callback)
                return wake(callback, *args, **named)  # type: ignore[arg-type]

            monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
            await asyncio.gather(*(collect(llm, f"caller {i}", SamplingParams(max_tokens=20), f"r{i}") for i in range(16)))
            assert len(calls) <= engine.num_steps
            monkeypatch.undo()

    asyncio.run(main())


def test_closing_lets_running_requests_end_and_refuses_new_ones() -> None:
    async def main() -> None:
        engine = FakeEngine(step_s=0.002)
        llm = AsyncLLM(engine, tokenizer())  # type: ignore[arg-type]
        with pytest.raises(CapacityError, match="not been started"):
            await collect(llm, "a", SamplingParams(), "early")
        engine.thread = None
        await llm.start()
        task = asyncio.create_task(collect(llm, "a", SamplingParams(max_tokens=20), "r"))
        await until(lambda: "r" in engine.jobs)
        closing = asyncio.create_task(llm.close(drain_s=20))
        await until(lambda: llm.draining)
        with pytest.raises(CapacityError, match="closing"):
            await collect(llm, "b", SamplingParams(), "late")
        assert (await task)[-1].finish_reason is FinishReason.LENGTH
        await closing
        await llm.close()
        assert engine.aborted == []

    asyncio.run(main())


@pytest.mark.parametrize("patience_s", [0.0, 0.01, 60.0])
def test_what_does_not_end_in_time_is_aborted(patience_s: float) -> None:
    async def main() -> None:
        engine = FakeEngine(step_s=0.01)
        async with serving(engine) as llm:
            task = asyncio.create_task(collect(llm, "a", SamplingParams(max_tokens=100_000), "r"))
            await until(lambda: "r" in engine.jobs)
            closing = asyncio.create_task(llm.close(drain_s=patience_s))
            await until(lambda: llm.draining)
            if patience_s > 1:
                await llm.close()  # the impatient second call
            await closing
            assert (await task)[-1].finish_reason is FinishReason.ABORT
            assert engine.aborted == ["r"]

    asyncio.run(main())


def test_a_template_that_does_not_compile_is_found_at_the_start() -> None:
    async def main() -> None:
        llm = AsyncLLM(FakeEngine(), Tokenizer(byte_level_library(), templates={"default": "{% if %}"}))  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match="compile"):
            await llm.start()
        await llm.close()

    asyncio.run(main())
