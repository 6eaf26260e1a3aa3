"""The driver, on an engine whose schedule is known."""

import itertools

import pytest

from gemel.bench import measure as module
from gemel.bench.measure import measure
from gemel.bench.timeline import Span
from gemel.bench.workload import Job
from gemel.engine.request import EngineStats, FinishReason, Output

JOBS = [Job((1, 2, 3), 2), Job((4, 5), 3)]


class Metronome:
    """One token per request and step; a step takes a second of the clock that `measure` reads."""

    def __init__(self, clock, short_by=0, fail=False):
        self.clock, self.short_by, self.fail = clock, short_by, fail
        self.requests, self.done, self.salts, self.steps = {}, {}, [], 0

    def add(self, request):
        self.requests[request.id] = request
        self.done[request.id] = 0
        self.salts.append(request.salt)
        assert request.params.greedy and request.params.ignore_eos

    @property
    def has_work(self):
        return bool(self.requests)

    def step(self):
        self.clock.now_s += 1.0
        self.steps += 1
        outputs = []
        for name, request in list(self.requests.items()):
            self.done[name] += 1
            reason = None
            if self.fail:
                reason = FinishReason.ERROR
            elif self.done[name] == request.params.max_tokens - self.short_by:
                reason = FinishReason.LENGTH
            outputs.append(
                Output(name, 0, (7,), self.done[name], finish_reason=reason, cached_tokens=1, error="broken" if self.fail else None)
            )
            if reason:
                del self.requests[name]
        return outputs

    def stats(self):
        return EngineStats(0, 0, 8, 0, 0, self.steps, 0, 0, 0, {}, self.steps, {})


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(module, "perf_counter", made)
    return made


def test_spans_steps_and_preemptions(clock):
    engine = Metronome(clock)
    engine.step()  # counters that were there before are not this run's
    timeline = measure(engine, JOBS, salt="a")
    assert timeline.spans == (Span(3, 2, 1.0, 2.0, 1), Span(2, 3, 1.0, 3.0, 1))
    assert (timeline.num_steps, timeline.num_preemptions) == (3, 3)


def test_every_run_has_its_own_salt(clock):
    engine = Metronome(clock)
    for salt in ("a", "b"):
        measure(engine, JOBS, salt)
    assert engine.salts == ["a", "a", "b", "b"]


@pytest.mark.parametrize(("fault", "says"), [({"short_by": 1}, "1 tokens instead of 2"), ({"fail": True}, "broken")])
def test_work_that_was_not_done_is_not_timed(clock, fault, says):
    with pytest.raises(RuntimeError, match=says):
        measure(Metronome(clock, **fault), JOBS, salt="a")


def test_jobs_come_back_in_order(clock):
    jobs = [Job(tuple(range(1, length + 1)), 1) for length in itertools.chain(range(12, 0, -1))]
    assert [span.num_prompt for span in measure(Metronome(clock), jobs, "x").spans] == list(range(12, 0, -1))
