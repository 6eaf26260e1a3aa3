"""Llama (Touvron et al. 2023, arXiv 2302.13971), and what Mistral and Qwen share with it.

Those families differ in biases, norms on queries and keys, and windows. All of that is in `ModelConfig`, so one weight-name table serves
them, and each family's file holds only how its configuration is spelt.
"""

from __future__ import annotations

from collections.abc import Mapping

from gemel.config.errors import UnsupportedError
from gemel.config.model import DynamicNTK, LinearScaling, Llama3Scaling, ModelConfig, Rope, RopeScaling, Yarn
from gemel.model.families.fields import Fields
from gemel.model.families.table import Stacked, Weight, same

ARCHITECTURE = "LlamaForCausalLM"
PREFIX = "model."
SURPLUS: tuple[str, ...] = ("*.rotary_emb.inv_freq",)


def config(hf: Mapping[str, object]) -> ModelConfig:
    """A Hugging Face Llama configuration to ours."""
    fields = Fields(hf, "llama")
    bias = fields.flag("attention_bias", False)
    settings = decoder(fields) | {"qkv_bias": bias, "out_bias": bias, "ffn_bias": fields.flag("mlp_bias", False)}
    fields.only("rope_interleaved", False)
    fields.finish()
    return ModelConfig.parse(settings)


def hf_config(config: ModelConfig) -> dict[str, object]:
    """Ours to a Hugging Face Llama configuration."""
    return hf_decoder(config) | {"attention_bias": config.qkv_bias, "mlp_bias": config.ffn_bias}


