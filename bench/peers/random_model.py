"""A model of 1.1 billion random weights, for what only depends on size: nothing has to be downloaded, and no engine knows it.

    python bench/peers/random_model.py DIR

writes a Hugging Face directory in bf16 of the shape of TinyLlama (Zhang et al. 2024): 22 layers of width 2048, 32 heads over 4 key/value
heads, feed-forward 5632, 32,000 tokens, head not tied. Weights are normal with a variance of one over a row's length, so that activations
neither grow nor vanish and numbers look like a model's to kernels that round them. The tokenizer is one byte per token and otherwise
placeholders: benchmarks speak token ids, but some engines do not load a model without one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, WIDTH, HEADS, KV_HEADS, FFN, VOCAB = 22, 2048, 32, 4, 5632, 32_000
CONTEXT = 4096
_CONTROL = ("<unk>", "<s>", "</s>")

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": WIDTH // HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "unk_token_id": 0,
}


def write(folder: Path, seed: int = 0) -> None:
    """Write the directory; the same seed gives the same weights."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(_weights(seed)), folder / "model.safetensors", metadata={"format": "pt"})
    for name, value in {
        "config.json": CONFIG,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": _CONTROL[0],
            "bos_token": _CONTROL[1],
            "eos_token": _CONTROL[2],
            "model_max_length": CONTEXT,
        },
    }.items():
        (folder / name).write_text(json.dumps(value, indent=1), encoding="utf-8")


def _weights(seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(torch.bfloat16)

    ones = torch.ones(WIDTH, dtype=torch.bfloat16)
    kv_width = WIDTH * KV_HEADS // HEADS
    yield "model.embed_tokens.weight", matrix(VOCAB, WIDTH)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        for projection, rows in {"q": WIDTH, "k": kv_width, "v": kv_width, "o": WIDTH}.items():
            yield f"{name}self_attn.{projection}_proj.weight", matrix(rows, WIDTH)
        for projection, shape in {"gate": (FFN, WIDTH), "up": (FFN, WIDTH), "down": (WIDTH, FFN)}.items():
            yield f"{name}mlp.{projection}_proj.weight", matrix(*shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{name}{norm}.weight", ones.clone()
    yield "model.norm.weight", ones.clone()
    yield "lm_head.weight", matrix(VOCAB, WIDTH)


def _tokenizer() -> dict[str, object]:
    """The tokenizer of Llama without any merge: what is no byte is a name that no text contains."""
    tokens = [*_CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"<placeholder {number}>" for number in range(len(tokens), VOCAB)]
    control = [
        {"id": i, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for i, text in enumerate(_CONTROL)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": control,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": _CONTROL[0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [],
        },
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(Path(sys.argv[1]))
