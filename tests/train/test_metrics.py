"""Metrics: a line for everything, whole at any time, cut back to where a checkpoint was."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

from gemel.train.metrics import FILE, Metrics, read
from gemel.train.progress import Progress
from gemel.train.trainer import Report

REPORT = Report(3, 2.5, 0.0, 1.25, 0.8, 1e-3, 4096, 4000.0, 2e9, "ok", "")


def test_a_step_is_a_line(tmp_path: Path) -> None:
    with Metrics(tmp_path, peak_flops_per_s=8e9) as metrics:
        metrics.step(REPORT, step_s=0.5, wait_s=0.125)
        metrics.step(replace(REPORT, step=4, loss=math.nan, action="skip", reason="the loss is nan"), 1.0, 0.0)
        metrics.event("validation", 4, {"loss": 2.0, "sources": {"a": 2.0}})
        lines = (tmp_path / FILE).read_text().splitlines()  # there before the file is closed
    shown = {"step": 3, "loss": 2.5, "z": 0.0, "norm": 1.25, "factor": 0.8, "lr": 1e-3, "tokens": 4096, "trained": 4000.0}
    assert json.loads(lines[0]) == shown | {"flops": 2e9, "step_s": 0.5, "wait_s": 0.125, "utilization": 0.5}
    first, second, third = read(tmp_path)
    assert first["utilization"] == 0.5 and math.isnan(second["loss"]) and second["reason"] == "the loss is nan"
    assert third == {"step": 4, "event": "validation", "loss": 2.0, "sources": {"a": 2.0}}


def test_going_on_cuts_back(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        metrics.step(REPORT, 1.0, 0.0)
        num_bytes = metrics.num_bytes
        metrics.step(replace(REPORT, step=4), 1.0, 0.0)
    with Metrics(tmp_path, num_bytes) as metrics:
        assert metrics.num_bytes == num_bytes
        metrics.step(replace(REPORT, step=4, loss=1.0), 1.0, 0.0)
    assert [(line["step"], line["loss"]) for line in read(tmp_path)] == [(3, 2.5), (4, 1.0)]


def test_a_file_that_was_lost_begins_anew(tmp_path: Path) -> None:
    """Nothing is made up for what is not there."""
    with Metrics(tmp_path, num_bytes=1000) as metrics:
        metrics.step(REPORT, 1.0, 0.0)
    assert [line["step"] for line in read(tmp_path)] == [3]


def test_a_line_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        metrics.step(REPORT, 1.0, 0.0)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in read(tmp_path)] == [3]


def test_the_line_of_progress() -> None:
    stream = io.StringIO()
    progress = Progress(4, peak_flops_per_s=8e9, stream=stream)
    progress.step(REPORT, 0.5)
    assert stream.getvalue() == ""  # a log gets a line now and then
    progress.step(replace(REPORT, step=4), 0.5)
    progress.say("saved")
    line, said = stream.getvalue().splitlines()
    assert line == "step 4/4, loss 2.500, norm 1.25, rate 1.00e-03, 8,192 tokens/s (50% of peak), took 0:00:00"
    assert said == "gemel: saved"
    quiet = io.StringIO()
    Progress(4, quiet=True, stream=quiet).say("x")
    assert quiet.getvalue() == ""
