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
from gemel.model.build import LoadedModel, Peek, load, peek, save
from gemel.model.families import llama
from gemel.model.gguf_file import RotatesNeighbours, open_gguf
from gemel.model.gguf_header import read_header
from gemel.model.leaves.lowbit import LowBit, LowBitLinear, quantize
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
    others: dict[str, Kind] | None = None,
) -> None:
    """Matrices in `kind`, those of `others` in theirs; an array of bytes is taken as packed."""
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
        use = Kind.F32 if array.ndim == 1 else (others or {}).get(name, kind)
        if array.dtype == np.uint8:
            writer.add_tensor(name, array, raw_dtype=use)
        elif use == Kind.F16:
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
    write(tmp_path / "m.gguf", tensors | {"token_embd.weight": packed}, others={"token_embd.weight": kind}, config=config)
    got = _dense(open_gguf(tmp_path / "m.gguf").stored["token_embd.weight"].read())
    want = torch.from_numpy(gguf.quants.dequantize(packed, kind))
    if kind == Kind.Q4_K:  # products of scales of two levels are rounded to fp16
        assert_close(got, want, "fp16_scales")
    else:
        assert torch.equal(got, want)
    assert got.shape == (97, 256) and got.std() > 0


def _low_bit(loaded: LoadedModel) -> dict[str, LowBitLinear]:
    return {name: leaf for name, leaf in loaded.model.named_modules() if isinstance(leaf, LowBitLinear)}


@pytest.mark.parametrize(
    ("kind", "form"), [(Kind.Q8_0, (8, 32, False)), (Kind.Q4_0, (4, 32, False)), (Kind.Q4_1, (4, 32, True))], ids=lambda x: str(x)
)
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_matrices_stay_packed(kind: Kind, form: tuple[int, int, bool], arch: str, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"family": arch, "tied_head": True, "qkv_bias": arch == "qwen2"})
    write(tmp_path / "m.gguf", gguf_tensors(config, model(config), arch), kind, arch=arch, config=config)
    dense, packed = load(tmp_path / "m.gguf", weights="dense"), load(tmp_path / "m.gguf", activations="full")
    leaves = _low_bit(packed)
    assert len(leaves) == 2 * 4 + 1 and not packed.config.tied_head and dense.config.tied_head
    for name, leaf in leaves.items():
        assert (leaf.bits, leaf.group, leaf.minimum is not None) == form
        assert torch.equal(leaf.plain(), dense.model.get_parameter(f"{name}.weight")) and leaf.activations == "full"
    assert torch.equal(packed.model.embed.weight, dense.model.embed.weight)
    with torch.inference_mode():
        assert_close(logits(packed.model, tokens(20)), logits(dense.model, tokens(20)), "fp32_reorder")


def test_q4_k_stays_packed(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"width": 256, "num_heads": 4, "head_width": 64, "ffn_width": 256})
    tensors, random = gguf_tensors(config, model(config), "llama"), np.random.default_rng(0)
    for name in [name for name in tensors if tensors[name].ndim == 2]:
        blocks = random.integers(0, 256, (len(tensors[name]), 144), dtype=np.uint8)
        blocks[:, :2], blocks[:, 2:4] = (np.frombuffer(np.float16(x).tobytes(), np.uint8) for x in (0.001, 0.002))
        tensors[name] = blocks
    write(tmp_path / "m.gguf", tensors, Kind.Q4_K, config=config)
    leaves = _low_bit(load(tmp_path / "m.gguf"))
    assert len(leaves) == 2 * 4 + 1 and all((leaf.bits, leaf.group) == (4, 32) for leaf in leaves.values())
    down = torch.from_numpy(gguf.quants.dequantize(tensors["blk.1.ffn_down.weight"], Kind.Q4_K))
    assert_close(leaves["layers.1.mlp.down"].plain(), down, "fp16_scales")
    values = torch.from_numpy(gguf.quants.dequantize(tensors["blk.0.attn_v.weight"], Kind.Q4_K))
    assert_close(leaves["layers.0.attn.qkv"].plain()[-128:], values, "fp16_scales")


