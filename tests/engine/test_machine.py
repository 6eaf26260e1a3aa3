"""Scheduler and block pool against everything that users can do, in any order, in pools that are far too small."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gemel.config import CapacityError, ContinuousBatching, DynamicBatching, RequestError, StaticBatching
from gemel.engine.request import Sequence, Status, StepPlan
from tests.engine.simulation import Simulation

BATCHING = st.sampled_from(
    [ContinuousBatching(), ContinuousBatching(), StaticBatching(batch_size=2), DynamicBatching(batch_size=3, max_wait_s=2.0)]
)
MAX_CONTEXT = 32
STORIES = ([1] * 20, [1, 1, 1, 1, 1, 1, 1, 0] * 3, [1, 1, 1, 0] * 5)
REQUESTS = st.tuples(
    st.tuples(st.sampled_from(STORIES), st.integers(1, 20)).map(lambda cut: cut[0][: cut[1]]),
    st.integers(1, 16),  # new tokens
    st.integers(-2, 2),  # priority
    st.sampled_from(["", "", "", "tenant"]),
    st.sampled_from([1, 1, 2, 3]),  # samples
    st.sampled_from([None, None, None, 2, 3]),  # beams
)  # prompts often share a prefix, and so do prompts with outputs


class Machine(RuleBasedStateMachine):
    """Adds, steps, forks, aborts and resets. Every step checks the plan and reads back every position of every running sequence."""

    @initialize(
        num_blocks=st.integers(6, 14),
        block_tokens=st.integers(2, 4),
        max_running=st.integers(1, 6),
        extra_tokens=st.integers(0, 12),
        max_waiting=st.integers(0, 8),
        batching=BATCHING,
        prefix_cache=st.sampled_from([True, True, True, False]),
    )
    def start(self, num_blocks, block_tokens, max_running, extra_tokens, max_waiting, batching, prefix_cache):
        self.sim = Simulation(
            num_blocks,
            block_tokens,
            max_running=max_running,
            max_step_tokens=max_running + extra_tokens,
            max_waiting=max_waiting,
            max_context=MAX_CONTEXT,
            batching=batching,
            prefix_cache=prefix_cache,
            token=lambda sequence: (len(sequence.tokens) * 7 + sequence.index + sequence.arrival) // 3 % 2,
        )
        self.forked: set[str] = set()

    @property
    def living(self) -> list[Sequence]:
        return self.sim.scheduler.waiting + self.sim.scheduler.running

    @rule(burst=st.lists(REQUESTS, min_size=1, max_size=6))
    def add(self, burst):
        for prompt, max_new, priority, salt, n, beams in burst:
            self.add_one(self.sim.sequence(prompt, max_new, priority=priority, salt=salt, n=1 if beams else n, beam_width=beams))

    def add_one(self, sequence):
        sim, params = self.sim, sequence.request.params
        blocks = -(-sequence.max_total // sim.pool.block_tokens) * (params.beam_width or 1)
        possible = blocks <= sim.pool.num_blocks and (params.beam_width or params.n) <= sim.config.max_running
        try:
            sim.scheduler.add(sequence, sim.now_s)
        except RequestError:
            assert not possible
        except CapacityError:
            assert len(sim.scheduler.waiting) >= sim.config.max_waiting
        else:
            assert possible

    @precondition(lambda self: self.living)
    @rule(num_steps=st.integers(1, 6), elapsed_s=st.sampled_from([0.0, 0.5, 3.0]))
    def step(self, num_steps, elapsed_s):
        for _ in range(num_steps):
            self.advance(elapsed_s, None)

    @precondition(lambda self: len(self.living) > 2)
    @rule(data=st.data(), during_a_step=st.booleans())
    def abort(self, data, during_a_step):
        victim = data.draw(st.sampled_from(self.living))
        if during_a_step:
            self.advance(0.0, victim)
        self.sim.scheduler.abort(victim)  # a second abort, or one that comes late, changes nothing
        self.advance_beams()  # it may have been the one that its siblings were held for

    @precondition(lambda self: any(self.can_fork(sequence) for sequence in self.living))
    @rule(data=st.data())
    def fork(self, data):
        """At any point of its life, not only when the first token is sampled."""
        parent = data.draw(st.sampled_from([sequence for sequence in self.living if self.can_fork(sequence)]))
        self.forked.add(parent.request.id)
        for index in range(1, parent.request.params.n):
            self.sim.fork(parent, index)

    @precondition(lambda self: self.sim.pool.num_used and self.sim.num_computed_tokens > 60 * (1 + self.sim.weights))
    @rule()
    def reset(self):
        self.sim.reset()
        assert self.sim.pool.num_used == self.sim.pool.num_cached == 0

    @invariant()
    def sound(self):
        if hasattr(self, "sim"):
            self.sim.check()

    def teardown(self):
        if not hasattr(self, "sim"):
            return
        for _ in range(2000):
            if not self.living:
                break
            self.advance(1.0, None)
        assert not self.living, "bounded sequences, unbounded work"
        assert self.sim.pool.num_used == 0

    def can_fork(self, sequence: Sequence) -> bool:
        params = sequence.request.params
        running = sequence.status is Status.RUNNING
        return running and params.beam_width is None and params.n > 1 and sequence.request.id not in self.forked

    def advance(self, elapsed_s: float, abort: Sequence | None) -> None:
        sim = self.sim
        sim.now_s += elapsed_s
        filling = isinstance(sim.config.batching, DynamicBatching) and not sim.scheduler.running
        had_work = sim.scheduler.has_work

        def interrupt(plan: StepPlan) -> None:
            if abort is not None:
                sim.scheduler.abort(abort)

        plan = sim.step(interrupt, append=False)
        assert plan.work or not had_work or filling, "nobody proceeds"
        for item in plan.work:
            if item.samples and item.sequence.status is Status.RUNNING and item.sequence.request.params.beam_width is None:
                sim.append(item.sequence)
        self.advance_beams()
        sim.check()

    def advance_beams(self) -> None:
        beams = [sequence for sequence in self.living if sequence.request.params.beam_width is not None]
        for request_id in sorted({beam.request.id for beam in beams}):
            self.advance_together([beam for beam in beams if beam.request.id == request_id])

    def advance_together(self, beams: list[Sequence]) -> None:
        """When all beams of a request have sampled: the last one dies, the first is forked in its place, all grow."""
        if any(beam.num_computed < len(beam.tokens) for beam in beams):
            return
        width = beams[0].request.params.beam_width
        beams = sorted(beams, key=lambda beam: beam.index)
        next_index = beams[-1].index + 1
        if len(beams) == width and width > 1:
            self.sim.scheduler.finish(beams.pop())
        while len(beams) < width:
            beams.append(self.sim.fork(beams[0], next_index))
            next_index += 1
        for beam in beams:
            self.sim.append(beam)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(-1, 1)), min_size=1, max_size=12),
    num_blocks=st.integers(6, 12),
    max_running=st.integers(1, 6),
)
def test_everyone_finishes_with_every_token(lengths, num_blocks, max_running):
    sim = Simulation(num_blocks, 4, max_running=max_running, max_step_tokens=max_running + 3, max_context=24)
    sequences = [sim.add(list(range(prompt)), new, priority=priority) for prompt, new, priority in lengths]
    sim.run()
    assert all(sequence.status is Status.FINISHED and len(sequence.tokens) == sequence.max_total for sequence in sequences)
