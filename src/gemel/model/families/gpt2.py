"""GPT-2 (Radford et al. 2019): learned positions, layer norms, GELU, biases everywhere, matrices stored as [inputs, outputs]."""

from __future__ import annotations

from collections.abc import Mapping

from gemel.config.model import ModelConfig
from gemel.model.families.fields import Fields
from gemel.model.families.table import Transposed, Weight, same

ARCHITECTURE = "GPT2LMHeadModel"
PREFIX = "transformer."
SURPLUS: tuple[str, ...] = ("*.attn.bias", "*.attn.masked_bias")


def config(hf: Mapping[str, object]) -> ModelConfig:
    """A Hugging Face GPT-2 configuration to ours."""
    fields = Fields(hf, "gpt2")
    width, num_heads = fields.integer("n_embd"), fields.integer("n_head")
    fields.only("activation_function", "gelu_new", "gelu_pytorch_tanh")
    fields.only("scale_attn_weights", True)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("add_cross_attention", False)
    fields.drop("reorder_and_upcast_attn", "n_ctx", "summary_activation", "summary_first_dropout", "summary_proj_to_labels")
    fields.drop("summary_type", "summary_use_proj")
    settings = {
        "family": fields.text("model_type"),
        "num_layers": fields.integer("n_layer"),
        "width": width,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_width": width // max(num_heads, 1),
        "ffn_width": fields.integer("n_inner", 4 * width),
        "vocab_size": fields.integer("vocab_size"),
        "max_positions": fields.integer("n_positions"),
        "norm": {"kind": "layer", "eps": fields.number("layer_norm_epsilon", 1e-5)},
        "positions": {"kind": "learned"},
        "ffn": {"kind": "gelu"},
        "tied_head": fields.flag("tie_word_embeddings", True),
    }
    fields.finish()
    return ModelConfig.parse(settings | dict.fromkeys(("qkv_bias", "out_bias", "ffn_bias"), True))


def hf_config(config: ModelConfig) -> dict[str, object]:
    """Ours to a Hugging Face GPT-2 configuration."""
    return {
        "model_type": config.family,
        "n_embd": config.width,
        "n_head": config.num_heads,
        "n_layer": config.num_layers,
        "n_inner": config.ffn_width,
        "n_positions": config.max_positions,
        "vocab_size": config.vocab_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm.eps,
        "tie_word_embeddings": config.tied_head,
    }


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight-name table."""
    width = config.width
    table = [
        same("embed.weight", "transformer.wte.weight", config.vocab_size),
        same("positions.weight", "transformer.wpe.weight", config.max_positions),
        same("norm.weight", "transformer.ln_f.weight", width),
        same("norm.bias", "transformer.ln_f.bias", width),
    ]
    if not config.tied_head:
        table.append(same("head.weight", "lm_head.weight", config.vocab_size))
    matrices = [("attn.qkv", "attn.c_attn", 3 * width), ("attn.out", "attn.c_proj", width)]
    matrices += [("mlp.up", "mlp.c_fc", config.ffn_width), ("mlp.down", "mlp.c_proj", width)]
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}.", f"transformer.h.{i}."
        for a, b in (("attn_norm", "ln_1"), ("mlp_norm", "ln_2")):
            table += [same(f"{ours}{a}.{kind}", f"{theirs}{b}.{kind}", width) for kind in ("weight", "bias")]
        for a, b, rows in matrices:
            table.append(Weight(f"{ours}{a}.weight", (f"{theirs}{b}.weight",), Transposed()))
            table.append(same(f"{ours}{a}.bias", f"{theirs}{b}.bias", rows))
    return tuple(table)
