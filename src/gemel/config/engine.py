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

    dtype               compute and KV type; auto takes bf16 where the CPU kernels run or the hardware multiplies it, else fp32
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
    weights             auto keeps them as the checkpoint stores them; int8 (per channel) and int4 (per group) round to nearest on loading
    weight_group        elements of a row that share a scale in int4; None takes 32
    activations         of products with low-bit weights: int8 rounds them, one scale per 32 elements; full leaves them as they are
    kv                  type of keys and values; auto takes the compute type
    kernels             native runs whole steps in compiled code, torch never does; auto takes native where it can, and says why not
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
    weights: Literal["auto", "int8", "int4"] = "auto"
    weight_group: Literal[32, 64, 128] | None = None
    activations: Literal["int8", "full"] = "int8"
    kv: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    kernels: Literal["auto", "native", "torch"] = "auto"

    @model_validator(mode="after")
    def _budget_serves_everyone(self) -> EngineConfig:
        if self.max_step_tokens < self.max_running:
            raise ValueError(
                f"max_step_tokens = {self.max_step_tokens} is less than max_running = {self.max_running}: "
                "running sequences could not all advance; raise the first or lower the second"
            )
        return self

    @model_validator(mode="after")
    def _group_has_a_use(self) -> EngineConfig:
        if self.weight_group is not None and self.weights != "int4":
            raise ValueError(
                f"weight_group = {self.weight_group} has no effect with weights = {self.weights!r}; set weights = 'int4' or leave it out"
            )
        return self
