"""The text layer over the real engine with a tiny random model."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import aclosing
from functools import cache
from pathlib import Path

import pytest

from gemel.config.engine import EngineConfig
from gemel.config.sampling import SamplingParams
from gemel.engine.engine import Engine
from gemel.engine.request import FinishReason, Request
from gemel.llm.engine import TextEngine
from gemel.llm.offline import LLM
from gemel.llm.online import AsyncLLM, Delta
from gemel.model import build
from gemel.tokenizer.tokenizer import Tokenizer
from tests import tiny
from tests.tokenizer.shapes import CHATML, byte_level_library

CONFIG = EngineConfig(device="cpu", dtype="float32", block_tokens=8, kv_bytes=2**20, max_step_tokens=64, max_running=8, threads=1)
GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPTS = tiny.documents(9, 20, 33)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level_library())


def engine() -> Engine:
    return Engine(tiny.build(), CONFIG)


def alone(prompt: Sequence[int], params: SamplingParams) -> list[int]:
    """Tokens of the engine without text."""
    plain, tokens = engine(), []
    plain.add(Request("r", tuple(prompt), params))
    while plain.has_work:
        tokens += [token for output in plain.step() for token in output.tokens]
    return tokens


def test_both_front_ends_say_what_the_engine_alone_says() -> None:
    want = [alone(prompt, GREEDY) for prompt in PROMPTS]
    offline = LLM.over(engine(), tokenizer()).generate(PROMPTS, GREEDY, progress=False)
    assert [list(completion.outputs[0].tokens) for completion in offline] == want
    assert [completion.text for completion in offline] == [tokenizer().decode(tokens, continues=True) for tokens in want]

    async def one(llm: AsyncLLM, index: int) -> list[Delta]:
        return [delta async for delta in llm.generate(PROMPTS[index], GREEDY, request_id=str(index))]

    async def main() -> list[list[Delta]]:
        llm = AsyncLLM(engine(), tokenizer())
        await llm.start()
        deltas = await asyncio.gather(*(one(llm, index) for index in range(len(PROMPTS))))
        await llm.close()
        assert llm.stats().blocks_used == 0
        return deltas

    for deltas, tokens in zip(asyncio.run(main()), want, strict=True):
        assert [token for delta in deltas for token in delta.tokens] == tokens
        assert "".join(delta.text for delta in deltas) == tokenizer().decode(tokens, continues=True)


def test_a_stop_string_frees_the_output_and_leaves_its_siblings() -> None:
    params = SamplingParams(seed=3, n=4, max_tokens=30, ignore_eos=True)
    free = LLM.over(engine(), tokenizer()).generate([PROMPTS[0]], params, progress=False)[0]
    stop = free.outputs[2].text[4:6]
    llm = LLM.over(engine(), tokenizer())
    stopped = llm.generate([PROMPTS[0]], params.model_copy(update={"stop": (stop,)}), progress=False)[0]
    assert stopped.outputs[2].stop_reason == stop
    for before, after in zip(free.outputs, stopped.outputs, strict=True):
        assert after.text == before.text.split(stop)[0]
    llm.engine.check()
    assert llm.engine.stats().blocks_used == 0


def test_leaving_frees_every_block() -> None:
    async def main() -> None:
        llm = AsyncLLM(engine(), tokenizer())
        await llm.start()
        params = SamplingParams(n=3, ignore_eos=True)
        async with aclosing(llm.generate(PROMPTS[1], params, request_id="r")) as deltas:
            async for _ in deltas:
                break
        while llm.stats().running:
            await asyncio.sleep(0.001)
        assert llm.stats().blocks_used == 0
        assert llm.healthy
        await llm.close()

    asyncio.run(main())


@pytest.mark.parametrize("params", [SamplingParams(n=3), SamplingParams(n=2, beam_width=3)])
def test_a_failure_before_the_first_token_ends_all_outputs(params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = engine()

    def fail(plan: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(broken.runner, "run", fail)
    (done,) = LLM.over(broken, tokenizer()).generate([PROMPTS[0]], params, progress=False)
    assert [output.finish_reason for output in done.outputs] == [FinishReason.ERROR] * params.n
    assert all("boom" in str(output.error) for output in done.outputs)
    broken.check()


def test_beams_come_best_first_with_their_text() -> None:
    (done,) = LLM.over(engine(), tokenizer()).generate([PROMPTS[0]], SamplingParams(n=2, beam_width=3, max_tokens=6), progress=False)
    assert [output.text for output in done.outputs] == [tokenizer().decode(output.tokens, continues=True) for output in done.outputs]
    assert all(output.finish_reason is FinishReason.LENGTH for output in done.outputs)
    assert done.outputs[0].cumulative_logprob >= done.outputs[1].cumulative_logprob


def test_log_probabilities_are_summed_if_somebody_asked() -> None:
    llm = LLM.over(engine(), tokenizer())
    asked, plain = (llm.generate([PROMPTS[0]], SamplingParams(logprobs=k, max_tokens=3), progress=False)[0].outputs[0] for k in (0, None))
    assert asked.cumulative_logprob == pytest.approx(sum(item.logprob for item in asked.logprobs))
    assert plain.cumulative_logprob is None


def test_an_aborted_request_is_forgotten() -> None:
    text_engine = TextEngine(engine(), tokenizer())
    text_engine.add(Request("r", tuple(PROMPTS[0]), SamplingParams(n=2)))
    text_engine.step()
    assert "r" in text_engine
    assert [delta.finish_reason for _, delta in text_engine.abort("r")] == [FinishReason.ABORT] * 2
    assert "r" not in text_engine
    assert not text_engine.has_work
    assert text_engine.abort("r") == []


START = """
import asyncio, gc, sys
from gemel.config.engine import EngineConfig
from gemel.config.sampling import SamplingParams
from gemel.llm.online import AsyncLLM

async def main():
    llm = AsyncLLM.load(sys.argv[1], EngineConfig(device="cpu", kv_bytes=2**20, threads=1))
    assert gc.isenabled()
    assert "bytes_of" in vars(llm.tokenizer)  # warm before the start
    await llm.start()
    async for delta in llm.generate([1, 2, 3], SamplingParams(max_tokens=2), request_id="r"):
        assert not delta.error, delta
    await llm.close()

asyncio.run(main())
print(sorted(set(sys.modules) & {"torch._dynamo", "torch._inductor", "sympy", "transformers", "gguf", "jinja2"}))
"""


def test_from_start_to_answer_nothing_is_imported_that_serving_does_not_need(tmp_path: Path) -> None:
    build.save(tiny.build(), tmp_path / "model")
    Tokenizer(byte_level_library(), templates={"default": CHATML}).save(tmp_path / "model")
    command = [sys.executable, "-c", START, str(tmp_path / "model")]
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
