"""Mistral (Jiang et al. 2023, arXiv 2310.06825): Llama in which every layer sees a sliding window."""

from __future__ import annotations

from collections.abc import Mapping

from gemel.config.model import ModelConfig
from gemel.model.families import llama
from gemel.model.families.fields import Fields

ARCHITECTURE = "MistralForCausalLM"
PREFIX, SURPLUS, weights = llama.PREFIX, llama.SURPLUS, llama.weights


def config(hf: Mapping[str, object]) -> ModelConfig:
    """A Hugging Face Mistral configuration to ours."""
    fields = Fields(hf, "mistral")
    settings = llama.decoder(fields)
    num_layers = settings["num_layers"]
    assert isinstance(num_layers, int)
    windows = (fields.integer("sliding_window"),) * num_layers if "sliding_window" in fields else ()
    fields.finish()
    return ModelConfig.parse(settings | {"windows": windows})


def hf_config(config: ModelConfig) -> dict[str, object]:
    """Ours to a Hugging Face Mistral configuration."""
    return llama.hf_decoder(config) | {"sliding_window": config.window(0)}
