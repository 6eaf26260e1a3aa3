"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv 2407.10671): Llama with biases on queries, keys and values, and optional windows."""

from __future__ import annotations

from collections.abc import Mapping

from gemel.config.errors import UnsupportedError
from gemel.config.model import ModelConfig
from gemel.model.families import llama
from gemel.model.families.fields import Fields

ARCHITECTURE = "Qwen2ForCausalLM"
PREFIX, SURPLUS, weights = llama.PREFIX, llama.SURPLUS, llama.weights
FULL, SLIDING = "full_attention", "sliding_attention"


def config(hf: Mapping[str, object]) -> ModelConfig:
    """A Hugging Face Qwen2 configuration to ours."""
    fields = Fields(hf, "qwen2")
    settings = llama.decoder(fields)
    settings |= {"qkv_bias": True, "windows": windows(fields, settings["num_layers"])}
    fields.only("use_mrope", False)
    fields.finish()
    return ModelConfig.parse(settings)


def hf_config(config: ModelConfig) -> dict[str, object]:
    """Ours to a Hugging Face Qwen2 configuration."""
    return llama.hf_decoder(config) | hf_windows(config)


def windows(fields: Fields, num_layers: object) -> tuple[int | None, ...]:
    """One window per layer: as `layer_types` says, or from layer `max_window_layers` on; none unless `use_sliding_window`."""
    assert isinstance(num_layers, int)
    first, width = fields.integer("max_window_layers", num_layers), fields.integer("sliding_window", 4096)
    explicit = "layer_types" in fields
    kinds = fields.texts("layer_types") if explicit else [SLIDING if i >= first else FULL for i in range(num_layers)]
    if unknown := set(kinds) - {FULL, SLIDING}:
        raise UnsupportedError(f"{fields.what}: layer_types has {', '.join(sorted(unknown))}; {FULL} and {SLIDING} are supported")
    if not fields.flag("use_sliding_window", False):
        if explicit and SLIDING in kinds:
            raise UnsupportedError(f"{fields.what}: layer_types has {SLIDING} but use_sliding_window is false; make them agree")
        return ()
    if SLIDING not in kinds:
        return ()
    return tuple(width if kind == SLIDING else None for kind in kinds)


def hf_windows(config: ModelConfig) -> dict[str, object]:
    """The other direction of `windows`. A family has one width for all its windows."""
    widths = {window for window in config.windows if window is not None}
    if not widths:
        return {"use_sliding_window": False}
    kinds = [FULL if window is None else SLIDING for window in config.windows]
    return {"use_sliding_window": True, "sliding_window": widths.pop(), "max_window_layers": kinds.index(SLIDING), "layer_types": kinds}
