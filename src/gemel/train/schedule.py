"""The learning rate of a step: a pure function of the configuration, the step and the length of the run.

There is no scheduler object, so there is nothing to save and nothing that a resumed run could get wrong: step 7,000 has the same rate in
whatever process it is computed. A run that is prolonged bends its curve from there on; only WSD's stable part (and a constant) does not
depend on the length at all, which is what it is for.

Step s of a warm-up over W steps has (s + 1) / (W + 1) of the rate and step W is the first with all of it, so that no step is wasted on a
rate of zero. What follows falls from 1 at step W towards `final` at the end of the run, the first step that is not there any more.
"""

from __future__ import annotations

import math

from gemel.config.errors import ConfigError
from gemel.config.optim import WSD, Constant, Cosine, Exponential, Linear, OptimConfig, Schedule, Step


def rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """The rate of step `step` (from 0) of `num_steps`; `step == num_steps` gives where the curve ends. `ConfigError` beyond that."""
    if not 0 <= step <= num_steps:
        raise ConfigError(f"step = {step} is not within the {num_steps} steps of the schedule; raise steps to go on")
    return config.lr * share(config.schedule, step, num_steps)


def share(schedule: Schedule, step: int, num_steps: int) -> float:
    """What part of the highest rate step `step` has, in [0, 1]."""
    warmup = steps(schedule.warmup, num_steps)
    if warmup > num_steps:
        raise ConfigError(
            f"schedule.warmup = {schedule.warmup} is {warmup} steps, the run has steps = {num_steps}; shorten it, or raise steps"
        )
    if isinstance(schedule, WSD):
        decay = steps(schedule.decay, num_steps)
        if warmup + decay > num_steps:
            raise ConfigError(
                f"schedule.warmup = {schedule.warmup} and schedule.decay = {schedule.decay} are {warmup} + {decay} steps, "
                f"the run has {num_steps}; shorten one of them"
            )
        return _warm(step, warmup) if step < warmup else _wsd(schedule, step, num_steps, decay)
    return _warm(step, warmup) if step < warmup else _fall(schedule, step - warmup, num_steps - warmup, num_steps)


def steps(length: int | float, num_steps: int) -> int:
    """A length as steps: an integer is one already, a fraction is of the run, to the nearest step."""
    return length if isinstance(length, int) else round(length * num_steps)


def _warm(step: int, warmup: int) -> float:
    return (step + 1) / (warmup + 1)


def _fall(schedule: Constant | Linear | Cosine | Step | Exponential, since: int, total: int, num_steps: int) -> float:
    """The part after the warm-up: `since` of `total` steps."""
    progress = since / total if total else 1.0
    if isinstance(schedule, Linear):
        return _between(schedule.final, 1.0 - progress)
    if isinstance(schedule, Cosine):
        return _between(schedule.final, _half_cosine(progress))
    if isinstance(schedule, Exponential):
        return math.pow(schedule.final, progress)
    if isinstance(schedule, Step):
        every = steps(schedule.every, num_steps)
        if not every:
            raise ConfigError(f"schedule.every = {schedule.every} is 0 of {num_steps} steps; make it at least 1")
        return math.pow(schedule.factor, since // every)
    return 1.0


def _wsd(schedule: WSD, step: int, num_steps: int, decay: int) -> float:
    left = num_steps - step
    if left >= decay:
        return 1.0
    progress = 1.0 - left / decay
    heights = {"linear": 1.0 - progress, "cosine": _half_cosine(progress), "sqrt": 1.0 - math.sqrt(progress)}
    return _between(schedule.final, heights[schedule.shape])


def _half_cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _between(final: float, height: float) -> float:
    """`height` of the way from `final` to 1."""
    return final + (1.0 - final) * height
