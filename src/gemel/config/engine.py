"""How the engine spends memory and time: block pool, batch limits, policy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from gemel.config.base import Config

GIB = 2**30


class ContinuousBatching(Config):
    """Requests join and leave the running batch at every step (Orca, Yu et al. 2022)."""

    kind: Literal["continuous"] = "continuous"


class StaticBatching(Config):
    """A batch is formed, and nothing joins until all of it has finished. Kept for comparison."""

    kind: Literal["static"] = "static"
    batch_size: PositiveInt = 16


class DynamicBatching(Config):
    """As static, but a batch also starts when its oldest request has waited `max_wait_s` seconds. Kept for comparison."""

    kind: Literal["dynamic"] = "dynamic"
    batch_size: PositiveInt = 16
    max_wait_s: Annotated[float, Field(ge=0.0)] = 0.05


Batching = Annotated[ContinuousBatching | StaticBatching | DynamicBatching, Field(discriminator="kind")]


class EngineConfig(Config):
    """Limits of one engine.

    dtype               compute and KV type; auto takes bf16 where the hardware multiplies it natively and fp32 elsewhere
    device              auto takes cuda where there is one, else cpu
    max_context         tokens of prompt and output together; None takes the model's own limit
    block_tokens        tokens in one KV block (Kwon et al. 2023, arXiv 2309.06180)
    kv_bytes            memory for KV blocks; None derives it from what is free
    max_step_tokens     token budget of one step, prefill chunks and decode tokens together (Sarathi-Serve, arXiv 2403.02310)
    max_running         sequences that may hold blocks at once
    max_waiting         requests that may queue; one more is refused
    prefix_cache        reuse blocks of equal prefixes
    cache_salt          starts the hash chain: engines or tenants with different salts share nothing
    threads             intra-op threads; None takes the physical cores that this process may use
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    max_context: PositiveInt | None = None
    block_tokens: Literal[8, 16, 32, 64, 128] = 16
    kv_bytes: PositiveInt | None = None
    max_step_tokens: PositiveInt = 1024
    max_running: PositiveInt = 64
    max_waiting: NonNegativeInt = 1024
    batching: Batching = ContinuousBatching()
    prefix_cache: bool = True
    cache_salt: str = ""
    threads: PositiveInt | None = None

    @model_validator(mode="after")
    def _budget_serves_everyone(self) -> EngineConfig:
        if self.max_step_tokens < self.max_running:
            raise ValueError(
                f"max_step_tokens = {self.max_step_tokens} is less than max_running = {self.max_running}: "
                "running sequences could not all advance; raise the first or lower the second"
            )
        return self