def test_a_fused_matrix_of_several_types_is_dequantized(tmp_path: Path) -> None:
    tensors = gguf_tensors(CONFIG, model(), "llama")
    others = {"blk.0.attn_v.weight": Kind.Q8_0, "blk.1.ffn_up.weight": Kind.Q5_0, "output.weight": Kind.F16}
    write(tmp_path / "m.gguf", tensors, Kind.Q4_0, others=others)
    dense, mixed = load(tmp_path / "m.gguf", weights="dense"), load(tmp_path / "m.gguf")
    plain = {"layers.0.attn.qkv", "layers.1.mlp.gate_up", "head"}
    assert _low_bit(dense) == {}
    assert (
        _low_bit(mixed).keys()
        == {f"layers.{i}.{leaf}" for i in range(2) for leaf in ("attn.qkv", "attn.out", "mlp.gate_up", "mlp.down")} - plain
    )
    for name in plain:
        assert torch.equal(mixed.model.get_parameter(f"{name}.weight"), dense.model.get_parameter(f"{name}.weight"))


def test_a_number_that_low_bit_leaves_out_is_dequantized(tmp_path: Path) -> None:
    tensors = gguf_tensors(CONFIG, model(), "llama")
    packed = gguf.quants.quantize(tensors["blk.0.ffn_down.weight"], Kind.Q8_0)
    packed[5, 2 + 7] = 0x80
    write(tmp_path / "m.gguf", tensors | {"blk.0.ffn_down.weight": packed}, Kind.Q8_0)
    loaded = load(tmp_path / "m.gguf")
    assert "layers.0.mlp.down" not in _low_bit(loaded) and "layers.1.mlp.down" in _low_bit(loaded)
    assert torch.equal(loaded.model.layers[0].mlp.down.weight, torch.from_numpy(gguf.quants.dequantize(packed, Kind.Q8_0)))


def test_packed_matrices_can_be_rounded_anew_and_own_their_memory(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", gguf_tensors(CONFIG, model(), "llama"), Kind.Q8_0)
    dense, packed = load(tmp_path / "m.gguf", weights="dense"), load(tmp_path / "m.gguf")
    four = _low_bit(load(tmp_path / "m.gguf", weights="int4"))
    assert torch.equal(four["layers.0.attn.out"].q, quantize(dense.model.layers[0].attn.out.weight, 4, 32).q) and four["head"].bits == 8
    before = logits(packed.model, tokens(5))
    (tmp_path / "m.gguf").write_bytes(b"\0" * (tmp_path / "m.gguf").stat().st_size)
    assert torch.equal(logits(packed.model, tokens(5)), before)


def test_scales_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    tensors = gguf_tensors(CONFIG, model(), "llama")
    packed = gguf.quants.quantize(tensors["blk.1.attn_k.weight"], Kind.Q4_0)
    packed[3, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
    write(tmp_path / "m.gguf", tensors | {"blk.1.attn_k.weight": packed}, Kind.Q4_0)
    for weights in ("auto", "dense", "int8"):
        with pytest.raises(CheckpointError, match=r"blk\.1\.attn_k\.weight.*holds NaN or infinity"):
            load(tmp_path / "m.gguf", weights=weights)


@pytest.mark.parametrize(
    ("kind", "stored", "low_bit"), [(Kind.F32, torch.float32, False), (Kind.BF16, torch.bfloat16, False), (Kind.Q4_0, torch.float16, True)]
)
def test_peek(kind: Kind, stored: torch.dtype, low_bit: bool, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", gguf_tensors(CONFIG, model(), "llama"), kind)
    assert peek(tmp_path / "m.gguf") == Peek(CONFIG, stored, low_bit)
    assert load(tmp_path / "m.gguf").stored == stored


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