def decoder(fields: Fields) -> dict[str, object]:
    """The settings that Llama, Mistral and Qwen spell alike."""
    width, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_width = fields.integer("head_dim", width // max(num_heads, 1))
    fields.only("hidden_act", "silu", "swish")
    positions, max_positions = rope(fields, fields.integer("max_position_embeddings"))
    return {
        "family": fields.text("model_type"),
        "num_layers": fields.integer("num_hidden_layers"),
        "width": width,
        "num_heads": num_heads,
        "num_kv_heads": fields.integer("num_key_value_heads", num_heads),
        "head_width": head_width,
        "ffn_width": fields.integer("intermediate_size"),
        "vocab_size": fields.integer("vocab_size"),
        "max_positions": max_positions,
        "norm": {"kind": "rms", "eps": fields.number("rms_norm_eps", 1e-6)},
        "positions": positions,
        "tied_head": fields.flag("tie_word_embeddings", False),
    }


def hf_decoder(config: ModelConfig) -> dict[str, object]:
    """The other direction of `decoder`. Rotary settings in the spelling that every version of `transformers` reads."""
    assert isinstance(config.positions, Rope)
    scaling = config.positions.scaling
    return {
        "model_type": config.family,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": scaling.original_positions if isinstance(scaling, DynamicNTK) else config.max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm.eps,
        "rope_theta": config.positions.theta,
        "rope_scaling": None if scaling is None else _hf_scaling(scaling),
        "tie_word_embeddings": config.tied_head,
    }


def rope(fields: Fields, max_positions: int) -> tuple[Rope, int]:
    """Rotary settings in either spelling (`rope_theta` with `rope_scaling`, or `rope_parameters`), and how many positions they reach."""
    section = fields.section("rope_parameters") or fields.section("rope_scaling") or Fields({}, f"{fields.what}: rope")
    fields.drop("rope_scaling")
    outer_theta = fields.number("rope_theta", 10_000.0)
    theta = section.number("rope_theta", outer_theta)
    for place in (fields, section):
        place.only("partial_rotary_factor", 1, 1.0)
    spellings = {section.text(name) for name in ("rope_type", "type") if name in section}
    if len(spellings) > 1:
        raise UnsupportedError(f"{section.what}: rope_type and type disagree: {', '.join(sorted(spellings))}")
    scaling = _scaling(spellings.pop() if spellings else "default", section, max_positions)
    section.finish()
    match scaling:
        case DynamicNTK(length=length):
            max_positions = length
        case Yarn(factor=factor, original_positions=original):
            max_positions = max(max_positions, int(factor * original))
        case _:
            pass
    return Rope.parse({"theta": theta, "scaling": scaling}), max_positions


def _scaling(kind: str, section: Fields, max_positions: int) -> RopeScaling | None:
    match kind:
        case "default":
            section.drop("factor", "original_max_position_embeddings")
            return None
        case "linear":
            section.drop("original_max_position_embeddings")
            return LinearScaling.parse({"factor": section.number("factor")})
        case "dynamic":
            section.drop("original_max_position_embeddings")  # the reference computes with max_position_embeddings
            factor = section.number("factor")
            return DynamicNTK.parse({"factor": factor, "original_positions": max_positions, "length": int(factor * max_positions)})
        case "yarn":
            return _yarn(section, max_positions)
        case "llama3":
            numbers = {name: section.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor")}
            original = section.integer("original_max_position_embeddings", max_positions)
            return Llama3Scaling.parse(numbers | {"original_positions": original})
        case _:
            raise UnsupportedError(f"{section.what}: rope_type = {kind!r} is not supported; default, linear, dynamic, yarn and llama3 are")


def _yarn(section: Fields, max_positions: int) -> Yarn:
    original = section.integer("original_max_position_embeddings", max_positions)
    optional = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
    numbers = {name: section.number(name) for name in optional if name in section}
    factor, truncate = section.number("factor", max_positions / original), section.flag("truncate", True)
    return Yarn.parse({"factor": factor, "original_positions": original, "truncate": truncate} | numbers)


def _hf_scaling(scaling: RopeScaling) -> dict[str, object]:
    match scaling:
        case LinearScaling(factor=factor) | DynamicNTK(factor=factor):
            return {"rope_type": scaling.kind, "factor": factor}
        case Yarn() | Llama3Scaling():
            values = scaling.model_dump(exclude={"kind", "original_positions"}, exclude_none=True)
            return {"rope_type": scaling.kind, "original_max_position_embeddings": scaling.original_positions} | values


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight-name table."""
    width, head_width = config.width, config.head_width
    q_rows, kv_rows = config.num_heads * head_width, config.num_kv_heads * head_width
    table = [same("embed.weight", "model.embed_tokens.weight", config.vocab_size), same("norm.weight", "model.norm.weight", width)]
    if not config.tied_head:
        table.append(same("head.weight", "lm_head.weight", config.vocab_size))
    qkv, gate_up = Stacked((q_rows, kv_rows, kv_rows)), Stacked((config.ffn_width, config.ffn_width))
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        table.append(same(ours + "attn_norm.weight", theirs + "input_layernorm.weight", width))
        table.append(same(ours + "mlp_norm.weight", theirs + "post_attention_layernorm.weight", width))
        if config.qk_norm:
            table.append(same(ours + "attn.q_norm.weight", theirs + "self_attn.q_norm.weight", head_width))
            table.append(same(ours + "attn.k_norm.weight", theirs + "self_attn.k_norm.weight", head_width))
        for kind, attn, out, ffn in (("weight", True, True, True), ("bias", config.qkv_bias, config.out_bias, config.ffn_bias)):
            if attn:
                parts = tuple(f"{theirs}self_attn.{x}_proj.{kind}" for x in "qkv")
                table.append(Weight(f"{ours}attn.qkv.{kind}", parts, qkv))
            if out:
                table.append(same(f"{ours}attn.out.{kind}", f"{theirs}self_attn.o_proj.{kind}", width))
            if ffn:
                parts = (f"{theirs}mlp.gate_proj.{kind}", f"{theirs}mlp.up_proj.{kind}")
                table.append(Weight(f"{ours}mlp.gate_up.{kind}", parts, gate_up))
                table.append(same(f"{ours}mlp.down.{kind}", f"{theirs}mlp.down_proj.{kind}", width))
    return tuple(table)
