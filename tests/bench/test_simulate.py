"""The plan's schedule: with a clock of one second a step, every time can be worked out by hand."""

import pytest

from gemel.bench.simulate import simulate
from gemel.bench.timeline import Span
from gemel.bench.workload import Job
from gemel.config.engine import ContinuousBatching, DynamicBatching, EngineConfig, StaticBatching


def second(plan):
    assert plan.work
    return 1.0


def config(**changes):
    return EngineConfig(**({"block_tokens": 8, "max_step_tokens": 16, "max_running": 4, "prefix_cache": False} | changes))


def job(first, num_prompt, num_output):
    return Job(tuple(range(first, first + num_prompt)), num_output)


def test_a_prompt_is_computed_in_chunks_then_one_token_a_step():
    timeline = simulate([job(0, 40, 5)], config(), 64, 256, second)
    assert timeline.spans == (Span(40, 5, first_s=3.0, last_s=7.0),)
    assert (timeline.num_steps, timeline.num_preemptions) == (7, 0)


def test_the_budget_of_a_step_is_shared():
    timeline = simulate([job(0, 8, 2), job(100, 8, 2), job(200, 8, 1)], config(), 64, 256, second)
    assert [(span.first_s, span.last_s) for span in timeline.spans] == [(1.0, 2.0), (1.0, 2.0), (2.0, 2.0)]


def test_a_shared_prefix_is_computed_once():
    prefix = tuple(range(32))
    jobs = [Job((*prefix, 100 + number), 1) for number in range(3)]
    timeline = simulate(jobs, config(prefix_cache=True), 64, 256, second)
    assert [span.cached_tokens for span in timeline.spans] == [0, 32, 32]
    assert timeline.total_s < simulate(jobs, config(), 64, 256, second).total_s


def test_too_few_blocks_preempt_and_everything_still_ends():
    jobs = [job(100 * number, 16, 24) for number in range(4)]
    timeline = simulate(jobs, config(), num_blocks=9, max_context=64, step_s=second)
    assert timeline.num_preemptions > 0
    assert [span.num_output for span in timeline.spans] == [24] * 4


@pytest.mark.parametrize(
    ("batching", "last_s"),
    # Two slots; the second job is short. Continuous: the third takes its place at once. Static: it waits for the first to end.
    [(ContinuousBatching(), [6.0, 2.0, 4.0]), (StaticBatching(batch_size=2), [6.0, 2.0, 8.0])],
)
def test_the_plan_follows_the_batching_policy(batching, last_s):
    jobs = [job(0, 4, 6), job(100, 4, 2), job(200, 4, 2)]
    assert [span.last_s for span in simulate(jobs, config(batching=batching, max_running=2), 64, 256, second).spans] == last_s


def test_dynamic_batching_waits_on_the_plans_own_clock():
    waiting = DynamicBatching(batch_size=4, max_wait_s=0.5)
    (span,) = simulate([job(0, 4, 1)], config(batching=waiting), 64, 256, second).spans
    assert span.first_s == pytest.approx(1.5, abs=0.01)  # in seconds of the simulated clock, whose waits are whole milliseconds
