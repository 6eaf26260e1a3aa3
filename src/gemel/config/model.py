"""What a decoder is, as plain data: the one definition in `model/` is driven by it.

A variant is a type, not a string compared in five places: the norm, the positions and the feed-forward are tagged unions, so a checker
sees that every case is handled. Families (`model/families/`) translate a checkpoint's own config into this and back.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from gemel.config.base import Config


class RMSNorm(Config):
    """Root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467): a scale, no shift, no mean."""

    kind: Literal["rms"] = "rms"
    eps: PositiveFloat = 1e-5


class LayerNorm(Config):
    """Layer norm (Ba et al. 2016, arXiv 1607.06450) with scale and shift."""

    kind: Literal["layer"] = "layer"
    eps: PositiveFloat = 1e-5


Norm = Annotated[RMSNorm | LayerNorm, Field(discriminator="kind")]


class LinearScaling(Config):
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): positions divided by `factor`."""

    kind: Literal["linear"] = "linear"
    factor: PositiveFloat


class DynamicNTK(Config):
    """NTK-aware base change that depends on the length in use.

    The reference computes the base from the longest sequence seen, which would change the rotation of keys that are already cached. Here
    `length` (tokens) is fixed when the model is built: up to `original_positions` nothing is scaled, beyond it the base is the reference's
    for exactly that length.
    """

    kind: Literal["dynamic"] = "dynamic"
    factor: PositiveFloat
    original_positions: PositiveInt
    length: PositiveInt


class Yarn(Config):
    """YaRN (Peng et al. 2023, arXiv 2309.00071): interpolate slow dimensions, keep fast ones, rescale attention."""

    kind: Literal["yarn"] = "yarn"
    factor: PositiveFloat
    original_positions: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class Llama3Scaling(Config):
    """The Llama 3.1 frequency bands: long wavelengths divided by `factor`, short kept, a ramp between."""

    kind: Literal["llama3"] = "llama3"
    factor: PositiveFloat
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_positions: PositiveInt


RopeScaling = Annotated[LinearScaling | DynamicNTK | Yarn | Llama3Scaling, Field(discriminator="kind")]


class Rope(Config):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) on all of the head width, halves rotated together."""

    kind: Literal["rope"] = "rope"
    theta: PositiveFloat = 10_000.0
    scaling: RopeScaling | None = None


class Learned(Config):
    """One trained vector per absolute position, added to the embedding (GPT-2)."""

    kind: Literal["learned"] = "learned"


class Alibi(Config):
    """A linear penalty on distance added to attention scores (Press et al. 2021, arXiv 2108.12409)."""

    kind: Literal["alibi"] = "alibi"


Positions = Annotated[Rope | Learned | Alibi, Field(discriminator="kind")]


class SwiGLU(Config):
    """Gated feed-forward: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    kind: Literal["swiglu"] = "swiglu"


class GELU(Config):
    """Plain feed-forward: down(gelu(up(x))), with the tanh approximation that GPT-2 and BLOOM were trained with."""

    kind: Literal["gelu"] = "gelu"


FeedForward = Annotated[SwiGLU | GELU, Field(discriminator="kind")]


class ModelConfig(Config):
    """A decoder-only transformer.

    Widths are in elements, `max_positions` in tokens. `windows` holds, per layer, how many most recent positions (itself included) a token
    attends to, or None for all of them.
    """

    family: str
    num_layers: PositiveInt
    width: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_width: PositiveInt
    ffn_width: PositiveInt
    vocab_size: PositiveInt
    max_positions: PositiveInt
    norm: Norm = RMSNorm()
    positions: Positions = Rope()
    ffn: FeedForward = SwiGLU()
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    embed_norm: bool = False
    tied_head: bool = False
    windows: tuple[int | None, ...] = ()

    @model_validator(mode="after")
    def _shapes_agree(self) -> ModelConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}")
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(f"windows has {len(self.windows)} entries for {self.num_layers} layers; give one per layer or none")
        if isinstance(self.positions, Rope) and self.head_width % 2:
            raise ValueError(f"head_width = {self.head_width} is odd; rotary positions rotate pairs")
        return self

    def window(self, layer: int) -> int | None:
        """How many most recent positions layer `layer` sees, or None for all."""
        return self.windows[layer] if self.windows else None

    @property
    def kv_elements_per_token(self) -> int:
        """Keys and values of one token over all layers, in elements."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_width
