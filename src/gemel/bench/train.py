"""`gemel bench train`: steps of training, and peers at the same work: tokens per second, utilization, peak memory, and the loss as proof.

Every tool begins with the same random weights and learns from the same tokens with the same optimizer, so the losses of all steps must be
the same numbers: `loss_error` is the largest relative distance from ours. Each tool and round is a process of its own; rounds of all tools
alternate, every second one backwards. Steps of warm-up are not timed (a peer compiles in the first).

Utilization (MFU) is what the mathematics needs by what the machine can: products of the model and its attention (`train.flops`), by the
best that matrix products reach here in the same arithmetic, measured by our process in each round.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from gemel.bench import machine
from gemel.bench.report import aligned
from gemel.config.errors import ConfigError
from gemel.config.model import ModelConfig, Rope
from gemel.model import build
from gemel.model.build import LoadedModel
from gemel.model.model import Model
from gemel.ops import hardware

PEERS = ("hf", "trl", "litgpt", "compiled")
RUNNERS = Path(__file__).parents[3] / "bench" / "peers"
LR = 3e-4
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Shape:
    """A model, and how much of what it learns in a step."""

    model: ModelConfig
    num_sequences: int
    length: int

    @property
    def num_tokens(self) -> int:
        """Of a step."""
        return self.num_sequences * self.length


def _llama(num_layers: int, width: int, heads: tuple[int, int, int], ffn_width: int, vocab_size: int, theta: float = 1e4) -> ModelConfig:
    """`heads`: of queries, of keys and values, and their width."""
    num_heads, num_kv_heads, head_width = heads
    return ModelConfig(
        family="llama",
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_width=head_width,
        ffn_width=ffn_width,
        vocab_size=vocab_size,
        max_positions=2048,
        positions=Rope(theta=theta),
        tied_head=True,
    )


SHAPES = {
    "135m": Shape(_llama(30, 576, (9, 3, 64), 1536, 49152, theta=1e5), 8, 512),  # SmolLM2-135M
    "7m": Shape(_llama(6, 288, (6, 6, 48), 768, 4096), 32, 256),
    "tiny": Shape(_llama(2, 64, (4, 2, 16), 128, 512), 4, 64),
}


@dataclass(frozen=True, slots=True)
class Work:
    """What is asked of every tool. `through` is a command that each process is started through (taskset, numactl, nice...).

    `out` is a file for what every process has said, written anew after each: hours of measuring should survive an interruption.
    """

    shape: str
    precision: str
    num_sequences: int
    num_warm_up: int
    num_timed: int
    num_rounds: int
    through: str = ""
    python: Path | None = None
    out: Path | None = None

    @property
    def num_tokens(self) -> int:
        """Of a step."""
        return self.num_sequences * SHAPES[self.shape].length


@dataclass(slots=True)
class Result:
    """What a tool said in all of its rounds; `error` if it did not get that far."""

    tool: str
    settings: tuple[str, ...] = ()
    rounds: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""

    def step_s(self, work: Work) -> list[float]:
        """Of all timed steps."""
        return [seconds for said in self.rounds for seconds in said["step_s"][work.num_warm_up :]]

    @property
    def peak_bytes(self) -> int:
        """The largest of the rounds."""
        return max(int(said["peak_bytes"]) for said in self.rounds)

    @property
    def losses(self) -> list[float]:
        """Of each step, in the first round."""
        found: list[float] = self.rounds[0]["losses"]
        return found


class Bench:
    """The files that all tools get, and the processes."""

    def __init__(self, work: Work, folder: Path, say: Say):
        self._work, self._folder, self._say = work, folder, say
        shape = SHAPES[work.shape]
        rng = np.random.default_rng(0)
        num_steps = work.num_warm_up + work.num_timed
        np.save(folder / "tokens.npy", rng.integers(0, shape.model.vocab_size, (num_steps, work.num_sequences, shape.length)))
        build.save(random_model(shape.model), folder / "model")

    def measure(self, results: Sequence[Result]) -> None:
        """All rounds. What fails once is not tried again."""
        for number in range(self._work.num_rounds):
            for result in results if number % 2 == 0 else reversed(results):
                if result.error:
                    continue
                name = " ".join([result.tool, *result.settings])
                self._say(f"round {number + 1} of {self._work.num_rounds}: {name}")
                try:
                    result.rounds.append(self._round(result))
                except subprocess.CalledProcessError as error:
                    said = [line for line in error.stderr.splitlines() if line.strip()]
                    result.error = said[-1] if said else f"exit status {error.returncode}"
                if self._work.out:
                    self._work.out.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")

    def _round(self, result: Result) -> dict[str, Any]:
        work, threads = self._work, hardware.cores().usable
        job: dict[str, Any] = {
            "model": str(self._folder / "model"),
            "tokens": str(self._folder / "tokens.npy"),
            "precision": work.precision,
        }
        job |= {"lr": LR, "threads": threads, "settings": result.settings}
        path = self._folder / "job.json"
        path.write_text(json.dumps(job))
        ours = result.tool == "gemel"
        module = "gemel.bench.train_step" if ours else f"bench.peers.train_{result.tool}"
        command = [*shlex.split(work.through), str(sys.executable if ours else work.python), "-m", module, str(path)]
        # OMP_NUM_THREADS reaches the thread pools that torch's own setting does not.
        paths = os.pathsep.join([str(Path(__file__).parents[2]), *([] if ours else [str(RUNNERS.parents[1])])])
        environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
        said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return said


def random_model(config: ModelConfig) -> LoadedModel:
    """Matrices from a normal distribution of standard deviation 0.02, norms of one; the same every time."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = Model(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
    return LoadedModel(model, config, Path(), (0,), None)


