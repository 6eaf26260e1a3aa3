"""Where a step's time goes: exclusive times on a clock that is known, and the parts of real steps of a tiny engine."""

import pytest

from gemel.bench import apart, command, report, step, suite, workload
from gemel.bench.roofline import PARTS, Rates, StepCost, uniform
from gemel.bench.subject import Subject
from gemel.config.engine import EngineConfig
from gemel.config.errors import ConfigError
from gemel.engine import engine as engine_module
from gemel.engine.engine import Engine
from gemel.llm.engine import TextEngine
from gemel.ops.cpu import native
from gemel.tokenizer.tokenizer import Tokenizer
from tests import tiny
from tests.tokenizer.shapes import byte_level_library

CONFIG = EngineConfig(device="cpu", dtype="float32", kernels="torch", max_running=4, max_context=64, kv_bytes=2**20)


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


class Program:
    """Counts steps by being asked; every step took a nanosecond per kind, so that what is left over cannot be negative."""

    kinds = ("embed", "norm", "qkv", "attention", "out", "gate_up", "down", "head")

    def profile(self):
        return dict.fromkeys(self.kinds, 1e-9)


class NarrowProgram(Program):
    kinds = ("embed", "norm", "qkv", "attention", "out", "up", "down", "head")


@pytest.fixture
def text():
    return TextEngine(Engine(tiny.build(), CONFIG), Tokenizer(byte_level_library()))


@pytest.fixture
def cost():
    config = tiny.CONFIGS["gqa"]
    return StepCost(config, uniform(config, "float32", 4, "float32"), Rates(1e9, {"float32": 1e9}), CONFIG.block_tokens)


def test_a_call_inside_another_counts_for_itself_only():
    clock = Clock()
    watch = apart.Stopwatch(clock)

    def inner():
        clock.now_s += 2.0

    timed_inner = watch.timed("inner", inner)

    def outer():
        clock.now_s += 1.0
        timed_inner()
        timed_inner()
        clock.now_s += 4.0

    watch.timed("outer", outer)()
    assert watch.take() == {"inner": 4.0, "outer": 5.0}
    assert watch.take() == {}


def test_time_counts_even_when_the_call_raises():
    clock = Clock()
    watch = apart.Stopwatch(clock)

    def fail():
        clock.now_s += 3.0
        raise KeyError("x")

    with pytest.raises(KeyError):
        watch.timed("part", fail)()
    assert watch.take() == {"part": 3.0}


def test_watching_leaves_no_trace(text, cost):
    before = vars(text).keys() | vars(text.engine).keys()
    sample = engine_module.sample
    with apart.watch(text.engine, cost, text):
        assert engine_module.sample is not sample
    assert engine_module.sample is sample
    assert vars(text).keys() | vars(text.engine).keys() == before
    assert not {"schedule", "commit"} & vars(text.engine.scheduler).keys()


def test_only_steps_of_all_streams_count_though_they_begin_one_after_another(cost):
    """Prompts of 20 tokens, read 8 at a time: the first stream makes tokens long before the last has begun."""
    config = CONFIG.model_copy(update={"max_step_tokens": 8})
    text = TextEngine(Engine(tiny.build(), config), Tokenizer(byte_level_library()))
    profile = step.profile(text, cost, batch=3, context=20, num_steps=5)
    assert len(profile.steps) == 5
    assert min(one.model_s["model"] for one in profile.steps) > 0
    assert not text.has_work


def test_parts_of_torch_steps_add_up_to_the_step(text, cost):
    profile = step.profile(text, cost, batch=3, context=20, num_steps=5)
    assert (len(profile.steps), profile.native) == (5, False)
    for one in profile.steps:
        parts = sum(one.outside_s.values()) + sum(one.model_s.values())
        assert 0 < parts <= one.total_s
        assert one.outside_s["call"] == 0 and one.model_s.keys() == {"model"}
        assert min(one.outside_s[name] for name in ("schedule", "sample", "bookkeeping", "detokenize")) > 0
    assert profile.steps[0].planned_s["model"] < profile.steps[-1].planned_s["model"]  # contexts grow
    assert not text.has_work


