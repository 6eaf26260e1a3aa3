"""Where each microsecond of a decode step goes.

The engine is not changed for this: while a step is watched, the methods that it is made of are wrapped on their objects, and each gets the
time that it did not spend in another one of them. A native step also counts its own operations; the sum of those is the native call,
and what the runner takes beyond it is the cost of calling it. Everything outside of that call is what dispatch costs, and has a bar.
"""

from __future__ import annotations

import importlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, ParamSpec, Protocol, TypeVar

import torch

from gemel.bench.roofline import StepCost
from gemel.config.errors import ConfigError
from gemel.config.sampling import SamplingParams
from gemel.engine.request import Request, StepPlan
from gemel.llm.engine import TextEngine

# Outside of the model; `call` is what the runner does around the native call: flattening the plan, tables, crossing the language border.
OUTSIDE = ("schedule", "call", "sample", "bookkeeping", "detokenize")
WARM_UP_STEPS = 4
# How the streams choose their tokens, by a name for the command line: each rule by itself, and all of them.
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-k": {"temperature": 0.8, "top_k": 50},
    "top-p": {"temperature": 0.8, "top_p": 0.95},
    "min-p": {"temperature": 0.8, "min_p": 0.05},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.2},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
}
SAMPLING["all"] = {key: value for rules in SAMPLING.values() for key, value in rules.items()} | {"temperature": 0.8}
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


@dataclass(frozen=True, slots=True)
class Profile:
    """Steps of `batch` sequences whose contexts began at `context` tokens. Figures are medians over the steps."""

    batch: int
    context: int
    native: bool
    steps: Sequence[Step]

    @property
    def bar(self) -> float:
        """The largest share of a step that may be spent outside of the model."""
        return 0.10 if self.batch == 1 else 0.15

    @property
    def total_s(self) -> float:
        """A whole step."""
        return median(step.total_s for step in self.steps)

    @property
    def outside_share(self) -> float:
        """The part of a step that is not computing the model."""
        return median(step.outside_share for step in self.steps)

    @property
    def outside_s(self) -> dict[str, float]:
        """Each part outside of the model."""
        return {name: median(step.outside_s[name] for step in self.steps) for name in OUTSIDE}

    @property
    def model_s(self) -> dict[str, float]:
        """Each kind of operation of the model."""
        return {name: median(step.model_s[name] for step in self.steps) for name in self.steps[0].model_s}


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
def watch(text: TextEngine, stopwatch: Stopwatch) -> Iterator[list[StepPlan]]:
    """Time the parts of the engine's steps; yields a list of one, the plan of the last step."""
    engine = text.engine
    schedule, plans = engine.scheduler.schedule, [StepPlan((), (), ())]

    def noted(now_s: float) -> StepPlan:
        plans[0] = schedule(now_s)
        return plans[0]

    places: list[tuple[object, str, str, Callable[..., object]]] = [
        (text, "step", "detokenize", text.step),
        (engine, "step", "bookkeeping", engine.step),
        (engine.scheduler, "schedule", "schedule", noted),
        (engine.scheduler, "commit", "schedule", engine.scheduler.commit),
        (engine.runner, "run", "runner", engine.runner.run),
    ]
    module = importlib.import_module("gemel.engine.engine")  # by its name: the engine calls `sample` as a function
    places.append((module, "sample", "sample", module.sample))
    with ExitStack() as stack:
        for owner, name, part, function in places:
            _replace(stack, owner, name, stopwatch.timed(part, function))
        yield plans


def _replace(stack: ExitStack, owner: object, name: str, value: object) -> None:
    """Set an attribute until the stack is left."""
    own = vars(owner)
    if name in own:
        stack.callback(setattr, owner, name, own[name])
    else:
        stack.callback(delattr, owner, name)
    setattr(owner, name, value)


def profile(text: TextEngine, cost: StepCost, batch: int, context: int, num_steps: int, sampling: str = "greedy") -> Profile:
    """Decode `batch` random prompts of `context` tokens by one of `SAMPLING`, and take `num_steps` steps apart.

    Raises ConfigError for what has no room.
    """
    num_tokens = _check(text, batch, context, num_steps)
    rng = random.Random(batch)
    program: Profiled | None = getattr(text.engine.runner, "program", None)
    names = [f"step-{batch}-{number}" for number in range(batch)]
    params = SamplingParams.parse(SAMPLING[sampling] | {"ignore_eos": True, "max_tokens": num_tokens, "seed": batch})
    for name in names:
        text.add(Request(name, tuple(rng.randrange(text.engine.vocab_size) for _ in range(context)), params, salt=name))
    stopwatch, steps = Stopwatch(), []
    with watch(text, stopwatch) as plans:
        num_decoding = 0
        while num_decoding < WARM_UP_STEPS + num_steps:
            start_s = perf_counter()
            text.step()
            total_s = perf_counter() - start_s
            parts, operations = stopwatch.take(), program.profile() if program else None
            decoding = len(plans[0].work) == batch and all(item.num_new == 1 for item in plans[0].work)
            num_decoding += decoding
            if decoding and num_decoding > WARM_UP_STEPS:
                steps.append(_step(total_s, parts, operations, cost, plans[0]))
    for name in names:
        text.abort(name)
    return Profile(batch, context, program is not None, steps)


