"""The engine under test, and what the plan has to know about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from gemel.bench import storage
from gemel.bench.roofline import Rates, StepCost, Storage
from gemel.bench.workload import Workload
from gemel.config.engine import EngineConfig
from gemel.config.errors import ConfigError
from gemel.config.model import ModelConfig
from gemel.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded engine. `startup_s` is what it took to build: weights, prepacking, key/value blocks."""

    engine: Engine
    startup_s: float

    @classmethod
    def open(cls, path: Path, config: EngineConfig) -> Subject:
        """Load a checkpoint (directory or .gguf) with the engine that serves it. Benchmarks speak token ids, so no tokenizer is needed."""
        start_s = perf_counter()
        engine = Engine.load(path, config)
        return cls(engine, perf_counter() - start_s)

    @property
    def config(self) -> EngineConfig:
        """Limits of the engine."""
        return self.engine.config

    @property
    def model(self) -> ModelConfig:
        """Shape of the model."""
        return self.engine.model_config

    @property
    def dtype(self) -> torch.dtype:
        """The compute type: what weights that are not low-bit, and keys and values if nothing else was asked for, are kept in."""
        return self.engine.runner.dtype

    @property
    def device(self) -> torch.device:
        """Where the engine computes."""
        return self.engine.runner.device

    @property
    def storage(self) -> Storage:
        """What weights, keys and values are kept in."""
        return storage.of(self.engine.runner.model, self.model, kv_format(self.config, self.dtype))

    def cost(self, rates: Rates) -> StepCost:
        """What a step of this model costs on a machine of these rates."""
        return StepCost(self.model, self.storage, rates, self.config.block_tokens)

    @property
    def num_blocks(self) -> int:
        """Blocks of the key/value pool."""
        return self.engine.stats().blocks_total

    def planned_memory_bytes(self, cost: StepCost) -> float:
        """Weights and key/value pool: what must be resident; the interpreter and libraries come on top."""
        return cost.storage.weight_bytes + self.num_blocks * self.config.block_tokens * cost.storage.kv_bytes_per_token

    def check(self, workload: Workload) -> None:
        """Raise ConfigError, before anything is timed, if the workload is not for this model."""
        jobs = (workload.decode, *workload.offline, *workload.shared, *(job for jobs in workload.prefill.values() for job in jobs))
        largest = max(max(job.prompt) for job in jobs)
        if largest >= self.model.vocab_size:
            raise ConfigError(
                f"workload {workload.name!r} has token id {largest}, the model's vocabulary ends at {self.model.vocab_size - 1}: "
                "leave --workload out for one that is made to fit"
            )
        longest = max(job.num_total for job in jobs)
        if longest > self.engine.max_context:
            raise ConfigError(
                f"workload {workload.name!r} has a job of {longest} tokens, the engine's limit is {self.engine.max_context}: "
                "raise --max-context, or leave --workload out for one that is made to fit"
            )


def kv_format(config: EngineConfig, dtype: torch.dtype) -> str:
    """What keys and values are kept in: what was set, or the compute type."""
    return str(dtype).removeprefix("torch.") if config.kv == "auto" else config.kv