@pytest.mark.parametrize("program", [Program(), NarrowProgram()])
def test_parts_of_native_steps_stand_beside_their_plan(text, cost, program, monkeypatch):
    monkeypatch.setattr(type(text.engine.runner), "program", program)
    profile = step.profile(text, cost, batch=2, context=20, num_steps=3)
    assert profile.native and profile.step.model_s == pytest.approx(dict.fromkeys(program.kinds, 1e-9))
    assert profile.step.outside_s["call"] > 0  # this program counts next to nothing
    assert profile.step.outside_share == pytest.approx(1 - 8e-9 / profile.step.total_s, rel=1e-3)
    rows = {row[0]: row for row in apart.table(profile.step, read_bytes_per_s=1e9)}
    assert set(rows) == {"part", *apart.OUTSIDE, *program.kinds, "whole step"}
    assert all(rows[name][3] != "-" for name in program.kinds if name not in ("embed", "norm"))
    assert rows["embed"][3] == "-"
    assert report.aligned(list(rows.values()))
    assert "missed" in step.summary(profile)
    told = step.as_json(profile, read_bytes_per_s=1e9)
    assert told["outside"] == {"share": profile.step.outside_share, "bar": 0.15, "met": False}
    assert len(told["seconds"]["planned"]) == len(PARTS)


def test_every_rule_of_sampling_can_be_watched(text, cost):
    assert tuple(step.SAMPLING) == command.SAMPLING
    asked = []
    add = text.add
    text.add = lambda request: asked.append(request.params) or add(request)
    for rules in step.SAMPLING:
        assert step.profile(text, cost, batch=2, context=8, num_steps=1, sampling=rules).steps[0].outside_s["sample"] > 0
    greedy, everything = asked[0], asked[-1]
    assert greedy.temperature == 0.0 and greedy.logprobs is None
    assert everything.temperature and everything.top_k and everything.top_p < 1 and everything.min_p and everything.logprobs
    assert everything.repetition_penalty != 1 and everything.frequency_penalty


def test_one_stream_has_the_stricter_bar(text, cost):
    assert step.profile(text, cost, batch=1, context=8, num_steps=1).bar == 0.10


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"batch": 5, "context": 8, "num_steps": 1}, "--max-running"),
        ({"batch": 1, "context": 60, "num_steps": 8}, "the engine's limit is 64"),
    ],
)
def test_what_has_no_room_is_refused(text, cost, asked, says):
    with pytest.raises(ConfigError, match=says):
        step.profile(text, cost, **asked)


def test_operators_of_torch_steps_are_named(text, cost):
    assert "aten::" in step.operators(text, cost, batch=1, context=8)


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_a_whole_run_is_taken_apart(kernels, cost):
    """Native steps into those that read prompts and those that only write; where torch computes, its operators say more."""
    if kernels == "native" and native.find()[0] is None:
        pytest.skip("the kernels are not compiled")
    engine = Engine(tiny.build(), CONFIG.model_copy(update={"kernels": kernels, "max_step_tokens": 16}))
    work = workload.small(engine.vocab_size, engine.max_context)
    told = suite.profile(Subject(engine, 0.0), "prefill", work, cost.rates)
    if kernels == "torch":
        assert "aten::" in told
        return
    assert "steps that read prompts:" in told and told.count("whole step") == 1  # one token each: nothing is left to write
    told = suite.profile(Subject(engine, 0.0), "decode", work, cost.rates)
    assert "steps that read prompts:" in told and "steps that write only:" in told and told.count("whole step") == 2
    parts = {line.split()[0] for line in told.splitlines() if line}
    assert parts >= {"schedule", "sample", "attention", "head"}
    assert not engine.has_work
