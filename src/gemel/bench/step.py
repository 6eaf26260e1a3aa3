"""Where each microsecond of a decode step goes, and how much of it is outside of the model, for which there is a bar."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from gemel.bench.apart import Step, together, watch
from gemel.bench.roofline import StepCost
from gemel.config.errors import ConfigError
from gemel.config.sampling import SamplingParams
from gemel.engine.request import Request
from gemel.llm.engine import TextEngine

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
    def step(self) -> Step:
        """Medians of all of them."""
        return together(self.steps, median)

    @property
    def outside_share(self) -> float:
        """The part of a step that is not computing the model."""
        return median(step.outside_share for step in self.steps)


def profile(text: TextEngine, cost: StepCost, batch: int, context: int, num_steps: int, sampling: str = "greedy") -> Profile:
    """Decode `batch` random prompts of `context` tokens by one of `SAMPLING`, and take `num_steps` steps apart.

    Raises ConfigError for what has no room.
    """
    num_tokens = _check(text, batch, context, num_steps)
    rng = random.Random(batch)
    names = [f"step-{batch}-{number}" for number in range(batch)]
    params = SamplingParams.parse(SAMPLING[sampling] | {"ignore_eos": True, "max_tokens": num_tokens, "seed": batch})
    for name in names:
        text.add(Request(name, tuple(rng.randrange(text.engine.vocab_size) for _ in range(context)), params, salt=name))
    decoding: list[Step] = []
    with watch(text.engine, cost, text) as steps:
        while len(decoding) < WARM_UP_STEPS + num_steps:
            text.step()
            plan, step = steps.pop()
            if len(plan.work) == batch and all(item.num_new == 1 for item in plan.work):
                decoding.append(step)
    for name in names:
        text.abort(name)
    return Profile(batch, context, text.engine.runner.program is not None, decoding[WARM_UP_STEPS:])


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
    total_s = profile.step.total_s
    return (
        f"batch {profile.batch}, context {profile.context}, {len(profile.steps)} steps: {total_s * 1e6:,.0f} us, "
        f"{profile.batch / total_s:,.1f} tokens/s; {how}; "
        f"{profile.outside_share:.1%} outside of the model (bar {profile.bar:.0%}: {verdict})"
    )


def operators(text: TextEngine, cost: StepCost, batch: int, context: int) -> str:
    """Which of torch's operators a few more steps spend their time in."""
    with torch.profiler.profile() as profiled:
        profile(text, cost, batch, context, num_steps=4)
    table: str = profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40)
    return table


def as_json(profile: Profile, read_bytes_per_s: float) -> dict[str, object]:
    """Medians over the steps, in seconds, bytes and shares."""
    step = profile.step
    rate = sum(step.planned_bytes.values()) / step.total_s
    return {
        "batch": profile.batch,
        "context": profile.context,
        "steps": len(profile.steps),
        "native": profile.native,
        "step_s": step.total_s,
        "planned_s": step.at_best_s,
        "ratio": step.total_s / step.at_best_s,
        "tokens_per_s": profile.batch / step.total_s,
        "outside": {"share": profile.outside_share, "bar": profile.bar, "met": profile.outside_share <= profile.bar},
        "read": {"bytes_per_s": rate, "share": rate / read_bytes_per_s},
        "seconds": {"outside": step.outside_s, "model": step.model_s, "planned": step.planned_s},
    }
