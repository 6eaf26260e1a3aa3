"""An engine without a model, for testing the scheduler: a key/value slot holds the very prefix that it was computed from.

What a sequence reads through its block table can then be compared with its own tokens, position by position, so a block that was shared,
copied, evicted or recycled wrongly is seen in the step in which it is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from gemel.config import EngineConfig, SamplingParams
from gemel.config.engine import Batching, ContinuousBatching
from gemel.engine.blocks import BlockPool
from gemel.engine.request import Request, Sequence, Status, StepPlan
from gemel.engine.schedule import Scheduler

Content = tuple[int, str, tuple[int, ...]]  # (version of the weights, salt, all tokens up to here)


class Simulation:
    """Drives a `Scheduler` as the engine does. `token` names the next token of a sequence; each sample is one more call."""

    def __init__(
        self,
        num_blocks: int = 16,
        block_tokens: int = 4,
        *,
        max_running: int = 4,
        max_step_tokens: int = 64,
        max_waiting: int = 100,
        max_context: int = 64,
        batching: Batching | None = None,
        prefix_cache: bool = True,
        token: Callable[[Sequence], int] = lambda sequence: 1000 + sequence.arrival,
    ):
        batching = batching or ContinuousBatching()
        config = EngineConfig(max_running=max_running, max_step_tokens=max_step_tokens, max_waiting=max_waiting, batching=batching)
        self.pool = BlockPool(num_blocks, block_tokens, prefix_cache)
        self.scheduler = Scheduler(config, self.pool, max_context)
        self.config = config
        self.token = token
        self.now_s = 0.0
        self.weights = 0
        self.memory: dict[tuple[int, int], Content] = {}
        self.num_computed_tokens = 0
        self._names = itertools.count()

    def sequence(
        self, prompt: list[int], max_new: int = 4, *, priority: int = 0, salt: str = "", n: int = 1, beam_width: int | None = None
    ) -> Sequence:
        """A sequence of a new request, not added yet."""
        arrival = next(self._names)
        params = SamplingParams(n=n) if beam_width is None else SamplingParams(beam_width=beam_width)
        request = Request(f"request {arrival}", tuple(prompt), params, priority, salt)
        return Sequence(request, 0, arrival, list(prompt), min(len(prompt) + max_new, self.scheduler.max_context))

    def add(
        self, prompt: list[int], max_new: int = 4, *, priority: int = 0, salt: str = "", n: int = 1, beam_width: int | None = None
    ) -> Sequence:
        """A sequence of a new request, added."""
        sequence = self.sequence(prompt, max_new, priority=priority, salt=salt, n=n, beam_width=beam_width)
        self.scheduler.add(sequence, self.now_s)
        return sequence

    def fork(self, parent: Sequence, index: int) -> Sequence:
        """A sibling that starts as the parent's equal."""
        child = Sequence(parent.request, index, parent.arrival, list(parent.tokens), parent.max_total)
        self.scheduler.fork(parent, child)
        return child

    def step(self, before_commit: Callable[[StepPlan], None] | None = None, append: bool = True) -> StepPlan:
        """One step of the engine: plan, copy, compute, commit, append. Checks everything on the way."""
        plan = self.scheduler.schedule(self.now_s)
        self._check_plan(plan)
        self._copy(plan)
        self._compute(plan)
        if before_commit:
            before_commit(plan)
        self.scheduler.commit(plan)
        if append:
            for item in plan.work:
                if item.samples and item.sequence.status is Status.RUNNING:
                    self.append(item.sequence)
            self.check()
        return plan

    def append(self, sequence: Sequence) -> None:
        """One sampled token; ends the sequence where it must end."""
        sequence.tokens.append(self.token(sequence))
        if len(sequence.tokens) == sequence.max_total:
            self.scheduler.finish(sequence)

    def run(self, max_steps: int = 1000) -> int:
        """Steps until nothing is left to do. Returns their number."""
        for num_steps in range(max_steps):
            if not self.scheduler.has_work:
                return num_steps
            assert self.step().work, "work is left and none was planned"
        raise AssertionError(f"not done after {max_steps} steps")

    def reset(self) -> None:
        """New weights: whatever was computed is worthless."""
        self.weights += 1
        self.scheduler.reset_prefix_cache()

    def check(self) -> None:
        """The scheduler's own invariants, and that every computed position holds what its sequence expects."""
        self.scheduler.check()
        for sequence in self.scheduler.running:
            self._check_content(sequence, sequence.num_computed)
        if not self.scheduler.has_work:
            assert self.pool.num_used == 0

    def _check_plan(self, plan: StepPlan) -> None:
        scheduler = self.scheduler
        assert plan.num_tokens <= self.config.max_step_tokens
        assert len(scheduler.running) <= self.config.max_running
        planned = {item.sequence for item in plan.work}
        assert len(planned) == len(plan.work)
        for item in plan.work:
            assert item.start == item.sequence.num_computed and item.num_new > 0 and item.sequence.status is Status.RUNNING
            assert item.samples == (item.start + item.num_new == len(item.sequence.tokens))
        for sequence in scheduler.running:
            if sequence not in planned and len(sequence.tokens) - sequence.num_computed == 1:
                assert sequence is scheduler.running[-1], "a decoding sequence was passed over"
        for victim in plan.preempted:
            if victim.status is Status.WAITING:
                assert all(other.order < victim.order for other in scheduler.running), "preempted for somebody less urgent"

    def _copy(self, plan: StepPlan) -> None:
        at_once = dict(self.memory)
        size = self.pool.block_tokens
        assert len({to for _, to in plan.copies}) == len(plan.copies), "two copies into one block"
        for slot in range(size):
            for source, to in plan.copies:
                at_once[to, slot] = self.memory.get((source, slot), (-1, "", ()))
        for source, to in plan.copies:
            for slot in range(size):
                self.memory[to, slot] = self.memory.get((source, slot), (-1, "", ()))
        assert self.memory == at_once, "the copies depend on their order"

    def _compute(self, plan: StepPlan) -> None:
        written: set[tuple[int, int]] = set()
        for item in plan.work:
            sequence = item.sequence
            for position in range(item.start, item.start + item.num_new):
                block, slot = self._place(sequence, position)
                assert self.pool.references(block) == 1 and self.pool.sealed_as(block) is None, "a shared or sealed block is written"
                assert (block, slot) not in written, "a slot is written twice"
                written.add((block, slot))
                self.memory[block, slot] = self._expected(sequence, position)
        for item in plan.work:
            self._check_content(item.sequence, item.start + item.num_new)
        self.num_computed_tokens += plan.num_tokens

    def _check_content(self, sequence: Sequence, num_tokens: int) -> None:
        for position in range(num_tokens):
            assert self.memory[self._place(sequence, position)] == self._expected(sequence, position), (sequence, position)

    def _place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.blocks[position // self.pool.block_tokens], position % self.pool.block_tokens

    def _expected(self, sequence: Sequence, position: int) -> Content:
        return self.weights, sequence.request.salt, tuple(sequence.tokens[: position + 1])
