"""The learning rate over time: a pure function, so that going on needs no state."""

from __future__ import annotations

import math

from gemel.config.optim import Cosine, OptimConfig


def rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Of step `step` (from 0)."""
    schedule = config.schedule
    assert isinstance(schedule, Cosine)
    warmup = schedule.warmup if isinstance(schedule.warmup, int) else round(schedule.warmup * num_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    part = (step - warmup) / max(num_steps - warmup, 1)
    return config.lr * (schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * part)))