def _step(total_s: float, parts: Mapping[str, float], operations: Mapping[str, float] | None, cost: StepCost, plan: StepPlan) -> Step:
    model_s = dict(operations) if operations is not None else {"model": parts["runner"]}
    outside_s = {name: parts.get(name, 0.0) for name in OUTSIDE} | {"call": parts["runner"] - sum(model_s.values())}
    planned_s, planned_bytes = cost.parts_s(plan), cost.parts_bytes(plan)
    if operations is None:
        planned_s, planned_bytes = {"model": sum(planned_s.values())}, {"model": sum(planned_bytes.values())}
    elif "up" in operations:  # a feed-forward without a gate
        planned_s["up"], planned_bytes["up"] = planned_s.pop("gate_up"), planned_bytes.pop("gate_up")
    return Step(total_s, outside_s, model_s, planned_s, planned_bytes)


def _check(text: TextEngine, batch: int, context: int, num_steps: int) -> int:
    """How many tokens each sequence is to make: the first ones decode already while prompts of the others are read."""
    engine = text.engine
    num_reading = -(-batch * context // max(1, engine.config.max_step_tokens - batch))
    num_tokens = WARM_UP_STEPS + num_steps + num_reading + 1
    if batch > engine.config.max_running:
        raise ConfigError(f"--batch {batch} sequences, but max_running = {engine.config.max_running}: raise --max-running")
    longest = context + num_tokens
    if longest > engine.max_context:
        raise ConfigError(f"--context and --steps make {longest} tokens, the engine's limit is {engine.max_context}: lower one of them")
    room = engine.stats().blocks_total * engine.config.block_tokens // batch
    if longest > room:
        raise ConfigError(f"{batch} sequences of {longest} tokens do not fit the key/value blocks: raise --kv-bytes or lower --batch")
    return num_tokens


def summary(profile: Profile) -> str:
    """A line for people: the step, and its share outside of the model beside the bar."""
    verdict = "met" if profile.outside_share <= profile.bar else "missed"
    how = "native step" if profile.native else "no native step, the model runs in torch"
    return (
        f"batch {profile.batch}, context {profile.context}, {len(profile.steps)} steps: {profile.total_s * 1e6:,.0f} us, "
        f"{profile.batch / profile.total_s:,.1f} tokens/s; {how}; "
        f"{profile.outside_share:.1%} outside of the model (bar {profile.bar:.0%}: {verdict})"
    )


def operators(text: TextEngine, cost: StepCost, batch: int, context: int) -> str:
    """Which of torch's operators a few more steps spend their time in."""
    with torch.profiler.profile() as profiled:
        profile(text, cost, batch, context, num_steps=4)
    table: str = profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40)
    return table


def table(profile: Profile, read_bytes_per_s: float) -> list[tuple[str, ...]]:
    """Rows for people: part, microseconds, share of the step, planned microseconds, measured / planned, GB/s, of the read bandwidth."""
    planned_s, planned_bytes = profile.steps[-1].planned_s, profile.steps[-1].planned_bytes

    def row(name: str, seconds: float, at_best_s: float = 0.0, num_bytes: float = 0.0) -> tuple[str, ...]:
        planned = (f"{at_best_s * 1e6:,.1f}", f"{seconds / at_best_s:.2f}") if at_best_s else ("-", "-")
        rate = num_bytes / seconds if seconds else 0.0
        read = (f"{rate / 1e9:.1f}", f"{rate / read_bytes_per_s:.0%}") if num_bytes else ("-", "-")
        return name, f"{seconds * 1e6:,.1f}", f"{seconds / profile.total_s:.1%}", *planned, *read

    return [
        ("part", "us", "share", "planned us", "measured/planned", "GB/s", "of read"),
        *(row(name, seconds) for name, seconds in profile.outside_s.items()),
        *(row(name, seconds, planned_s.get(name, 0.0), planned_bytes.get(name, 0.0)) for name, seconds in profile.model_s.items()),
        row("whole step", profile.total_s, sum(planned_s.values()), sum(planned_bytes.values())),
    ]


def as_json(profile: Profile, read_bytes_per_s: float) -> dict[str, object]:
    """Medians over the steps, in seconds, bytes and shares."""
    last = profile.steps[-1]
    rate = sum(last.planned_bytes.values()) / profile.total_s
    planned_s = sum(last.planned_s.values())
    return {
        "batch": profile.batch,
        "context": profile.context,
        "steps": len(profile.steps),
        "native": profile.native,
        "step_s": profile.total_s,
        "planned_s": planned_s,
        "ratio": profile.total_s / planned_s,
        "tokens_per_s": profile.batch / profile.total_s,
        "outside": {"share": profile.outside_share, "bar": profile.bar, "met": profile.outside_share <= profile.bar},
        "read": {"bytes_per_s": rate, "share": rate / read_bytes_per_s},
        "seconds": {"outside": profile.outside_s, "model": profile.model_s, "planned": dict(last.planned_s)},
    }
