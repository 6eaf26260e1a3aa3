"""Steps of training in a process of their own: `python -m gemel.bench.train_step JOB.json`.

The same job as runners of peers get (`bench/peers/training.py`), and the same line of JSON at its end, with what only we can tell: the
rates of the machine, measured when training is over, and the plan.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import numpy as np
import torch

from gemel.bench import machine, train_plan
from gemel.config.data.pipeline import put
from gemel.config.train import TrainRecipe
from gemel.data.pack import Packed
from gemel.model import build
from gemel.train import precision
from gemel.train.batch import Batch
from gemel.train.loader import Step
from gemel.train.trainer import Trainer

ARITHMETIC = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def recipe(job: dict[str, Any], num_sequences: int, length: int) -> TrainRecipe:
    """The job in our words, with the settings of the job put over it."""
    values: dict[str, Any] = {
        "out": str(Path(job["model"]).with_name("run")),
        "steps": 10**6,
        "model": {"kind": "pretrained", "path": job["model"]},
        "data": {"train": [{"kind": "shards", "path": "unused"}]},
        "batch": {"tokens": num_sequences * length, "sequence": length},
        "precision": {"kind": job["precision"]},
        "optim": {"lr": job["lr"], "weight_decay": 0.0, "schedule": {"kind": "constant"}},
        "threads": job["threads"],
    }
    if job["precision"] == "bf16":
        values["optim"]["weights"] = "master"
    for setting in job["settings"]:
        put(values, setting)
    return TrainRecipe.parse(values)


def step(ids: np.ndarray[Any, Any], micro_sequences: int) -> Step:
    """Sequences [sequences, length] as documents, cut into micro-batches. The last token of each predicts nothing."""
    batches = []
    for first in range(0, len(ids), micro_sequences):
        group = ids[first : first + micro_sequences]
        sequences = [Packed(row, np.roll(row, -1), np.array([0]), np.array([0])) for row in group]
        places = [(first + number) * ids.shape[1] for number in range(len(group))]
        batch = Batch.of(sequences, [False] * len(group), places)
        batch.weights_T[ids.shape[1] - 1 :: ids.shape[1]] = 0
        batches.append(batch)
    return Step(tuple(batches), {}, ids.size)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train the steps of a job."""
    torch.set_num_threads(job["threads"])
    base_bytes, base_pinned = memory_bytes("VmRSS"), memory_bytes("RssAnon")
    steps = np.load(job["tokens"])
    made = recipe(job, *steps.shape[1:])
    loaded = build.load(job["model"], precision.parameter_dtype(made.optim), weights="dense")
    trainer = Trainer(made, loaded, torch.device("cpu"))
    step_s, reports = [], []
    with Watch() as watch:
        for ids in steps:
            began = perf_counter()
            reports.append(trainer.learn(step(ids, made.batch.micro_sequences)))
            step_s.append(perf_counter() - began)
    peak_bytes = memory_bytes("VmHWM")  # before the probes of the machine allocate theirs
    arithmetic = ARITHMETIC[made.precision.kind]
    rates = machine.rates(torch.device("cpu"), [arithmetic])
    plan = train_plan.plan(made, loaded.config, reports[-1].flops, rates, arithmetic)
    return {
        "step_s": step_s,
        "losses": [report.loss for report in reports],
        "base_bytes": base_bytes,
        "peak_bytes": peak_bytes,
        "base_pinned_bytes": base_pinned,
        "pinned_bytes": watch.most,
        "flops": reports[-1].flops,
        "peak_flops_per_s": rates.flops_per_s[arithmetic],
        "read_bytes_per_s": rates.read_bytes_per_s,
        "planned_step_s": plan.step_s,
        "planned_bytes": {"base": base_bytes} | plan.memory_bytes,
        "settings": {"weights": made.optim.weights, "state": made.optim.state, "set": job["settings"]},
        "versions": {"torch": torch.__version__},
    }


class Watch:
    """The most anonymous memory that the process held, looked at many times a second: of this the system keeps no record."""

    EVERY_S = 0.01

    def __init__(self) -> None:
        self.most = memory_bytes("RssAnon")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(self.EVERY_S):
            self.most = max(self.most, memory_bytes("RssAnon"))


def memory_bytes(field: str) -> int:
    """VmRSS: resident now; VmHWM: at most so far; RssAnon: now, without pages of files."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
