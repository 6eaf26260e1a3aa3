"""BLOOM (BigScience 2022, arXiv 2211.05100): ALiBi, a norm after the embedding, queries, keys and values interleaved head by head."""

from __future__ import annotations

from collections.abc import Mapping

from gemel.config.model import ModelConfig
from gemel.model.families.fields import Fields
from gemel.model.families.table import Interleaved, Weight, same

ARCHITECTURE = "BloomForCausalLM"
PREFIX = "transformer."
SURPLUS: tuple[str, ...] = ()


def config(hf: Mapping[str, object]) -> ModelConfig:
    """A Hugging Face BLOOM configuration to ours. ALiBi sets no limit on positions; `seq_length` is what the model was trained on."""
    fields = Fields(hf, "bloom")
    width = fields.integer("n_embed" if "n_embed" in fields else "hidden_size")
    num_heads = fields.integer("num_attention_heads" if "num_attention_heads" in fields else "n_head")
    num_layers = fields.integer("num_hidden_layers" if "num_hidden_layers" in fields else "n_layer")
    fields.only("apply_residual_connection_post_layernorm", False)
    fields.only("n_inner", 4 * width)
    fields.drop("attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "offset_alibi", "skip_bias_add")
    fields.drop("skip_bias_add_qkv", "hidden_size")
    settings = {
        "family": fields.text("model_type"),
        "num_layers": num_layers,
        "width": width,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_width": width // max(num_heads, 1),
        "ffn_width": 4 * width,
        "vocab_size": fields.integer("vocab_size"),
        "max_positions": fields.integer("seq_length", 2048),
        "norm": {"kind": "layer", "eps": fields.number("layer_norm_epsilon", 1e-5)},
        "positions": {"kind": "alibi"},
        "ffn": {"kind": "gelu"},
        "embed_norm": True,
        "tied_head": fields.flag("tie_word_embeddings", True),
    }
    fields.finish()
    return ModelConfig.parse(settings | dict.fromkeys(("qkv_bias", "out_bias", "ffn_bias"), True))


def hf_config(config: ModelConfig) -> dict[str, object]:
    """Ours to a Hugging Face BLOOM configuration."""
    return {
        "model_type": config.family,
        "hidden_size": config.width,
        "n_head": config.num_heads,
        "n_layer": config.num_layers,
        "vocab_size": config.vocab_size,
        "seq_length": config.max_positions,
        "layer_norm_epsilon": config.norm.eps,
        "tie_word_embeddings": config.tied_head,
    }


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight-name table."""
    width, kinds = config.width, ("weight", "bias")
    table = [same("embed.weight", "transformer.word_embeddings.weight", config.vocab_size)]
    for kind in kinds:
        table.append(same(f"embed_norm.{kind}", f"transformer.word_embeddings_layernorm.{kind}", width))
        table.append(same(f"norm.{kind}", f"transformer.ln_f.{kind}", width))
    if not config.tied_head:
        table.append(same("head.weight", "lm_head.weight", config.vocab_size))
    pairs = [
        ("attn_norm", "input_layernorm", width),
        ("mlp_norm", "post_attention_layernorm", width),
        ("attn.out", "self_attention.dense", width),
        ("mlp.up", "mlp.dense_h_to_4h", 4 * width),
        ("mlp.down", "mlp.dense_4h_to_h", width),
    ]
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}.", f"transformer.h.{i}."
        for kind in kinds:
            parts = (f"{theirs}self_attention.query_key_value.{kind}",)
            table.append(Weight(f"{ours}attn.qkv.{kind}", parts, Interleaved(config.num_heads)))
            table += [same(f"{ours}{a}.{kind}", f"{theirs}{b}.{kind}", rows) for a, b, rows in pairs]
    return tuple(table)