def compare(work: Work, peers: Sequence[str], variants: Sequence[tuple[str, ...]], say: Say) -> list[Result]:
    """Measure gemel with each of the settings of `variants`, and peers. Raises ConfigError for what the user can mend."""
    if peers and work.python is None:
        raise ConfigError("--peer needs --peer-python, the Python they are installed for; python bench/peers/prepare.py train makes one")
    if peers and not RUNNERS.is_dir():
        raise ConfigError(f"peers are measured from a clone of the repository, which has bench/peers; there is no {RUNNERS}")
    results = [Result("gemel", settings) for settings in variants] + [Result(peer) for peer in peers]
    with tempfile.TemporaryDirectory(prefix="gemel-bench-") as name:
        Bench(work, Path(name), say).measure(results)
    if results[0].error:
        raise ConfigError(f"gemel failed: {results[0].error}")
    return results


def figures(results: Sequence[Result], work: Work) -> list[dict[str, Any]]:
    """Plain data of each tool. The first result is ours, with what the others are compared with."""
    ours = results[0]
    flops, peak = ours.rounds[0]["flops"], max(said["peak_flops_per_s"] for said in ours.rounds)
    planned_s = median(said["planned_step_s"] for said in ours.rounds)
    made: list[dict[str, Any]] = []
    for result in results:
        head: dict[str, Any] = {"tool": result.tool, "settings": result.settings}
        if result.error:
            made.append(head | {"error": result.error})
            continue
        times = result.step_s(work)
        middle = median(times)
        made.append(
            head
            | {
                "tokens_per_s": {
                    "median": work.num_tokens / middle,
                    "min": work.num_tokens / max(times),
                    "max": work.num_tokens / min(times),
                }
            }
            | {"mfu": flops / middle / peak, "of_plan": planned_s / middle, "peak_bytes": result.peak_bytes, "losses": result.losses}
            | {"loss_error": _distance(result.losses, ours.losses), "gemel_over_it": middle / median(ours.step_s(work))}
            | {"gemel_memory_share": ours.peak_bytes / result.peak_bytes, "rounds": result.rounds}
        )
    return made


def _distance(got: Sequence[float], want: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(got, want, strict=True))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tools under each other; those that failed are told below."""
    lines = [("tool", "tokens/s", "min - max", "MFU", "of plan", "peak, MB", "first loss", "loss error", "gemel over it", "gemel's memory")]
    lines += [
        (
            " ".join([row["tool"], *row["settings"]]),
            f"{row['tokens_per_s']['median']:,.0f}",
            f"{row['tokens_per_s']['min']:,.0f} - {row['tokens_per_s']['max']:,.0f}",
            f"{row['mfu']:.0%}",
            f"{row['of_plan']:.0%}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
            f"{row['losses'][0]:.5f}",
            f"{row['loss_error']:.1e}",
            f"{row['gemel_over_it']:.2f}",
            f"{row['gemel_memory_share']:.0%}",
        )
        for row in rows
        if "error" not in row
    ]
    return "\n".join([aligned(lines), *(f"{row['tool']} did not run: {row['error']}" for row in rows if "error" in row)])


def summary(results: Sequence[Result], work: Work) -> dict[str, Any]:
    """The setting, the machine's limits and the plan, as plain data."""
    said = results[0].rounds[0]
    peak = max(each["peak_flops_per_s"] for each in results[0].rounds)
    planned = {"tokens_per_s": work.num_tokens / median(each["planned_step_s"] for each in results[0].rounds)}
    planned |= {"peak_bytes": sum(said["planned_bytes"].values()), "bytes": said["planned_bytes"]}
    limits = {"peak_flops_per_s": peak, "read_bytes_per_s": max(each["read_bytes_per_s"] for each in results[0].rounds)}
    paths = {"python": work.python and str(work.python), "out": work.out and str(work.out)}
    setting = asdict(work) | paths | {"tokens_per_step": work.num_tokens}
    return setting | {"machine": asdict(machine.describe()), "limits": limits, "flops_per_step": said["flops"], "plan": planned}
