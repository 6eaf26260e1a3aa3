"""Taking steps of an engine apart: where each microsecond of them goes.

The engine is not changed for this: while its steps are watched, the methods that they are made of are wrapped on their objects, and each
gets the time that it did not spend in another one of them. A native step also counts its own operations; the sum of those is the native
call, and what the runner takes beyond it is the cost of calling it. Everything outside of that call is what dispatch costs.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import ParamSpec, Protocol, TypeVar

from gemel.bench.roofline import StepCost
from gemel.engine.engine import Engine
from gemel.engine.request import StepPlan
from gemel.llm.engine import TextEngine

# Outside of the model; `call` is what the runner does around the native call: flattening the plan, tables, crossing the language border.
OUTSIDE = ("schedule", "call", "sample", "bookkeeping", "detokenize")
P = ParamSpec("P")
R = TypeVar("R")


class Profiled(Protocol):
    """A native program that counts the time of its operations."""

    def profile(self) -> Mapping[str, float]:
        """Seconds per kind of operation since the last call."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """One step. `outside_s` has every name of `OUTSIDE`; `model_s` has the native operations by kind, or one entry where torch computes.

    `planned_s` and `planned_bytes` are the roofline's, by kind.
    """

    total_s: float
    outside_s: Mapping[str, float]
    model_s: Mapping[str, float]
    planned_s: Mapping[str, float]
    planned_bytes: Mapping[str, float]

    @property
    def outside_share(self) -> float:
        """The part of the step that is not computing the model."""
        return 1 - sum(self.model_s.values()) / self.total_s

    @property
    def at_best_s(self) -> float:
        """The whole step as planned."""
        return sum(self.planned_s.values())


class Stopwatch:
    """Seconds per part. A call that is timed inside of another one counts for itself only."""

    def __init__(self, clock: Callable[[], float] = perf_counter):
        self._clock = clock
        self._seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def timed(self, part: str, function: Callable[P, R]) -> Callable[P, R]:
        """`function`, counting for `part`."""

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            start_s = self._clock()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                total_s = self._clock() - start_s
                self._seconds[part] += total_s - self._inner.pop()
                if self._inner:
                    self._inner[-1] += total_s

        return call

    def take(self) -> dict[str, float]:
        """What was counted since the last time."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds


@contextmanager
def watch(engine: Engine, cost: StepCost, text: TextEngine | None = None) -> Iterator[list[tuple[StepPlan, Step]]]:
    """Take apart every step that the engine makes inside, or `text`, which drives it: yields the list that they are put in."""
    stopwatch, steps, plans = Stopwatch(), list[tuple[StepPlan, Step]](), list[StepPlan]()
    program: Profiled | None = engine.runner.program
    module = importlib.import_module("gemel.engine.engine")  # by its name: the engine calls `sample` as a function
    schedule = engine.scheduler.schedule

    def noted(now_s: float) -> StepPlan:
        plans[:] = [schedule(now_s)]
        return plans[0]

    def whole(step: Callable[P, R]) -> Callable[P, R]:
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            start_s = perf_counter()
            result = step(*args, **kwargs)
            total_s = perf_counter() - start_s
            steps.append((plans[0], _step(total_s, stopwatch.take(), program.profile() if program else None, cost, plans[0])))
            return result

        return call

    places: list[tuple[object, str, Callable[..., object]]] = [
        (engine.scheduler, "schedule", stopwatch.timed("schedule", noted)),
        (engine.scheduler, "commit", stopwatch.timed("schedule", engine.scheduler.commit)),
        (engine.runner, "run", stopwatch.timed("runner", engine.runner.run)),
        (module, "sample", stopwatch.timed("sample", module.sample)),
    ]
    bookkeeping = stopwatch.timed("bookkeeping", engine.step)
    places.append((engine, "step", bookkeeping if text else whole(bookkeeping)))
    if text:
        places.append((text, "step", whole(stopwatch.timed("detokenize", text.step))))
    if program:
        program.profile()  # what was counted before is nobody's
    with ExitStack() as stack:
        for owner, name, value in places:
            _replace(stack, owner, name, value)
        yield steps


def _replace(stack: ExitStack, owner: object, name: str, value: object) -> None:
    """Set an attribute until the stack is left."""
    own = vars(owner)
    if name in own:
        stack.callback(setattr, owner, name, own[name])
    else:
        stack.callback(delattr, owner, name)
    setattr(owner, name, value)


def _step(total_s: float, parts: Mapping[str, float], operations: Mapping[str, float] | None, cost: StepCost, plan: StepPlan) -> Step:
    model_s = dict(operations) if operations is not None else {"model": parts.get("runner", 0.0)}
    outside_s = {name: parts.get(name, 0.0) for name in OUTSIDE} | {"call": parts.get("runner", 0.0) - sum(model_s.values())}
    planned_s, planned_bytes = cost.parts_s(plan), cost.parts_bytes(plan)
    if operations is None:
        planned_s, planned_bytes = {"model": sum(planned_s.values())}, {"model": sum(planned_bytes.values())}
    elif "up" in operations:  # a feed-forward without a gate
        planned_s["up"], planned_bytes["up"] = planned_s.pop("gate_up"), planned_bytes.pop("gate_up")
    return Step(total_s, outside_s, model_s, planned_s, planned_bytes)


def together(steps: Sequence[Step], how: Callable[[Iterable[float]], float]) -> Step:
    """Many as one: each part is what `how` makes of theirs, sums or medians."""

    def join(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {name: how([one[name] for one in parts]) for name in parts[0]}

    fields = ("outside_s", "model_s", "planned_s", "planned_bytes")
    return Step(how([step.total_s for step in steps]), *(join([getattr(step, field) for step in steps]) for field in fields))


def table(step: Step, read_bytes_per_s: float) -> list[tuple[str, ...]]:
    """Rows for people: part, microseconds, share of the step, planned microseconds, measured / planned, GB/s, of the read bandwidth."""

    def row(name: str, seconds: float, at_best_s: float = 0.0, num_bytes: float = 0.0) -> tuple[str, ...]:
        planned = (f"{at_best_s * 1e6:,.1f}", f"{seconds / at_best_s:.2f}") if at_best_s else ("-", "-")
        rate = num_bytes / seconds if seconds else 0.0
        read = (f"{rate / 1e9:.1f}", f"{rate / read_bytes_per_s:.0%}") if num_bytes else ("-", "-")
        return name, f"{seconds * 1e6:,.1f}", f"{seconds / step.total_s:.1%}", *planned, *read

    return [
        ("part", "us", "share", "planned us", "measured/planned", "GB/s", "of read"),
        *(row(name, seconds) for name, seconds in step.outside_s.items()),
        *(row(name, seconds, step.planned_s.get(name, 0.0), step.planned_bytes.get(name, 0.0)) for name, seconds in step.model_s.items()),
        row("whole step", step.total_s, step.at_best_s, sum(step.planned_bytes.values())),
    ]
