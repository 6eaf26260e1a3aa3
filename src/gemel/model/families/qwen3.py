"""Qwen3 (Yang et al. 2025, arXiv 2505.09388): Llama with a norm on every query and key head, and optional windows."""

from __future__ import annotations

from collections.abc import Mapping

from gemel.config.model import ModelConfig
from gemel.model.families import llama, qwen2
from gemel.model.families.fields import Fields

ARCHITECTURE = "Qwen3ForCausalLM"
PREFIX, SURPLUS, weights = llama.PREFIX, llama.SURPLUS, llama.weights


def config(hf: Mapping[str, object]) -> ModelConfig:
    """A Hugging Face Qwen3 configuration to ours."""
    fields = Fields({"head_dim": 128} | dict(hf), "qwen3")
    settings, bias = llama.decoder(fields), fields.flag("attention_bias", False)
    settings |= {"qk_norm": True, "qkv_bias": bias, "out_bias": bias, "windows": qwen2.windows(fields, settings["num_layers"])}
    fields.finish()
    return ModelConfig.parse(settings)


def hf_config(config: ModelConfig) -> dict[str, object]:
    """Ours to a Hugging Face Qwen3 configuration."""
    return llama.hf_decoder(config) | {"attention_bias": config.qkv_bias} | qwen2.hf_windows(config)
