"""What each family's configuration says in ours, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemel.config.errors import CheckpointError, ConfigError, UnsupportedError
from gemel.config.model import LinearScaling, Llama3Scaling, ModelConfig, Rope, Yarn
from gemel.model.families import FAMILIES, family
from gemel.model.families.table import Interleaved, Stacked, Transposed

DECODER: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 256,
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 32, "vocab_size": 100}
BLOOM: dict[str, Any] = {"model_type": "bloom", "hidden_size": 64, "n_head": 4, "n_layer": 2, "vocab_size": 100}


def read(hf: dict[str, Any]) -> ModelConfig:
    return family(hf["model_type"]).config(hf)


def test_defaults_of_the_reference() -> None:
    config = read(DECODER)
    assert (config.num_kv_heads, config.head_width, config.norm.eps, config.tied_head) == (4, 16, 1e-6, False)
    assert config.positions == Rope(theta=10_000.0) and config.windows == ()
    assert read(DECODER | {"model_type": "qwen3"}).head_width == 128


def test_keys_that_change_nothing_are_fine() -> None:
    noise = {"use_cache": True, "torch_dtype": "bfloat16", "initializer_range": 0.02, "transformers_version": "4.1", "unknown": None}
    noise |= {"attention_dropout": 0.1, "rope_interleaved": False, "is_llama_config": True, "transformers.js_config": {"a": 1}}
    assert read(DECODER | noise) == read(DECODER)


def test_configurations_as_published() -> None:
    """The keys of well-known checkpoints, with all the noise that their tools left in them."""
    smollm = {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu"}
    smollm |= {"hidden_size": 576, "initializer_range": 0.0417, "intermediate_size": 1536, "is_llama_config": True, "model_type": "llama"}
    smollm |= {"max_position_embeddings": 8192, "mlp_bias": False, "num_attention_heads": 9, "num_hidden_layers": 30, "pad_token_id": 2}
    smollm |= {"num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_interleaved": False, "rope_scaling": None}
    smollm |= {"rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 49152}
    smollm |= {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "transformers_version": "4.42.3"}
    assert read(smollm).kv_elements_per_token == 2 * 30 * 3 * 64

    gpt2 = {"activation_function": "gelu_new", "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256}
    gpt2 |= {"initializer_range": 0.02, "layer_norm_epsilon": 1e-5, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12}
    gpt2 |= {"n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1}
    gpt2 |= {"summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257}
    gpt2 |= {"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "_num_labels": 1}
    assert (read(gpt2).ffn_width, read(gpt2).tied_head) == (3072, True)

    bloom = {"apply_residual_connection_post_layernorm": False, "attention_softmax_in_fp32": True, "bias_dropout_fusion": True}
    bloom |= {"masked_softmax_fusion": True, "model_type": "bloom", "n_embed": 1024, "n_inner": None, "n_layer": 24, "offset_alibi": 100}
    bloom |= {"num_attention_heads": 16, "pretraining_tp": 1, "seq_length": 2048, "skip_bias_add": True, "skip_bias_add_qkv": False}
    bloom |= {"unk_token_id": 0, "vocab_size": 250880, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    assert (read(bloom).head_width, read(bloom).max_positions) == (64, 2048)

    qwen = {"attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 1536, "intermediate_size": 8960, "model_type": "qwen2"}
    qwen |= {"max_position_embeddings": 131072, "max_window_layers": 21, "num_attention_heads": 12, "num_hidden_layers": 28}
    qwen |= {"num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000, "sliding_window": 4096, "tie_word_embeddings": False}
    qwen |= {"use_mrope": False, "use_sliding_window": False, "vocab_size": 151936}
    assert read(qwen).windows == () and read(qwen).qkv_bias


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (DECODER | {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; 'silu' or 'swish' is"),
        (DECODER | {"quantization_config": {"bits": 4}}, "quantization_config.*compressed-tensors and GGUF are read"),
        (DECODER | {"auto_map": {"AutoModel": "x.Y"}}, "auto_map.*never run"),
        (DECODER | {"num_local_experts": 8}, "num_local_experts.*mixtures of experts"),
        (DECODER | {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (DECODER | {"logit_scale": 2.0}, "logit_scale = 2.0, which this model family does not know"),
        (DECODER | {"rope_interleaved": True}, "rope_interleaved = True"),
        (DECODER | {"is_encoder_decoder": True}, "is_encoder_decoder = True"),
        (DECODER | {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type = 'longrope' is not supported; default, linear"),
        (DECODER | {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "rope_type and type disagree"),
        (DECODER | {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}, "mrope_section"),
        (DECODER | {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        (DECODER | {"model_type": "mistral", "layer_types": ["sliding_attention"] * 3}, "layer_types"),
        (DECODER | {"model_type": "mistral", "attention_bias": True}, "attention_bias"),
        (DECODER | {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        (DECODER | {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, "use_sliding_window is false"),
        (GPT2 | {"activation_function": "relu"}, "activation_function = 'relu'"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention = True"),
        (BLOOM | {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm = True"),
        ({"model_type": "mamba"}, "model_type = 'mamba' is not supported; these are: bloom, gpt2, llama, mistral, qwen2, qwen3"),
    ],
)
def test_refused_by_name(hf: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        read(hf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size = '64' is not a whole number"),
        ({"hidden_size": True}, "hidden_size = True is not a whole number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan is not a finite number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes' is not true or false"),
        ({"rope_scaling": [1]}, r"rope_scaling = \[1\] is not an object"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
    ],
)
def test_values_of_the_wrong_type(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(DECODER | change)


@pytest.mark.parametrize(
    "change",
    [{"num_key_value_heads": 3}, {"num_attention_heads": 0}, {"rms_norm_eps": 0.0}, {"rope_scaling": {"type": "linear", "factor": -1.0}}],
)
def test_values_that_make_no_model(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        read(DECODER | change)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rotary_settings_in_either_spelling(key: str) -> None:
    def rope(scaling: dict[str, Any]) -> tuple[object, int]:
        config = read(DECODER | {"rope_theta": 5e5, key: scaling})
        return config.positions, config.max_positions

    assert rope({"rope_type": "default"}) == (Rope(theta=5e5), 256)
    assert rope({"type": "linear", "factor": 4}) == (Rope(theta=5e5, scaling=LinearScaling(factor=4.0)), 256)
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
    assert rope({"rope_type": "llama3", "original_max_position_embeddings": 32} | llama3) == (
        Rope(theta=5e5, scaling=Llama3Scaling(original_positions=32, **llama3)),
        256,
    )
    assert rope({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}) == (
        Rope(theta=5e5, scaling=Yarn(factor=4.0, original_positions=128)),
        512,
    )
    assert rope({"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.1, "beta_fast": 16, "truncate": False}) == (
        Rope(theta=5e5, scaling=Yarn(factor=2.0, original_positions=256, attention_factor=1.1, beta_fast=16.0, truncate=False)),
        512,
    )


def test_windows() -> None:
    qwen = DECODER | {"model_type": "qwen2", "sliding_window": 10, "max_window_layers": 2}
    assert read(qwen).windows == ()
    assert read(qwen | {"use_sliding_window": True}).windows == (None, None, 10)
    assert read(qwen | {"use_sliding_window": True, "max_window_layers": 3}).windows == ()
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert read(qwen | {"use_sliding_window": True, "layer_types": kinds}).windows == (10, None, None)
    assert read(DECODER | {"model_type": "mistral", "sliding_window": 8}).windows == (8, 8, 8)
    assert read(DECODER | {"model_type": "mistral"}).windows == ()


def test_older_spellings_of_bloom() -> None:
    old = {"model_type": "bloom", "n_embed": 64, "num_attention_heads": 4, "n_layer": 2, "vocab_size": 100, "seq_length": 512}
    assert read(old) == read(BLOOM | {"seq_length": 512})


@pytest.mark.parametrize("name", FAMILIES)
def test_configurations_survive_the_way_there_and_back(name: str) -> None:
    window = {} if name == "llama" else {"sliding_window": 8}
    hf = {"gpt2": GPT2, "bloom": BLOOM}.get(name, DECODER | {"model_type": name} | window)
    config = read(hf)
    assert family(name).config(family(name).hf_config(config)) == config


@pytest.mark.parametrize(
    ("form", "shape"), [(Stacked((6, 4, 2)), (12, 5)), (Transposed(), (4, 6)), (Interleaved(2), (18, 5)), (Interleaved(2), (18,))]
)
def test_forms_are_reversible(form: Any, shape: tuple[int, ...]) -> None:
    whole = torch.randn(shape)
    assert torch.equal(form.join(form.split(whole)), whole)


def test_interleaved_heads_by_hand() -> None:
    stored = torch.tensor(["q0 k0 v0 q1 k1 v1".split().index(name) for name in "q0 k0 v0 q1 k1 v1".split()])  # noqa: SIM905
    assert Interleaved(2).join([stored]).tolist() == [0, 3, 1, 4, 2, 5]  # q0 q1 k0 k1 v0 v1
