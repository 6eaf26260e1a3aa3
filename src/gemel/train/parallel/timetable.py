"""When each rank of a pipeline computes what, and when it sends.

A timetable is found by playing the pipeline through: every pass takes the time that it should take, a rank that is free takes the best of
the passes that it could begin, and what "best" means is all that schedules differ in. So none of them can wait for itself, whatever the
number of micro-batches, and how long ranks idle is known before anything runs.

    gpipe        forward passes first (Huang et al. 2018, arXiv 1811.06965)
    1f1b         backward passes first; as many micro-batches under way as it takes to hear back (Narayanan et al. 2019, arXiv 1806.03377)
    interleaved  the same with several stages per rank, rank r having r, r + P, r + 2 P... (Narayanan et al. 2021, arXiv 2104.04473)
    zero_bubble  the backward pass is two: gradients of the input, for which another rank waits, and gradients of weights, for which nobody
                 does and which fill what would be idle (Qi et al. 2023, arXiv 2401.10241, the schedule that keeps 1F1B's peak of memory)

The order of transfers is one for all ranks, that of the play. Two ranks therefore have what passes between them in the same order, which
libraries without tags (NCCL) need in order not to wait for each other.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from gemel.config.parallel import GPipe, Interleaved, Pipeline, ZeroBubble

Kind = Literal["forward", "backward", "weights"]


@dataclass(frozen=True, slots=True)
class Pass:
    """A stage's work on a micro-batch. Where gradients of weights are a pass of their own, `backward` is only the others."""

    kind: Kind
    stage: int
    micro: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a pass gives to the next stage (forward) or the previous one (backward), from rank to rank."""

    made_by: Pass
    stage: int
    sender: int
    receiver: int


@dataclass(frozen=True, slots=True)
class Timetable:
    """What each rank does, in this order, and the share of its time in which it has nothing to do, by the model of costs."""

    programs: tuple[tuple[Pass | Transfer, ...], ...]
    idle: float


@lru_cache(maxsize=16)
def timetable(config: Pipeline, num_micros: int, learn: bool = True) -> Timetable:
    """Of a pipeline with so many micro-batches; forward passes alone if nothing is learnt from them."""
    return _Play(config, num_micros, learn).timetable()


def num_stages(config: Pipeline) -> int:
    """Of the whole pipeline: several per rank where ranks have several chunks."""
    return config.stages * (config.chunks if isinstance(config, Interleaved | ZeroBubble) else 1)


class _Play:
    """The pipeline in time. A forward pass takes 1, a backward pass 2, and each of its halves 1."""

    def __init__(self, config: Pipeline, num_micros: int, learn: bool):
        self._config, self._num_micros, self._learn = config, num_micros, learn
        self._num_ranks, self._num_stages = config.stages, num_stages(config)
        self._split = isinstance(config, ZeroBubble)
        self._ready: list[dict[Kind, list[tuple[tuple[int, int, int], Pass]]]] = [
            {"forward": [], "backward": [], "weights": []} for _ in range(self._num_ranks)
        ]
        self._under_way = [0] * self._num_ranks  # passes forward whose activations are still needed
        self._unanswered = [0] * self._num_ranks  # of these, those that did not come back
        self._left = [self._num_stages // self._num_ranks * num_micros] * self._num_ranks  # passes forward that did not begin
        self._free = set(range(self._num_ranks))
        self._ends: list[tuple[int, int, Pass]] = []
        self._entries: list[list[tuple[tuple[int, int, int], Pass | Transfer]]] = [[] for _ in range(self._num_ranks)]

    def timetable(self) -> Timetable:
        """Play it to its end."""
        now = busy = 0
        for micro in range(self._num_micros):
            self._offer(Pass("forward", 0, micro))
        while True:
            busy += self._begin(now)
            if not self._ends:
                break
            now = self._ends[0][0]
            while self._ends and self._ends[0][0] == now:
                self._end(*heapq.heappop(self._ends))
        assert not any(self._left) and not any(self._under_way), "a schedule that waits for itself"
        programs = tuple(tuple(what for _, what in sorted(entries, key=lambda entry: entry[0])) for entries in self._entries)
        return Timetable(programs, 1 - busy / (now * self._num_ranks))

    def _begin(self, now: int) -> int:
        """Let every rank that is free take a pass; how much time they take."""
        cost = 0
        for rank in sorted(self._free):
            kind = self._choose(rank)
            if kind is None:
                continue
            _, chosen = heapq.heappop(self._ready[rank][kind])
            if kind == "forward":
                self._left[rank] -= 1
                self._under_way[rank] += 1
                self._unanswered[rank] += 1
            takes = 2 if kind == "backward" and not self._split else 1
            cost += takes
            self._free.remove(rank)
            self._entries[rank].append(((now, 1, 0), chosen))
            heapq.heappush(self._ends, (now + takes, rank, chosen))
        return cost

    def _end(self, now: int, rank: int, done: Pass) -> None:
        """Offer what a pass makes possible, and write down what it sends."""
        self._free.add(rank)
        if done.kind == ("forward" if not self._learn else "weights" if self._split else "backward"):
            self._under_way[rank] -= 1
        if done.kind == "backward":
            self._unanswered[rank] -= 1
        if done.kind == "backward" and self._split:
            self._offer(Pass("weights", done.stage, done.micro))
        if done.kind == "forward" and done.stage == self._num_stages - 1:
            if self._learn:
                self._offer(Pass("backward", done.stage, done.micro))
            return
        stage = done.stage + {"forward": 1, "backward": -1, "weights": 0}[done.kind]
        if done.kind == "weights" or stage < 0:
            return
        self._offer(Pass(done.kind, stage, done.micro))
        transfer = Transfer(done, stage, rank, stage % self._num_ranks)
        for end in (transfer.sender, transfer.receiver):
            self._entries[end].append(((now, 0, rank), transfer))

    def _offer(self, one: Pass) -> None:
        """Of several that could begin: micro-batches go in groups, one for each rank, and each group through all chunks of a rank."""
        chunk = one.stage // self._num_ranks
        key = (one.micro // self._num_ranks, chunk if one.kind == "forward" else -chunk, one.micro)
        heapq.heappush(self._ready[one.stage % self._num_ranks][one.kind], (key, one))

    def _choose(self, rank: int) -> Kind | None:
        """The kind of pass that a rank takes next, if it could begin any."""
        order: tuple[Kind, ...] = ("forward", "backward", "weights")
        if not self._learn:
            order = ("forward",)
        elif isinstance(self._config, GPipe):
            order = ("forward",) if self._left[rank] else ("backward",)
        elif self._unanswered[rank] >= self._most(rank) or self._under_way[rank] >= self._most(0 if self._split else rank):
            order = ("backward", "weights")
        ready = self._ready[rank]
        return next((kind for kind in order if ready[kind] and (kind != "forward" or self._is_next(rank))), None)

    def _is_next(self, rank: int) -> bool:
        """Whether the first of the passes forward that could begin is the one whose turn it is. Overtaking could use up what may be under
        way, and leave everybody waiting.
        """
        (group, chunk, micro), _ = self._ready[rank]["forward"][0]
        chunks, size = self._num_stages // self._num_ranks, min(self._num_ranks, self._num_micros - group * self._num_ranks)
        number = group * self._num_ranks * chunks + chunk * size + micro % self._num_ranks
        return number == chunks * self._num_micros - self._left[rank]

    def _most(self, rank: int) -> int:
        """Passes forward that a rank may have under way: what it can do until it hears back of the first."""
        num_ranks, chunks = self._num_ranks, self._num_stages // self._num_ranks
        return num_ranks - rank if chunks == 1 else 2 * (num_ranks - rank - 1) + (chunks - 1) * num_ranks + 1
