"""Every schedule at its corners, against formulas written out by hand, and without jumps."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from gemel.config.errors import ConfigError
from gemel.config.optim import WSD, Constant, Cosine, Exponential, Linear, OptimConfig, Schedule, Step
from gemel.train.schedule import rate, share, steps

SMOOTH: list[Schedule] = [
    Constant(warmup=10),
    Linear(warmup=10, final=0.1),
    Cosine(warmup=10, final=0.1),
    Exponential(warmup=10, final=0.1),
    *(WSD(warmup=10, decay=0.4, final=0.1, shape=shape) for shape in ("linear", "cosine", "sqrt")),
]


@pytest.mark.parametrize("schedule", SMOOTH, ids=lambda s: f"{s.kind}-{getattr(s, 'shape', '')}")
def test_warms_up_peaks_once_and_ends_at_final(schedule: Schedule) -> None:
    curve = [share(schedule, step, 100) for step in range(101)]
    assert curve[:10] == pytest.approx([(step + 1) / 11 for step in range(10)], rel=1e-15)
    assert curve[10] == 1.0
    assert all(later <= sooner for sooner, later in pairwise(curve[10:]))
    assert curve[100] == pytest.approx(1.0 if schedule.kind == "constant" else 0.1, rel=1e-12)


@pytest.mark.parametrize("schedule", SMOOTH, ids=lambda s: f"{s.kind}-{getattr(s, 'shape', '')}")
def test_has_no_jumps(schedule: Schedule) -> None:
    """On a run ten thousand times as long no step changes more than the steepest of these curves may: a square root at its foot."""
    long = schedule.model_copy(update={"warmup": 0.1})
    num_steps = 1_000_000
    places = [0, 99_999, 100_000, 599_999, 600_000, 600_001, 999_999]
    jumps = [abs(share(long, place + 1, num_steps) - share(long, place, num_steps)) for place in places]
    assert max(jumps) <= 0.9 * math.sqrt(1 / 400_000) + 1e-12


@pytest.mark.parametrize(
    ("schedule", "step", "want"),
    [
        (Linear(), 0, 1.0),
        (Linear(), 25, 0.75),
        (Linear(final=0.2), 50, 0.6),
        (Cosine(), 25, 0.5 + math.sqrt(2) / 4),
        (Cosine(final=0.5), 50, 0.75),
        (Exponential(final=0.01), 50, 0.1),
        (Step(every=25, factor=0.5), 24, 1.0),
        (Step(every=25, factor=0.5), 25, 0.5),
        (Step(every=0.25, factor=0.5), 99, 0.125),
        (Step(warmup=20, every=25, factor=0.5), 44, 1.0),
        (Step(warmup=20, every=25, factor=0.5), 45, 0.5),
        (WSD(decay=20), 80, 1.0),
        (WSD(decay=20, shape="linear"), 85, 0.75),
        (WSD(decay=20, shape="sqrt"), 85, 0.5),
        (WSD(decay=0.2, shape="cosine"), 90, 0.5),
        (WSD(warmup=0, decay=0), 99, 1.0),
        (Constant(warmup=3), 1, 0.5),
    ],
)
def test_by_hand(schedule: Schedule, step: int, want: float) -> None:
    assert share(schedule, step, 100) == pytest.approx(want, rel=1e-12)


def test_stable_part_does_not_depend_on_the_length_of_the_run() -> None:
    schedule = WSD(warmup=10, decay=20)
    assert [share(schedule, step, 100) for step in range(80)] == [share(schedule, step, 1000) for step in range(80)]


def test_rate_is_the_share_of_lr() -> None:
    config = OptimConfig(lr=2e-3, schedule=Linear(warmup=0.1))
    assert rate(config, 0, 100) == pytest.approx(2e-3 / 11)
    assert rate(config, 10, 100) == 2e-3


@pytest.mark.parametrize(("length", "want"), [(7, 7), (0.07, 7), (0.0, 0), (0.004, 0), (0.006, 1)])
def test_lengths(length: float, want: int) -> None:
    assert steps(length, 100) == want


@pytest.mark.parametrize(
    ("schedule", "step", "message", "way_out"),
    [
        (Constant(), 101, "step = 101", None),
        (Constant(), -1, "step = -1", None),
        (Linear(warmup=200), 0, "warmup = 200", Linear(warmup=20)),
        (WSD(warmup=0.6, decay=0.5), 0, "60 \\+ 50 steps", WSD(warmup=0.5, decay=0.5)),
        (Step(every=0.001), 50, "every = 0.001", Step(every=1)),
    ],
)
def test_errors_name_the_value(schedule: Schedule, step: int, message: str, way_out: Schedule | None) -> None:
    with pytest.raises(ConfigError, match=message):
        rate(OptimConfig(schedule=schedule), step, 100)
    if way_out is not None:
        assert rate(OptimConfig(schedule=way_out), step, 100) > 0.0
