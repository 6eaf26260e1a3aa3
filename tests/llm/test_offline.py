from __future__ import annotations

import json
from functools import cache

import pytest

from gemel.config.errors import CheckpointError, RequestError
from gemel.config.sampling import SamplingParams
from gemel.engine.request import FinishReason
from gemel.llm.offline import LLM, Completion
from gemel.tokenizer.tokenizer import Tokenizer
from tests.llm.fake_engine import STOP_TOKEN, FakeEngine
from tests.tokenizer.shapes import CHATML, byte_level_library


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level_library(), templates={"default": CHATML})


def llm_over(engine: FakeEngine) -> LLM:
    return LLM.over(engine, tokenizer())  # type: ignore[arg-type]


def text_of(prompt: str, num_tokens: int, index: int = 0) -> str:
    ids = tokenizer().encode(prompt)
    return tokenizer().decode([ids[(index + i) % len(ids)] for i in range(num_tokens)])


def test_completions_come_in_the_order_of_the_prompts() -> None:
    engine = FakeEngine(max_waiting=3)
    prompts = [f"prompt {i}" for i in range(10)]
    params = [SamplingParams(max_tokens=10 - i) for i in range(10)]
    done = llm_over(engine).generate(prompts, params, progress=False)
    assert [completion.index for completion in done] == list(range(10))
    assert [completion.text for completion in done] == [text_of(prompt, 10 - i) for i, prompt in enumerate(prompts)]
    assert not engine.jobs


def test_a_completion_tells_everything() -> None:
    ids = tokenizer().encode("some words here")
    (done,) = llm_over(FakeEngine()).generate([ids], SamplingParams(max_tokens=4, n=2, logprobs=1), progress=False)
    assert done.prompt_tokens == tuple(ids)
    assert done.cached_tokens == len(ids) // 2
    for index, output in enumerate(done.outputs):
        assert output.text == text_of("some words here", 4, index)
        assert output.tokens == tuple(ids[(index + i) % len(ids)] for i in range(4))
        assert [item.token for item in output.logprobs] == list(output.tokens)
        assert (output.finish_reason, output.stop_reason, output.error) == (FinishReason.LENGTH, None, None)
        assert output.cumulative_logprob == -2.0
    said = json.loads(json.dumps(done.as_json()))
    assert said["prompt_tokens"] == len(ids)
    assert [output["text"] for output in said["outputs"]] == [output.text for output in done.outputs]
    assert said["outputs"][0]["logprobs"][0] == {"token": ids[0], "logprob": -0.5, "top": [[ids[0], -0.5]]}


def test_stop_strings_and_stop_tokens_end_outputs() -> None:
    engine = FakeEngine()
    prompts: list[str | list[int]] = ["one. two", [300, 301, STOP_TOKEN]]
    first, second = llm_over(engine).generate(prompts, SamplingParams(stop=(".",)), progress=False)
    assert (first.text, first.outputs[0].finish_reason, first.outputs[0].stop_reason) == ("one", FinishReason.STOP, ".")
    assert (second.outputs[0].tokens, second.outputs[0].stop_reason) == ((300, 301), STOP_TOKEN)
    assert engine.stopped == [("offline-0", 0)]


def test_a_refused_prompt_does_not_end_the_others() -> None:
    done = llm_over(FakeEngine()).generate(["good", [], "\ud800", "good"], SamplingParams(max_tokens=2, n=2), progress=False)
    assert [completion.outputs[0].finish_reason for completion in done] == ["length", "error", "error", "length"]
    assert done[1].outputs[1].error == "the prompt is empty; it needs at least one token"
    assert "surrogate" in str(done[2].outputs[0].error)


def test_an_engine_that_takes_nothing_is_reported_instead_of_waited_for() -> None:
    (done,) = llm_over(FakeEngine(max_waiting=0)).generate(["a"], progress=False)
    assert "the limit is 0" in str(done.outputs[0].error)


def test_a_failing_engine_ends_what_runs_and_is_used_again() -> None:
    engine = FakeEngine(max_waiting=2)

    def fail(step: int) -> None:
        if step == 2:
            raise RuntimeError("boom")

    engine.fail = fail
    done = llm_over(engine).generate(["a b", "c d", "e f"], SamplingParams(max_tokens=3), progress=False)
    assert [completion.outputs[0].finish_reason for completion in done] == ["error", "error", "length"]
    assert done[0].outputs[0].error == "the engine failed: RuntimeError: boom"
    assert len(done[0].outputs[0].tokens) == 1
    assert done[2].text == text_of("e f", 3)


def test_an_interrupt_frees_the_engine() -> None:
    engine = FakeEngine()

    def interrupt(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    engine.fail = interrupt
    llm = llm_over(engine)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], progress=False)
    assert not engine.jobs
    assert len(engine.aborted) == 2
    engine.fail = lambda step: None
    assert llm.generate(["again"], SamplingParams(max_tokens=2), progress=False)[0].text == text_of("again", 2)


def test_conversations_go_through_the_template() -> None:
    llm = llm_over(FakeEngine())
    talk = [{"role": "user", "content": "Hi"}]
    good, bad = llm.chat([talk, [{"role": "nobody", "content": "Hi"}]], SamplingParams(max_tokens=1), progress=False)
    assert good.prompt_tokens == tuple(tokenizer().render_chat(talk))
    assert "role is 'nobody'" in str(bad.outputs[0].error)


def test_progress_is_shown_on_standard_error_only(capfd: pytest.CaptureFixture[str]) -> None:
    llm_over(FakeEngine()).generate(["a", "b"], SamplingParams(max_tokens=2))
    out, err = capfd.readouterr()
    assert out == ""
    assert "2/2" in err
    assert "tokens/s" in err


def test_wrong_calls_are_refused() -> None:
    llm = llm_over(FakeEngine())
    with pytest.raises(RequestError, match="list of prompts"):
        llm.generate("one prompt", progress=False)
    with pytest.raises(RequestError, match="2 params for 1 prompts"):
        llm.generate(["a"], [SamplingParams()] * 2, progress=False)
    assert llm.generate([], progress=False) == []
    with pytest.raises(CheckpointError, match="no model at"):
        LLM("no/such/model")


def test_a_prompt_that_is_done_early_leaves_room() -> None:
    engine = FakeEngine(max_waiting=1)
    done: list[Completion] = llm_over(engine).generate(["a", "b", "c"], SamplingParams(max_tokens=1), progress=False)
    assert [completion.text for completion in done] == ["a", "b", "c"]
    assert engine.num_steps == 3
