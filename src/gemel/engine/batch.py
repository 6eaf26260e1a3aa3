"""Batching policies: which of the waiting sequences may join the running ones now.

A policy only says who may; the scheduler still asks for slots, budget and blocks. Continuous batching is the one to use. The other two are
how batches were formed before it, and are kept so that the difference can be measured with everything else equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Protocol

from gemel.config.engine import Batching, ContinuousBatching, DynamicBatching
from gemel.engine.request import Sequence


@dataclass(frozen=True, slots=True)
class Queue:
    """What a policy looks at. `waiting` has the most urgent first and is not empty; `added_s` says when those that never ran were added."""

    waiting: list[Sequence]
    num_running: int
    added_s: Mapping[Sequence, float]
    now_s: float


class Policy(Protocol):
    """Chooses among the waiting."""

    def choose(self, queue: Queue) -> list[Sequence]:
        """Those that may join now, most urgent first."""
        ...


class JoinAnytime:
    """Continuous batching: requests join and leave at every step (Orca, Yu et al. 2022)."""

    def choose(self, queue: Queue) -> list[Sequence]:
        """All."""
        return queue.waiting


class JoinTogether:
    """A batch of requests is chosen when nothing runs, and nobody else joins before the last of them has ended.

    It is chosen as soon as `batch_size` wait or the oldest has waited `max_wait_s`; static batching is the case of 0 seconds, which takes
    what there is. Members that budget or blocks keep out at first, and members that were preempted, still belong to the batch and may join
    later.
    """

    def __init__(self, batch_size: int, max_wait_s: float = 0.0):
        self.batch_size = batch_size
        self.max_wait_s = max_wait_s
        self._members: frozenset[str] = frozenset()

    def choose(self, queue: Queue) -> list[Sequence]:
        """The rest of the current batch, or a new one."""
        rest = [sequence for sequence in queue.waiting if sequence.request.id in self._members]
        if rest or queue.num_running:
            return rest
        oldest_s = min(queue.added_s.values(), default=-inf)
        if len(queue.waiting) < self.batch_size and queue.now_s - oldest_s < self.max_wait_s:
            return []
        batch = queue.waiting[: self.batch_size]
        self._members = frozenset(sequence.request.id for sequence in batch)
        return batch


def policy(batching: Batching) -> Policy:
    """The policy that a configuration asks for."""
    if isinstance(batching, ContinuousBatching):
        return JoinAnytime()
    if isinstance(batching, DynamicBatching):
        return JoinTogether(batching.batch_size, batching.max_wait_s)
    return JoinTogether(batching.batch_size)
