"""The compressed-tensors layout: by hand, through the round trip of every family, and what others may write in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemel.config.errors import CheckpointError, GemelError, UnsupportedError
from gemel.model.build import LoadedModel, load, peek, save
from gemel.model.compressed import pack
from gemel.model.leaves.lowbit import LowBit, LowBitLinear, quantize
from gemel.model.model import Model
from tests.model.reference import FAMILIES, WIDE, logits, save_reference, tokens
from tests.model.test_model import SMALL
from tests.tolerance import assert_close

Scheme = dict[str, Any]
ROWS: Scheme = {"num_bits": 8, "strategy": "channel"}


def low_bit(loaded: LoadedModel) -> dict[str, LowBitLinear]:
    return {name: leaf for name, leaf in loaded.model.named_modules() if isinstance(leaf, LowBitLinear)}


def same(a: LoadedModel, b: LoadedModel) -> bool:
    """Bitwise, low-bit leaves included."""
    ours, theirs = ({**dict(x.model.named_parameters()), **dict(x.model.named_buffers())} for x in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def numbers(q: torch.Tensor) -> torch.Tensor:
    return torch.stack((q & 15, q >> 4), -1).flatten(1).long()


def test_four_bits_by_hand() -> None:
    low = LowBit(torch.tensor([[0x10, 0x32, 0x54, 0x76, *[0] * 12]] * 2, dtype=torch.uint8), torch.ones(2, 1).half())
    out = dict(pack("m", low))
    assert out.keys() == {"m.weight_packed", "m.weight_scale", "m.weight_shape"}
    assert out["m.weight_packed"].dtype == torch.int32 and out["m.weight_packed"][0].tolist() == [0x76543210, 0, 0, 0]
    assert out["m.weight_shape"].tolist() == [2, 32]


def test_zero_points_by_hand() -> None:
    scale = torch.tensor([[0.5, 0.25]] * 9).half()
    zero = torch.tensor([[i, 15 - i] for i in range(9)])
    low = LowBit(torch.zeros(9, 32, dtype=torch.uint8), scale, (scale * -zero).half())
    packed = dict(pack("m", low))["m.weight_zero_point"]
    assert packed.shape == (2, 2) and packed.dtype == torch.int32
    assert [x & 0xFFFFFFFF for x in packed[0].tolist()] == [0x76543210, 0x89ABCDEF] and packed[1].tolist() == [8, 7]


def test_eight_bits_by_hand() -> None:
    rows = dict(pack("m", quantize(torch.eye(4, 32), 8)))
    assert rows["m.weight"].dtype == torch.int8 and rows["m.weight"][2, 2] == 127 and rows["m.weight_scale"].shape == (4, 1)
    q = torch.zeros(1, 32, dtype=torch.int8)
    q[0, :4] = torch.tensor([-127, -1, 0, 127])
    groups = dict(pack("m", LowBit(q, torch.ones(1, 1).half())))
    assert groups["m.weight_packed"][0, 0].item() & 0xFFFFFFFF == 0xFF_80_7F_01


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_round_trip(family: str, tied: bool, weights: Literal["int8", "int4"], tmp_path: Path) -> None:
    save_reference(tmp_path / "dense", family, tie_word_embeddings=tied, **WIDE.get(family, {}))
    loaded = load(tmp_path / "dense", weights=weights)
    save(loaded, tmp_path / "low")
    back = load(tmp_path / "low")
    assert len(low_bit(back)) == 3 * 4 + 1 and same(back, loaded) and back.config == loaded.config and not back.config.tied_head
    assert [leaf.sections for leaf in low_bit(back).values()] == [leaf.sections for leaf in low_bit(loaded).values()]
    assert peek(tmp_path / "low").low_bit and not peek(tmp_path / "dense").low_bit
    with torch.inference_mode():
        assert torch.equal(logits(back.model, tokens(9)), logits(loaded.model, tokens(9)))
    dense = load(tmp_path / "low", weights="dense")
    assert low_bit(dense) == {} and torch.equal(dense.model.head.weight, low_bit(back)["head"].plain())


def test_what_the_directory_says(tmp_path: Path) -> None:
    save_reference(tmp_path / "dense", "llama", tie_word_embeddings=True)
    save(load(tmp_path / "dense", weights="int4"), tmp_path / "low", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "low" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    says = config["quantization_config"]
    assert (says["quant_method"], says["quantization_status"], says["format"]) == ("compressed-tensors", "compressed", "mixed-precision")
    assert says["ignore"] == [] and says["config_groups"]["group_0"]["targets"] == ["lm_head"]
    blocks = says["config_groups"]["group_1"]
    assert blocks["targets"] == ["Linear"] and blocks["format"] == "pack-quantized" and blocks["input_activations"] is None
    assert blocks["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False
    }  # fmt: skip
    tensors = load_file(tmp_path / "low" / "model.safetensors")
    assert tensors["model.layers.0.self_attn.k_proj.weight_packed"].shape == (16, 32 * 4 // 32)
    assert tensors["lm_head.weight"].dtype == torch.int8 and tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert "model.layers.0.self_attn.k_proj.weight" not in tensors


def test_a_plain_leaf_is_ignored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model(SMALL)
    down = model.layers[0].mlp.down
    model.set_submodule("layers.1.mlp.down", LowBitLinear(quantize(down.weight, 8, 32)))
    loaded = LoadedModel(model, SMALL, tmp_path, (), None)
    save(loaded, tmp_path / "one")
    assert same(load(tmp_path / "one"), loaded)
    says = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert says["format"] == "pack-quantized" and len(says["ignore"]) == 2 * 7 + 1 - 1 and "lm_head" in says["ignore"]


def test_what_cannot_be_expressed_is_refused_with_a_way_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model(SMALL)
    four = quantize(model.layers[0].mlp.down.weight, 4, 32)
    model.set_submodule("layers.0.mlp.down", LowBitLinear(LowBit(four.q, four.scale.abs(), torch.randn(four.scale.shape).half())))
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.down_proj: its minima are not whole multiples.*weights = 'dense'"):
        save(LoadedModel(model, SMALL, tmp_path, (), None), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_reference(tmp_path / "gpt2", "gpt2")
    with pytest.raises(UnsupportedError, match=r"c_attn\.weight is stored as \[inputs, outputs\].*weights = 'dense'"):
        save(load(tmp_path / "gpt2", weights="int8"), tmp_path / "out")
    save(load(tmp_path / "gpt2", weights="dense"), tmp_path / "out")


def write(path: Path, weights: Scheme, *, ignore: list[str] | None = None, scales: torch.dtype = torch.bfloat16, **changes: Any) -> None:
    """A directory as llm-compressor leaves it: random numbers in every Linear that is not ignored."""
    torch.manual_seed(0)
    config = SMALL.model_copy(update={"width": 128, "ffn_width": 256, "num_heads": 4, "head_width": 32})
    save(LoadedModel(Model(config), config, path, (2,), 1), path)
    bits, symmetric = weights["num_bits"], weights.get("symmetric", True)
    packed = changes.get("format", "pack-quantized") == "pack-quantized"
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if tensors[name].dim() == 2 and "embed" not in name]:
        module = name.removesuffix(".weight")
        if module in (ignore or []):
            continue
        num_rows, width = tensors.pop(name).shape
        num_groups = width // weights.get("group_size", width)
        if packed:
            tensors[f"{module}.weight_packed"] = torch.randint(-(2**31), 2**31, (num_rows, width * bits // 32), dtype=torch.int32)
            tensors[f"{module}.weight_shape"] = torch.tensor([num_rows, width])
        else:
            tensors[name] = torch.randint(-128, 128, (num_rows, width), dtype=torch.int8)
        tensors[f"{module}.weight_scale"] = torch.rand(num_rows, num_groups).to(scales)
        if not symmetric:
            zeros = (-(-num_rows * bits // 32), num_groups)
            tensors[f"{module}.weight_zero_point"] = torch.randint(-(2**31), 2**31, zeros, dtype=torch.int32)
    save_file(tensors, path / "model.safetensors")
    group = {"targets": ["Linear"], "weights": {"type": "int", "dynamic": False, "observer": "minmax", "actorder": None} | weights}
    group |= {"input_activations": None, "output_activations": None} | changes.pop("group", {})
    says = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    says |= {"ignore": ignore or [], "config_groups": {"group_0": group}, "kv_cache_scheme": None, "version": "0.20.0"}
    says |= {"sparsity_config": {}, "transform_config": {}, "global_compression_ratio": None} | changes
    hf = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(hf | {"quantization_config": says}))


@pytest.mark.parametrize(
    ("weights", "want_group"),
    [
        ({"num_bits": 4, "strategy": "group", "group_size": 32}, 32),
        ({"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False}, 64),
        ({"num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": False, "actorder": "static"}, 128),
        ({"num_bits": 4, "strategy": "channel"}, 128),
        ({"num_bits": 8, "strategy": "group", "group_size": 128}, 32),
        ({"num_bits": 8, "strategy": "channel"}, 0),
    ],
)
def test_packed_by_others(weights: Scheme, want_group: int, tmp_path: Path) -> None:
    write(tmp_path / "m", weights, ignore=["lm_head"])
    tensors, loaded = load_file(tmp_path / "m" / "model.safetensors"), load(tmp_path / "m")
    assert len(low_bit(loaded)) == 2 * 4 and all(leaf.group == want_group for leaf in low_bit(loaded).values())
    for name, first, last in (("self_attn.v_proj", -64, None), ("self_attn.q_proj", 0, 128)):
        module, bits = f"model.layers.1.{name}.weight", weights["num_bits"]
        stored = tensors[f"{module}_packed"].view(torch.uint8)
        number = numbers(stored) if bits == 4 else stored.long()
        scale = tensors[f"{module}_scale"].double()
        middle = torch.full(scale.shape, 2 ** (bits - 1))
        if not weights.get("symmetric", True):
            columns = tensors[f"{module}_zero_point"].t().contiguous().view(torch.uint8)
            middle = numbers(columns)[:, : len(scale)].t()
        offset = number.view(*scale.shape, -1) - middle[..., None]
        want = (offset.clamp(min=-127) * scale[..., None]).flatten(1)
        assert_close(low_bit(loaded)["layers.1.attn.qkv"].plain()[first:last], want, "fp16_scales")
    save(loaded, tmp_path / "again")
    assert same(load(tmp_path / "again"), loaded)


def test_eight_bits_per_row_by_others(tmp_path: Path) -> None:
    tokens_ = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token", "observer": None}
    write(tmp_path / "m", ROWS, format="int-quantized", group={"input_activations": tokens_}, scales=torch.float32)
    tensors, loaded = load_file(tmp_path / "m" / "model.safetensors"), load(tmp_path / "m")
    assert len(low_bit(loaded)) == 2 * 4 + 1
    want = tensors["lm_head.weight"].clamp(min=-127).double() * tensors["lm_head.weight_scale"]
    assert (tensors["lm_head.weight"] == -128).any()
    assert_close(low_bit(loaded)["head"].plain(), want, "fp32_reorder")


@pytest.mark.parametrize("ignore", ["lm_head", "re:lm.*"])
def test_names_before_patterns_before_classes(ignore: str, tmp_path: Path) -> None:
    write(tmp_path / "m", {"num_bits": 4, "strategy": "group", "group_size": 32}, ignore=["lm_head"])
    hf = json.loads((tmp_path / "m" / "config.json").read_text())
    groups = hf["quantization_config"]["config_groups"]
    wrong = groups["group_0"] | {"weights": groups["group_0"]["weights"] | {"symmetric": False}}
    right = groups["group_0"] | {"targets": ["re:.*layers.*proj"]}
    hf["quantization_config"] |= {"ignore": [ignore], "config_groups": {"group_0": wrong, "group_1": right}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(hf))
    assert len(low_bit(load(tmp_path / "m"))) == 8


FOUR: Scheme = {"num_bits": 4, "strategy": "group", "group_size": 32}


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        (FOUR | {"actorder": "group"}, {}, "actorder = 'group' is not supported"),
        (FOUR | {"num_bits": 3}, {}, "num_bits = 3 with symmetric = True as pack-quantized is not read"),
        (FOUR | {"type": "float"}, {}, "type = 'float' is not supported; 'int' is"),
        (FOUR | {"dynamic": True}, {}, "dynamic = True"),
        (FOUR | {"group_size": 16}, {}, "groups of 16 in rows of 128 are not read; multiples of 32"),
        (FOUR | {"strategy": "block"}, {}, "strategy = 'block'"),
        (FOUR | {"surprise": 1}, {}, "surprise = 1"),
        (ROWS | {"symmetric": False}, {}, "num_bits = 8 with symmetric = False"),
        (FOUR, {"format": "nvfp4-pack-quantized"}, "format = 'nvfp4-pack-quantized' is not read; pack-quantized and int-quantized are"),
        (FOUR, {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (FOUR, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (FOUR, {"transform_config": {"config_groups": {"a": 1}}}, "transform_config"),
        (FOUR, {"quantization_status": "frozen"}, "quantization_status = 'frozen'"),
        (FOUR, {"group": {"output_activations": {"num_bits": 8}}}, "output_activations"),
        (FOUR, {"group": {"input_activations": {"num_bits": 8, "type": "float", "dynamic": True}}}, "type = 'float'"),
        (FOUR, {"group": {"input_activations": {"num_bits": 8, "type": "int", "dynamic": False}}}, "dynamic = False"),
        (FOUR, {"group": {"targets": ["re:.*mlp.*"]}}, "no target of quantization_config says how"),
        (FOUR, {"group": {"targets": ["re:(("]}}, "is not a regular expression"),
        (FOUR, {"quant_method": "gptq"}, "quantization_config.*compressed-tensors and GGUF are read"),
    ],
)
def test_refused_by_name(weights: Scheme, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "m", weights, **changes)
    with pytest.raises(GemelError, match=message):
        load(tmp_path / "m")


DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{DOWN}.weight_g_idx": torch.zeros(256)}), "weight_g_idx.*actorder"),
        (lambda t: t.pop(f"{DOWN}.weight_packed"), r"lacks model\.layers\.0\.mlp\.down_proj\.weight_packed"),
        (lambda t: t.update({f"{DOWN}.weight_scale": torch.ones(128, 7)}), r"weight_scale is torch\.float32 \[128, 7\], not .*\[128, 8\]"),
        (lambda t: t.update({f"{DOWN}.weight_shape": torch.tensor([128, 255])}), r"weight_shape is \[128, 255\], not \[128, 256\]"),
        (lambda t: t[f"{DOWN}.weight_scale"].fill_(torch.nan), "down_proj.weight holds NaN or infinity"),
        (
            lambda t: t.update({f"{DOWN}.weight_scale": torch.full((128, 8), 1e6)}),
            "down_proj.weight holds NaN or infinity as its fp16 scales",
        ),
        (lambda t: t.update({f"{DOWN}.weight_zero_point": torch.zeros(16, 8, dtype=torch.int32)}), "does not explain.*weight_zero_point"),
    ],
)
def test_tensors_that_do_not_fit(change: Callable[[dict[str, torch.Tensor]], Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "m", FOUR)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(GemelError, match=message):
        load(tmp_path / "m")


def test_a_tied_directory_with_another_head_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m", FOUR)
    hf = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(hf | {"tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding; set it to false"):
        load(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(hf | {"tie_word_embeddings": False}))
    assert "head" in low_bit(load(tmp_path / "m"))
