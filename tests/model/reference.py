"""Tiny random models of every family, made by `transformers`: the oracle for logits, gradients and checkpoints.

`transformers` takes seconds to import, so it is imported by the first test that needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemel.model.attend import PackedAttend
from gemel.model.build import LoadedModel
from gemel.model.model import Model

VOCAB = 97
_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _DECODER),
    "mistral": ("Mistral", _DECODER | {"sliding_window": 7, "head_dim": 12}),
    "qwen2": ("Qwen2", _DECODER | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", _DECODER | {"head_dim": 16}),
    "gpt2": ("GPT2", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 64}),
    "bloom": ("Bloom", {"vocab_size": VOCAB, "hidden_size": 36, "n_layer": 3, "n_head": 6}),
}
FAMILIES = tuple(_FAMILIES)
WIDE: dict[str, dict[str, Any]] = {  # changes with which groups of 32 divide every width; some more biases on the way
    "llama": {"attention_bias": True},
    "mistral": {"head_dim": 16},
    "bloom": {"hidden_size": 64, "n_head": 4},
}


def reference(family: str, **changes: Any) -> Any:
    """A random model in fp32. Every vector is made random too, so that no norm or bias can be mixed up unnoticed."""
    import transformers

    name, settings = _FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**settings | {"initializer_range": 0.3} | changes)
    torch.manual_seed(0)
    kind = "GPT2LMHeadModel" if family == "gpt2" else f"{name}ForCausalLM"
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def save_reference(directory: Path, family: str, **changes: Any) -> Any:
    """`reference`, written to `directory`."""
    model = reference(family, **changes)
    model.save_pretrained(directory)
    return model


def reference_logits(model: Any, tokens_T: Tensor) -> Tensor:
    """[T, V]."""
    with torch.no_grad():
        logits: Tensor = model(tokens_T[None]).logits[0]
    return logits


def logits(model: Model, tokens_T: Tensor, *lengths: int) -> Tensor:
    """[T, V] of ours, for documents of these lengths; without any, one document."""
    lengths = lengths or (len(tokens_T),)
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    starts = (0, *torch.tensor(lengths).cumsum(0).tolist())
    hidden_TD = model(tokens_T, positions_T, PackedAttend(model.config, starts))
    out: Tensor = model.head(hidden_TD)
    return out


def same_weights(a: LoadedModel, b: LoadedModel) -> bool:
    """Bitwise."""
    ours, theirs = dict(a.model.named_parameters()), dict(b.model.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def tokens(num: int, seed: int = 0) -> Tensor:
    """Random token ids."""
    return torch.randint(0, VOCAB, (num,), generator=torch.Generator().manual_seed(seed))
