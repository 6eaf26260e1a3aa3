"""One step on the device: a plan of the scheduler becomes logits for the rows that sample.

There are two ways to run a step: as one call of a native program, into which the model was lowered, and through the modules in torch. The
runner decides once, at start-up, which it is, in what types, and with how many blocks of keys and values, and remembers why, so that the
choice can be printed.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

import torch
from torch import Tensor

from gemel.config.engine import GIB, EngineConfig
from gemel.config.errors import ConfigError
from gemel.engine import lower
from gemel.engine.attend import KVCache, PagedAttend
from gemel.engine.logits import Logits
from gemel.engine.lower import NativeStep
from gemel.engine.place import Derived
from gemel.engine.request import Scheduled, StepPlan, flatten
from gemel.model.build import LoadedModel
from gemel.model.leaves.prepacked import prepack
from gemel.ops import hardware
from gemel.ops.cpu import native
from gemel.ops.cpu.program import Program

KV_SHARE = 0.25  # of free memory, when nothing was asked for
KV_MOST_BYTES = 4 * GIB  # more is only taken when asked for


class Step(Protocol):
    """A way to run steps."""

    def copy(self, pairs: Seq[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to)."""
        ...

    def run(self, work: Seq[Scheduled]) -> Logits:
        """Compute the scheduled tokens; one row of logits per sequence that samples."""
        ...


class TorchStep:
    """The model's modules, called one by one."""

    def __init__(self, loaded: LoadedModel, num_blocks: int, config: EngineConfig, device: torch.device, dtype: torch.dtype):
        self.model, self.config = loaded.model, loaded.config
        if device.type == "cpu":
            prepack(self.model)
        self.cache = KVCache(loaded.config, num_blocks, config.block_tokens, dtype, device)
        self.device = device

    def copy(self, pairs: Seq[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to), before a shared block is written."""
        self.cache.copy(pairs)

    @torch.inference_mode()
    def run(self, work: Seq[Scheduled]) -> Logits:
        """Compute the scheduled tokens."""
        tokens_T, positions_T, sampled_S = (torch.tensor(v, dtype=torch.int64, device=self.device) for v in flatten(work))
        hidden_TD = self.model(tokens_T, positions_T, PagedAttend(self.config, self.cache, work))
        logits_SV: Tensor = self.model.head(hidden_TD.index_select(0, sampled_S))
        return Logits.of(logits_SV.float())


class Runner:
    """Executes step plans for one model on one device. `native` says whether a native program does it."""

    def __init__(self, loaded: LoadedModel, config: EngineConfig, max_context: int):
        embedding = loaded.model.embed.weight
        device, dtype = embedding.device, embedding.dtype
        why_not = lower.reason(loaded.config, config, device, dtype) or lower.unsupported_leaf(loaded.model)
        if why_not and config.kernels == "native":
            raise ConfigError(f"kernels = 'native', but {why_not}; set kernels = 'auto' to run in torch")
        self.native = why_not is None
        self.model, self.device, self.dtype = loaded.model, device, dtype
        kv = str(dtype).removeprefix("torch.") if config.kv == "auto" else config.kv
        if why_not and kv == "int8":
            raise ConfigError(f"kv = 'int8' needs the native kernels, but {why_not}; set kv = 'auto'")
        if self.native:
            per_block = NativeStep.bytes_per_block(loaded.config, config.block_tokens, kv)
        else:
            per_block = KVCache.bytes_per_block(loaded.config, config.block_tokens, _TORCH[kv])
        self.num_blocks, blocks = _num_blocks(per_block, config, max_context, device)
        self.derived = (
            Derived("kernels", f"native, {native.find()[1]}" if self.native else "torch", why_not or "the model lowers to a program"),
            Derived("KV type", kv, "the compute type" if config.kv == "auto" else "kv was set"),
            blocks,
        )
        self.step: Step = (
            NativeStep(loaded.model, self.num_blocks, config.block_tokens, kv, config.threads or hardware.cores().usable)
            if self.native
            else TorchStep(loaded, self.num_blocks, config, device, _TORCH[kv])
        )

    @property
    def program(self) -> Program | None:
        """What runs the steps, if it is native; it counts the time of its operations."""
        return self.step.program if isinstance(self.step, NativeStep) else None

    def run(self, plan: StepPlan) -> Logits:
        """Compute the plan's tokens. Returns one row of logits per scheduled sequence that samples, in the plan's order."""
        self.step.copy(plan.copies)
        return self.step.run(plan.work)


_TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _num_blocks(per_block: int, config: EngineConfig, max_context: int, device: torch.device) -> tuple[int, Derived]:
    """Blocks of the pool: as asked, or what the longest contexts of all running sequences could use, within a share of free memory."""
    enough = config.max_running * -(-max_context // config.block_tokens)
    if config.kv_bytes is not None:
        num_blocks, reason = config.kv_bytes // per_block, "kv_bytes was set"
    else:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else hardware.memory().available_bytes
        limit = int(free * (0.9 if device.type == "cuda" else KV_SHARE))
        limit = limit if device.type == "cuda" else min(limit, KV_MOST_BYTES)
        num_blocks = min(enough, limit // per_block)
        reason = (
            "every running sequence can reach max_context" if num_blocks == enough else f"a share of the {free / GIB:.1f} GiB that are free"
        )
    smallest = -(-max_context // config.block_tokens)
    if num_blocks < smallest:
        raise ConfigError(
            f"the KV cache has room for {num_blocks} blocks of {config.block_tokens} tokens, one sequence of "
            f"max_context = {max_context} tokens needs {smallest}: set kv_bytes to at least {smallest * per_block} "
            f"or max_context to at most {num_blocks * config.block_tokens}"
        )
    size = num_blocks * per_block / GIB
    return num_blocks, Derived("KV cache", f"{num_blocks} blocks, {num_blocks * config.block_tokens} tokens, {size:.2f} GiB", reason)
