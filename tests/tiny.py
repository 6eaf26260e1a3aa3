"""Tiny random models, one per kind of attention and block that the model definition knows."""

from __future__ import annotations

from pathlib import Path

import torch

from gemel.config.model import GELU, Alibi, LayerNorm, Learned, ModelConfig, Rope
from gemel.model.build import LoadedModel
from gemel.model.model import Model

_BASE = ModelConfig(
    family="llama",
    num_layers=2,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    ffn_width=48,
    vocab_size=97,
    max_positions=256,
)
_PLAIN = {"norm": LayerNorm(), "ffn": GELU(), "qkv_bias": True, "out_bias": True, "ffn_bias": True, "num_kv_heads": 4, "tied_head": True}

CONFIGS: dict[str, ModelConfig] = {
    "gqa": _BASE,
    "mha": _BASE.model_copy(update={"num_kv_heads": 4}),
    "mqa": _BASE.model_copy(update={"num_kv_heads": 1, "tied_head": True}),
    "window": _BASE.model_copy(update={"family": "mistral", "windows": (7, None)}),
    "qk_norm": _BASE.model_copy(update={"family": "qwen3", "qk_norm": True, "positions": Rope(theta=1e6)}),
    "learned": _BASE.model_copy(update={"family": "gpt2", "positions": Learned(), **_PLAIN}),
    "alibi": _BASE.model_copy(update={"family": "bloom", "positions": Alibi(), "embed_norm": True, **_PLAIN}),
}
EOS = 96


def build(kind: str = "gqa", seed: int = 0, device: str = "cpu", **changes: object) -> LoadedModel:
    """A model of that kind with random weights, the same for the same seed. `changes` are fields of the configuration."""
    config = CONFIGS[kind].model_copy(update=changes)
    generator = torch.Generator().manual_seed(seed)
    model = Model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    return LoadedModel(model.requires_grad_(False).to(device), config, Path("tiny"), (EOS,), None)


def documents(*lengths: int, seed: int = 1) -> list[list[int]]:
    """Random documents of these lengths, without the end token."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, EOS, (n,), generator=generator).tolist() for n in lengths]
