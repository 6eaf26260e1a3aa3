"""GGUF files written here, as llama.cpp's converter lays them out, against the same model from a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from gemel import ops
from gemel.config.errors import CheckpointError, UnsupportedError
from gemel.config.model import Llama3Scaling, ModelConfig, RMSNorm, Rope, Yarn
from gemel.model.build import LoadedModel, load, save
from gemel.model.families import llama
from gemel.model.gguf_file import RotatesNeighbours, open_gguf
from gemel.model.gguf_header import read_header
from gemel.model.leaves.lowbit import LowBit
from gemel.model.model import Model
from tests.model.reference import logits, same_weights, tokens
from tests.tolerance import assert_close

Kind = gguf.GGMLQuantizationType
CONFIG = ModelConfig(
    family="llama",
    num_layers=2,
    width=64,
    num_heads=4,
    num_kv_heads=2,
    head_width=16,
    ffn_width=96,
    vocab_size=97,
    max_positions=128,
    norm=RMSNorm(eps=1e-6),
    positions=Rope(theta=5e4),
)
TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def neighbours(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """What the converter does to queries and keys: rows (half, pair) of every head become (pair, half)."""
    return rows.reshape(num_heads, 2, len(rows) // num_heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def gguf_tensors(config: ModelConfig, model: Model, arch: str) -> dict[str, np.ndarray]:
    out = {}
    for weight in llama.weights(config):
        for name, part in zip(weight.parts, weight.form.split(model.get_parameter(weight.name).detach()), strict=True):
            stem, _, kind = name.rpartition(".")
            array = part.contiguous().numpy()
            if arch == "llama" and stem.endswith(("q_proj", "k_proj")):
                array = neighbours(array, config.num_heads if stem.endswith("q_proj") else config.num_kv_heads)
            if stem.startswith("model.layers."):
                _, _, index, rest = stem.split(".", 3)
                out[f"blk.{index}.{TENSORS[rest]}.{kind}"] = array
            else:
                out[{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[stem] + "." + kind] = array
    return out


def write(
    path: Path,
    tensors: dict[str, np.ndarray],
    kind: Kind = Kind.F32,
    arch: str = "llama",
    metadata: dict[str, Any] | None = None,
    config: ModelConfig = CONFIG,
) -> None:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm.eps)
    assert isinstance(config.positions, Rope)
    writer.add_rope_freq_base(config.positions.theta)
    writer.add_token_list([f"token {i}" for i in range(3000)])  # long enough to be stepped over
    writer.add_token_scores([0.5] * 3000)
    writer.add_eos_token_id(7)
    writer.add_uint32("tokenizer.ggml.eot_token_id", 9)
    writer.add_bos_token_id(1)
    for name, value in (metadata or {}).items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](f"{arch}.{name}", value)
    for name, array in tensors.items():
        use = Kind.F32 if array.ndim == 1 else kind
        if use == Kind.F16:
            writer.add_tensor(name, array.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, use), raw_dtype=use)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _dense(read: torch.Tensor | LowBit) -> torch.Tensor:
    return read.dense() if isinstance(read, LowBit) else read


def model(config: ModelConfig = CONFIG) -> Model:
    torch.manual_seed(0)
    return Model(config)


def test_a_llama_file_is_the_llama_directory(tmp_path: Path) -> None:
    ours = model()
    save(LoadedModel(ours, CONFIG, tmp_path, (7, 9), 1), tmp_path / "hf")
    write(tmp_path / "m.gguf", gguf_tensors(CONFIG, ours, "llama"))
    from_file, from_directory = load(tmp_path / "m.gguf"), load(tmp_path / "hf")
    assert from_file.config == from_directory.config == CONFIG
    assert same_weights(from_file, from_directory)
    assert (from_file.eos_token_ids, from_file.bos_token_id) == ((7, 9), 1)


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("qwen2", {"family": "qwen2", "qkv_bias": True}),
        ("qwen3", {"family": "qwen3", "qk_norm": True, "tied_head": True}),
        ("llama", {"qkv_bias": True, "out_bias": True, "tied_head": True}),
        ("llama", {"family": "mistral", "windows": (16, 16)}),
    ],
)
def test_other_architectures(arch: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config = CONFIG.model_copy(update=changes)
    ours = model(config)
    metadata = {"attention.sliding_window": 16} if config.windows else {"attention.key_length": 16, "attention.value_length": 16}
    write(tmp_path / "m.gguf", gguf_tensors(config, ours, arch), arch=arch, metadata=metadata, config=config)
    loaded = load(tmp_path / "m.gguf")
    assert loaded.config == config
    with torch.inference_mode():
        assert torch.equal(logits(loaded.model, tokens(20)), logits(ours, tokens(20)))


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1], ids=lambda kind: kind.name)
def test_types_that_can_be_written(kind: Kind, tmp_path: Path) -> None:
    tensors = gguf_tensors(CONFIG, model(), "llama")
    write(tmp_path / "m.gguf", tensors, kind)
    loaded = load(tmp_path / "m.gguf", weights="dense")

    def stored(name: str) -> torch.Tensor:
        packed = tensors[name].astype(np.float16) if kind == Kind.F16 else gguf.quants.quantize(tensors[name], kind)
        return torch.from_numpy(gguf.quants.dequantize(packed, kind).astype(np.float32))

    assert torch.equal(loaded.model.embed.weight, stored("token_embd.weight"))
    assert torch.equal(loaded.model.get_parameter("layers.1.mlp.down.weight"), stored("blk.1.ffn_down.weight"))
    assert torch.equal(loaded.model.get_parameter("layers.0.attn.qkv.weight")[-32:], stored("blk.0.attn_v.weight"))
    narrow = load(tmp_path / "m.gguf", dtype=torch.bfloat16, weights="dense")
    assert torch.equal(narrow.model.embed.weight, stored("token_embd.weight").bfloat16())


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q5_K, Kind.Q6_K], ids=lambda kind: kind.name)
def test_k_quants(kind: Kind, tmp_path: Path) -> None:
    """The package reads these and cannot write them, so the blocks are random bytes around finite scales."""
    config = CONFIG.model_copy(update={"width": 256, "head_width": 64})
    tensors = gguf_tensors(config, model(config), "llama")
    num_blocks, block_bytes = 97, gguf.GGML_QUANT_SIZES[kind][1]
    packed = np.random.default_rng(0).integers(0, 256, (num_blocks, block_bytes), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    places = (208,) if kind == Kind.Q6_K else (0, 2)
    for place in places:
        packed[:, place : place + 2] = scale
    writer_quantize = gguf.quants.quantize
    try:
        gguf.quants.quantize = lambda array, use: packed if use == kind else writer_quantize(array, use)
        embedding = {"token_embd.weight": tensors["token_embd.weight"]}
        with pytest.raises(CheckpointError, match="lacks"):
            write(tmp_path / "m.gguf", embedding, kind, config=config)
            load(tmp_path / "m.gguf")
    finally:
        gguf.quants.quantize = writer_quantize
    got = _dense(open_gguf(tmp_path / "m.gguf").stored["token_embd.weight"].read())
    want = torch.from_numpy(gguf.quants.dequantize(packed, kind))
    if kind == Kind.Q4_K:  # products of scales of two levels are rounded to fp16
        assert_close(got, want, "fp16_scales")
    else:
        assert torch.equal(got, want)
    assert got.shape == (97, 256) and got.std() > 0


def test_other_types_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", gguf_tensors(CONFIG, model(), "llama"), Kind.F32)
    data = (tmp_path / "m.gguf").read_bytes()
    name = b"blk.1.ffn_up.weight"
    where = data.index(name) + len(name) + 4 + 16
    (tmp_path / "m.gguf").write_bytes(data[:where] + int(Kind.I32).to_bytes(4, "little") + data[where + 4 :])
    with pytest.raises(UnsupportedError, match=r"blk\.1\.ffn_up\.weight is stored as I32; BF16, F16, F32, Q4_0"):
        load(tmp_path / "m.gguf")


def test_permutation_is_reversible_and_the_converters() -> None:
    form, whole = RotatesNeighbours((64, 32, 32), 16), torch.randn(128, 5)
    q, k, v = form.split(whole)
    assert np.array_equal(q.numpy(), neighbours(whole[:64].numpy(), 4)) and np.array_equal(k.numpy(), neighbours(whole[64:96].numpy(), 2))
    assert torch.equal(form.join([q, k, v]), whole)


def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path: Path) -> None:
    bands = Llama3Scaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192)
    divisors = ops.rope_frequencies(Rope(theta=5e4), 16)[0] / ops.rope_frequencies(Rope(theta=5e4, scaling=bands), 16)[0]
    tensors = gguf_tensors(CONFIG, model(), "llama")
    write(tmp_path / "m.gguf", tensors | {"rope_freqs.weight": divisors.numpy()})
    assert load(tmp_path / "m.gguf").config.positions == Rope(theta=5e4, scaling=bands)
    write(tmp_path / "other.gguf", tensors | {"rope_freqs.weight": np.linspace(1, 7, 8, dtype=np.float32)})
    with pytest.raises(UnsupportedError, match=r"rope_freqs\.weight is not the scaling of Llama 3"):
        load(tmp_path / "other.gguf")


def test_scaling_in_the_metadata(tmp_path: Path) -> None:
    metadata = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
    write(tmp_path / "m.gguf", gguf_tensors(CONFIG, model(), "llama"), metadata=metadata)
    assert load(tmp_path / "m.gguf").config.positions == Rope(theta=5e4, scaling=Yarn(factor=4.0, original_positions=64))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"expert_count": 8}, "expert_count = 8"),
        ({"rope.dimension_count": 8}, "rope.dimension_count = 8 is not supported; 16 is"),
        ({"attention.value_length": 8}, "attention.value_length = 8"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "rope_type = 'longrope' is not supported"),
        ({"logit_scale": 2.0}, "logit_scale = 2.0"),
    ],
)
def test_metadata_is_refused_by_name(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", gguf_tensors(CONFIG, model(), "llama"), metadata=metadata)
    with pytest.raises(UnsupportedError, match=message):
        load(tmp_path / "m.gguf")


def test_architectures_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", {}, arch="mamba")
    with pytest.raises(UnsupportedError, match="architecture 'mamba' is not supported in GGUF files; llama, qwen2 and qwen3 are"):
        load(tmp_path / "m.gguf")


@pytest.mark.parametrize("keep", [0, 3, 100, 20_000, 60_000, -100])
def test_a_truncated_file_is_named(keep: int, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", gguf_tensors(CONFIG, model(), "llama"))
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=r"m\.gguf is truncated or not a GGUF file"):
        load(tmp_path / "m.gguf")


def test_long_lists_are_stepped_over_and_the_rest_is_the_packages(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", gguf_tensors(CONFIG, model(), "llama"), Kind.Q8_0)
    fields, spans = read_header(tmp_path / "m.gguf")
    theirs = gguf.GGUFReader(tmp_path / "m.gguf")
    long_lists = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores")
    want = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.") and name not in long_lists}
    assert fields == {name: float(str(np.float32(value))) if isinstance(value, float) else value for name, value in want.items()}
    data = (tmp_path / "m.gguf").read_bytes()
    assert list(spans) == [tensor.name for tensor in theirs.tensors]
    for span, tensor in zip(spans.values(), theirs.tensors, strict=True):
        assert (span.kind, span.shape) == (tensor.tensor_type, tuple(tensor.shape.tolist()[::-1]))
        assert data[span.start : span.start + span.num_bytes] == tensor.data.tobytes()


def test_bf16_is_close_to_fp32(tmp_path: Path) -> None:
    ours = model()
    write(tmp_path / "m.gguf", gguf_tensors(CONFIG, ours, "llama"), Kind.BF16)
    with torch.inference_mode():
        assert_close(logits(load(tmp_path / "m.gguf").model, tokens(20)), logits(ours, tokens(20)), "bf16_reorder")
