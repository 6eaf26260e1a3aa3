"""One step on the device: a plan of the scheduler becomes flat tensors, one call of the model, and logits for the rows that sample.

The runner owns the weights in their serving form and the key/value cache. It decides once, at start-up, what the
hardware asks for (compute type, prepacked weights, number of blocks) and remembers why, so that the choice can be
printed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemel.config.engine import GIB, EngineConfig
from gemel.config.errors import ConfigError
from gemel.config.model import ModelConfig
from gemel.engine.attend import KVCache, PagedAttend
from gemel.engine.logits import Logits
from gemel.engine.place import Derived
from gemel.engine.request import StepPlan
from gemel.model.build import LoadedModel
from gemel.model.leaves.prepacked import prepack
from gemel.ops import hardware

KV_SHARE = 0.25  # of free memory, when nothing was asked for
KV_MOST_BYTES = 4 * GIB  # more is only taken when asked for


class Runner:
    """Executes step plans for one model on one device."""

    def __init__(self, loaded: LoadedModel, config: EngineConfig, max_context: int):
        self.device = loaded.model.embed.weight.device
        self.dtype = loaded.model.embed.weight.dtype
        self.model = loaded.model
        if self.device.type == "cpu":
            prepack(self.model)
        self.num_blocks, self.derived = _num_blocks(loaded.config, config, max_context, self.dtype, self.device)
        self.cache = KVCache(loaded.config, self.num_blocks, config.block_tokens, self.dtype, self.device)
        self.config = loaded.config

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Logits:
        """Compute the plan's tokens. Returns logits for every scheduled sequence that samples, in the plan's order."""
        self.cache.copy(plan.copies)
        tokens_T, positions_T, sampled_S = _flatten(plan, self.device)
        hidden_TD = self.model(tokens_T, positions_T, PagedAttend(self.config, self.cache, plan.work))
        logits_SV: Tensor = self.model.head(hidden_TD.index_select(0, sampled_S))
        return Logits.of(logits_SV.float())


def _flatten(plan: StepPlan, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    tokens: list[int] = []
    positions: list[int] = []
    sampled: list[int] = []
    for item in plan.work:
        end = item.start + item.num_new
        tokens += item.sequence.tokens[item.start : end]
        positions += range(item.start, end)
        if item.samples:
            sampled.append(len(tokens) - 1)
    return tuple(torch.tensor(values, dtype=torch.int64, device=device) for values in (tokens, positions, sampled))  # type: ignore[return-value]


def _num_blocks(
    model: ModelConfig, config: EngineConfig, max_context: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, tuple[Derived, ...]]:
    """Blocks of the pool: as asked, or what the longest contexts of all running sequences could use, within a share of free memory."""
    per_block = KVCache.bytes_per_block(model, config.block_tokens, dtype)
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
    tokens = num_blocks * config.block_tokens
    return num_blocks, (Derived("KV cache", f"{num_blocks} blocks, {tokens} tokens, {size:.2f} GiB", reason),)
