"""What the engine promises about one request: limits, endings, aborts, errors, beams."""

from __future__ import annotations

import pytest
import torch

from gemel.config.errors import CapacityError, ConfigError, RequestError
from gemel.config.sampling import SamplingParams
from gemel.engine.engine import Engine
from gemel.engine.logits import Logits
from gemel.engine.request import FinishReason, Output, Request
from tests import tiny
from tests.engine.test_parity import naive_greedy, run, small_engine

PROMPT = tuple(tiny.documents(10)[0])


def finish(engine: Engine, request: Request) -> list[Output]:
    engine.add(request)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    engine.check()
    return outputs


def greedy(**changes: object) -> SamplingParams:
    return SamplingParams.parse({"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **changes})


def test_length_ends_a_sequence() -> None:
    outputs = finish(small_engine("gqa"), Request("a", PROMPT, greedy()))
    assert [o.finish_reason for o in outputs] == [None] * 11 + [FinishReason.LENGTH]
    assert [o.num_output for o in outputs] == list(range(1, 13))


def test_the_context_ends_a_sequence() -> None:
    outputs = finish(small_engine("gqa", max_context=32), Request("a", PROMPT, greedy(max_tokens=None)))
    assert len(outputs) == 22 and outputs[-1].finish_reason is FinishReason.LENGTH


def test_a_stop_token_ends_a_sequence_and_is_not_part_of_it() -> None:
    tokens = naive_greedy(tiny.build(), list(PROMPT), 12)
    stop = tokens[5]
    outputs = finish(small_engine("gqa"), Request("a", PROMPT, greedy(stop_token_ids=(stop,))))
    assert [t for o in outputs for t in o.tokens] == tokens[: tokens.index(stop)]
    assert outputs[-1].finish_reason is FinishReason.STOP and outputs[-1].stop_token == stop
    later = finish(small_engine("gqa"), Request("a", PROMPT, greedy(stop_token_ids=(stop,), min_tokens=12)))
    assert len(later) == 12 and stop not in [t for o in later for t in o.tokens]


def test_stop_from_above_ends_one_output_only() -> None:
    engine = small_engine("gqa")
    engine.add(Request("a", PROMPT, SamplingParams(n=3, seed=0, max_tokens=20, ignore_eos=True)))
    while engine.stats().running < 3:
        engine.step()
    engine.stop("a", 1)
    engine.stop("a", 1)
    engine.check()
    left = {o.index for _ in range(5) for o in engine.step()}
    assert left == {0, 2}


@pytest.mark.parametrize(
    ("prompt", "params", "param", "words"),
    [
        ((), {}, "prompt", "0 tokens"),
        ((97,), {}, "prompt", "0 to 96"),
        ((-1,), {}, "prompt", "0 to 96"),
        ((1,) * 128, {}, "prompt", "to 127 tokens"),
        ((1,) * 100, {"max_tokens": 29}, "max_tokens", "at most 28"),
        ((1,), {"logit_bias": {97: 1.0}}, "logit_bias", "0 to 96"),
        ((1,), {"stop_token_ids": (500,)}, "stop_token_ids", "0 to 96"),
        ((1,), {"n": 9}, "n", "max_running = 8"),
        ((1,), {"beam_width": 9}, "beam_width", "max_running = 8"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_with_a_way_out(
    prompt: tuple[int, ...], params: dict[str, object], param: str, words: str
) -> None:
    engine = small_engine("gqa")
    with pytest.raises(RequestError, match=words) as error:
        engine.add(Request("a", prompt, SamplingParams.parse(params)))
    assert error.value.param == param
    assert not engine.has_work


def test_an_id_in_use_is_refused_and_a_full_queue_says_so() -> None:
    engine = small_engine("gqa", max_running=1, max_waiting=1)
    engine.add(Request("a", PROMPT, greedy()))
    with pytest.raises(RequestError, match="in use"):
        engine.add(Request("a", PROMPT, greedy()))
    engine.add(Request("b", PROMPT, greedy()))
    with pytest.raises(CapacityError, match="max_waiting = 1"):
        engine.add(Request("c", PROMPT, greedy()))
    while engine.has_work:
        engine.step()
    engine.check()


def test_too_little_memory_for_one_context_is_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match="max_context") as error:
        small_engine("gqa", 4)
    assert "at most 32" in str(error.value)
    assert small_engine("gqa", 4, max_context=32).max_context == 32


@pytest.mark.parametrize("steps", [0, 1, 2, 4, 8])
def test_abort_at_any_time_frees_everything(steps: int) -> None:
    engine = small_engine("gqa")
    engine.add(Request("a", tuple(tiny.documents(40)[0]), SamplingParams(n=3, max_tokens=30, ignore_eos=True)))
    for _ in range(steps):
        engine.step()
    engine.abort("a")
    engine.abort("a")
    engine.check()
    assert not engine.has_work and engine.stats().blocks_used == 0
    assert engine.stats().finished["abort"] == 1


def test_a_step_that_raises_ends_its_requests_and_the_engine_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small_engine("gqa")
    engine.add(Request("a", PROMPT, greedy()))
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", lambda plan: (_ for _ in ()).throw(RuntimeError("out of memory")))
        [output] = engine.step()
    assert output.finish_reason is FinishReason.ERROR and "out of memory" in str(output.error)
    engine.check()
    assert run(engine, [Request("b", PROMPT, greedy())])["b", 0] == naive_greedy_ignoring_eos(list(PROMPT), 12)


def naive_greedy_ignoring_eos(prompt: list[int], count: int) -> list[int]:
    return run(small_engine("gqa"), [Request("x", tuple(prompt), greedy(max_tokens=count))])["x", 0]


def test_logits_that_are_not_finite_end_only_that_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small_engine("gqa")
    real = engine.runner.run

    def spoil(plan: object) -> Logits:
        logits_SV = real(plan).values_SV.clone()  # type: ignore[arg-type]
        logits_SV[0, 0] = torch.nan
        return Logits.of(logits_SV)

    engine.add(Request("a", PROMPT[:3], greedy()))
    engine.add(Request("b", PROMPT[:4], greedy()))
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", spoil)
        outputs = engine.step()
    assert [o.finish_reason for o in outputs] == [FinishReason.ERROR, None]
    while engine.has_work:
        outputs += engine.step()
    assert len([o for o in outputs if o.request_id == "b"]) == 12
    engine.check()


def test_batching_policies_give_the_same_tokens() -> None:
    requests = [Request(str(i), tuple(doc), greedy(max_tokens=5 + i)) for i, doc in enumerate(tiny.documents(9, 30, 4, 17, 25))]
    policies = [{"kind": "continuous"}, {"kind": "static", "batch_size": 2}, {"kind": "dynamic", "batch_size": 2, "max_wait_s": 0.0}]
    runs, steps = [], []
    for policy in policies:
        engine = small_engine("gqa", batching=policy)
        runs.append(run(engine, requests))
        steps.append(engine.stats().steps)
    assert runs[0] == runs[1] == runs[2]
    assert steps[0] < steps[1]


def beam_reference(prompt: list[int], width: int, count: int, end_tokens: set[int], penalty: float) -> list[tuple[list[int], float]]:
    """Beam search written out over full recomputation."""
    loaded = tiny.build()
    from tests.engine.test_parity import packed_logits

    beams, finished = [(list(prompt), 0.0)], []
    for length in range(1, count + 1):
        logits = [torch.log_softmax(packed_logits(loaded, [tokens])[-1], -1) for tokens, _ in beams]
        ranked = sorted(
            ((score + logits[i][t].item(), i, t) for i, (_, score) in enumerate(beams) for t in range(97)), key=lambda c: -c[0]
        )[: 2 * width]
        grown = []
        for rank, (score, i, token) in enumerate(ranked):
            if token in end_tokens:
                if rank < width:
                    finished.append((beams[i][0][len(prompt) :], score / length**penalty))
            elif len(grown) < width:
                grown.append(([*beams[i][0], token], score))
        finished = sorted(finished, key=lambda f: -f[1])[:width]
        beams = grown
        if len(finished) == width and beams[0][1] / length**penalty <= finished[-1][1]:
            return finished
    finished += [(tokens[len(prompt) :], score / count**penalty) for tokens, score in beams]
    return sorted(finished, key=lambda f: -f[1])[:width]


@pytest.mark.parametrize(
    ("width", "penalty", "ends"), [(1, 1.0, ()), (4, 1.0, ()), (4, 0.0, (3, 40, 77, 12)), (3, 2.0, (3, 40, 77, 12, 50, 60))]
)
@pytest.mark.parametrize("num_blocks", [None, 16])
def test_beam_search_equals_the_written_out_one(width: int, penalty: float, ends: tuple[int, ...], num_blocks: int | None) -> None:
    params = SamplingParams(beam_width=width, n=width, max_tokens=14, length_penalty=penalty, ignore_eos=True, stop_token_ids=ends)
    engine = small_engine("gqa", num_blocks)
    engine.add(Request("other", tuple(tiny.documents(60)[0]), greedy(max_tokens=50)))
    outputs = [o for o in finish(engine, Request("a", PROMPT, params)) if o.request_id == "a"]
    want = beam_reference(list(PROMPT), width, 14, set(ends), penalty)
    assert [list(o.tokens) for o in outputs] == [tokens for tokens, _ in want]
    assert [o.index for o in outputs] == list(range(width))
