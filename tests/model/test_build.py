"""Loading refuses by name whatever it cannot honour; saving is whole or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemel.config.errors import CheckpointError, ConfigError, UnsupportedError
from gemel.config.model import DynamicNTK, Rope
from gemel.model import checkpoint
from gemel.model.build import LoadedModel, Peek, load, peek, save
from gemel.model.leaves.linear import Leaf, Linear
from gemel.model.leaves.lowbit import LowBitLinear, quantize
from gemel.model.model import Model
from tests.model.reference import FAMILIES, VOCAB, WIDE, logits, same_weights, save_reference, tokens
from tests.model.test_model import SMALL
from tests.tolerance import assert_close


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    torch.manual_seed(0)
    save(LoadedModel(Model(SMALL), SMALL, path, (2, 5), 1), path)
    return path


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps(config))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_round_trip(saved: Path) -> None:
    loaded = load(saved)
    assert loaded.config == SMALL and loaded.path == saved
    assert (loaded.eos_token_ids, loaded.bos_token_id) == ((2, 5), 1)
    torch.manual_seed(0)
    assert torch.equal(logits(loaded.model, tokens(9)), logits(Model(SMALL), tokens(9)))
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_the_users(dtype: torch.dtype, saved: Path, tmp_path: Path) -> None:
    narrow = load(saved, dtype=dtype)
    assert {parameter.dtype for parameter in narrow.model.parameters()} == {dtype}
    wide = load(saved)
    for name, parameter in narrow.model.named_parameters():
        assert torch.equal(parameter, wide.model.get_parameter(name).to(dtype))
    save(wide, tmp_path / "narrow", dtype=dtype)
    assert same_weights(load(tmp_path / "narrow", dtype=dtype), narrow)
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    with torch.inference_mode():
        assert_close(logits(narrow.model, tokens(9)).float(), logits(wide.model, tokens(9)), "bf16_reorder")


def test_parameters_own_their_memory(copied: Path) -> None:
    loaded = load(copied)
    before = logits(loaded.model, tokens(5))
    (copied / "model.safetensors").write_bytes(b"\0" * (copied / "model.safetensors").stat().st_size)
    assert torch.equal(logits(loaded.model, tokens(5)), before)


def test_shards(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 10_000)
    loaded = load(saved)
    save(loaded, tmp_path / "sharded")
    files = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in loaded.model.parameters())
    assert all(sum(tensor.nbytes for tensor in load_file(tmp_path / "sharded" / file).values()) <= 16_000 for file in files)
    assert same_weights(load(tmp_path / "sharded"), loaded)


def test_saving_never_overwrites_and_leaves_nothing_half_done(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(saved)
    (tmp_path / "taken").mkdir()
    save(loaded, tmp_path / "taken")  # an empty directory is fine
    with pytest.raises(CheckpointError, match="not an empty directory; save to another path"):
        save(loaded, tmp_path / "taken")

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint.TensorFile, "put", full)
    with pytest.raises(OSError, match="no space left"):
        save(loaded, tmp_path / "fails")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_a_model_its_family_cannot_express_is_not_saved(tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"qk_norm": True})
    with pytest.raises(UnsupportedError, match="family 'llama' cannot express"):
        save(LoadedModel(Model(config), config, tmp_path, (), None), tmp_path / "out")


def test_checkpoints_without_the_base_prefix(copied: Path) -> None:
    whole = load(copied)
    edit_tensors(copied, lambda tensors: [tensors.update({name.removeprefix("model."): tensors.pop(name)}) for name in list(tensors)])
    assert same_weights(load(copied), whole)


def test_max_context(saved: Path, copied: Path) -> None:
    assert load(saved, max_context=64).config == SMALL
    with pytest.raises(ConfigError, match="max_context = 65 exceeds the model's 64 positions"):
        load(saved, max_context=65)
    edit(copied, rope_scaling={"type": "dynamic", "factor": 4.0})
    assert load(copied).config.positions == Rope(scaling=DynamicNTK(factor=4.0, original_positions=64, length=256))
    stretched = load(copied, max_context=100)
    assert stretched.config.positions == Rope(scaling=DynamicNTK(factor=4.0, original_positions=64, length=100))
    assert stretched.config.max_positions == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks model\.norm\.weight"),
        (lambda t: t.update({"model.extra": torch.ones(2)}), r"does not explain: model\.extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), r"model\.norm\.weight is \[31\], not \[32\]"),
        (lambda t: t["model.layers.1.mlp.up_proj.weight"].view(-1)[5].fill_(torch.nan), r"layers\.1\.mlp\.up_proj\.weight holds NaN"),
        (lambda t: t["lm_head.weight"].view(-1)[5].fill_(-torch.inf), r"lm_head\.weight holds NaN or infinity"),
        (lambda t: [t.pop(name) for name in list(t) if "layers.1" in name], r"and 4 more"),
    ],
)
def test_tensors_that_do_not_fit(copied: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str) -> None:
    edit_tensors(copied, change)
    with pytest.raises(CheckpointError, match=message):
        load(copied)


def test_a_value_too_large_for_the_dtype_is_named(copied: Path) -> None:
    edit_tensors(copied, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    load(copied)
    with pytest.raises(CheckpointError, match="infinity as float16"):
        load(copied, dtype=torch.float16)


def test_integer_tensors_are_refused(copied: Path) -> None:
    edit_tensors(copied, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(UnsupportedError, match=r"model\.norm\.weight is stored as torch\.int8"):
        load(copied)


def test_a_tied_head_may_be_stored_again_but_not_differ(copied: Path) -> None:
    edit(copied, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding; set it to false"):
        load(copied)
    edit_tensors(copied, lambda tensors: tensors["lm_head.weight"].copy_(tensors["model.embed_tokens.weight"]))
    loaded = load(copied)
    assert loaded.model.head.weight is loaded.model.embed.weight


@pytest.mark.parametrize("keep", [-7, 100, 4, 0])
def test_a_truncated_file_is_named(copied: Path, keep: int) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        load(copied)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b"])
def test_an_index_cannot_leave_its_directory(copied: Path, name: str) -> None:
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(CheckpointError, match="not in its own directory"):
        load(copied)


def test_an_index_that_names_a_missing_file(copied: Path) -> None:
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"gone\.safetensors is missing; the index names it"):
        load(copied)


def test_pickles_are_never_opened(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load(copied)
    (copied / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UnsupportedError, match=r"pickled weights \(pytorch_model\.bin\).*save_pretrained"):
        load(copied)


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist; give a Hugging Face directory or a \.gguf file"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(UnsupportedError, match=r"neither a Hugging Face directory nor a \.gguf file"):
        load(tmp_path / "weights.pt")


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": NaN', "\xff", '"text"'])
def test_a_broken_config(copied: Path, text: str) -> None:
    (copied / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(copied)


def test_dtypes_are_floating(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"torch\.int8 is not supported; float32, bfloat16, float16 are"):
        load(saved, dtype=torch.int8)


@pytest.mark.parametrize(
    ("config", "generation", "want"),
    [
        ({"eos_token_id": 3}, None, (3,)),
        ({"eos_token_id": [3, 4]}, None, (3, 4)),
        ({"eos_token_id": 3}, {"eos_token_id": [7, 8]}, (7, 8)),
        ({"eos_token_id": 3}, {"temperature": 1.0}, (3,)),
        ({"eos_token_id": None}, None, ()),
    ],
)
def test_end_tokens(copied: Path, config: dict[str, Any], generation: dict[str, Any] | None, want: tuple[int, ...]) -> None:
    edit(copied, **config)
    (copied / "generation_config.json").unlink()
    if generation is not None:
        (copied / "generation_config.json").write_text(json.dumps(generation))
    assert load(copied).eos_token_ids == want


def test_end_tokens_that_are_no_ids(copied: Path) -> None:
    (copied / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(CheckpointError, match="eos_token_id = '</s>' is not a token id"):
        load(copied)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_rounded_on_loading(family: str, tied: bool, tmp_path: Path) -> None:
    save_reference(tmp_path, family, tie_word_embeddings=tied, **WIDE.get(family, {}))
    plain = load(tmp_path)
    for weights, group in (("int8", 32), ("int4", 32)):
        low = load(tmp_path, dtype=torch.bfloat16, weights=weights, group=group, activations="full")  # type: ignore[arg-type]
        leaves = {name: leaf for name, leaf in low.model.named_modules() if isinstance(leaf, Leaf)}
        assert len(leaves) == 3 * 4 + 1 and not low.config.tied_head and low.model.config == low.config
        for name, leaf in leaves.items():
            dense = plain.model.get_submodule(name)
            want = quantize(dense.weight, 4, group) if weights == "int4" and name != "head" else quantize(dense.weight, 8)  # type: ignore[arg-type]
            assert isinstance(leaf, LowBitLinear) and isinstance(dense, Linear) and leaf.sections == dense.sections
            assert torch.equal(leaf.q, want.q) and torch.equal(leaf.scale, want.scale) and leaf.activations == "full"
            assert (leaf.bias is None) == (dense.bias is None)
            assert leaf.bias is None or torch.equal(leaf.bias, dense.bias.bfloat16())
        assert {parameter.dtype for parameter in low.model.parameters()} == {torch.bfloat16}
        assert torch.equal(low.model.embed.weight, plain.model.embed.weight.bfloat16())
        with torch.inference_mode():
            assert logits(low.model, tokens(9)).shape == (9, VOCAB)


def test_a_group_that_does_not_divide_is_refused_with_the_matrix(saved: Path) -> None:
    match = r"q_proj\.weight and .*: rows of 32 elements do not divide into groups of 64; groups that do: 32"
    with pytest.raises(ConfigError, match=match):
        load(saved, weights="int4", group=64)
    load(saved, weights="int4", group=32)
    with pytest.raises(ConfigError, match="weights = 'int2' is not known; auto, dense, int8, int4 are"):
        load(saved, weights="int2")  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_what_cannot_be_rounded_is_named(weights: Literal["int8", "int4"], copied: Path) -> None:
    edit_tensors(copied, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[5].fill_(torch.nan))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        load(copied, weights=weights)


def test_rounding_leaves_the_file_alone(saved: Path) -> None:
    before = (saved / "model.safetensors").read_bytes()
    low = load(saved, weights="int8")
    assert (saved / "model.safetensors").read_bytes() == before and torch.equal(low.model.embed.weight, load(saved).model.embed.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peek_knows_what_is_stored(dtype: torch.dtype, saved: Path, tmp_path: Path) -> None:
    save(load(saved), tmp_path / "m", dtype=dtype)
    assert peek(tmp_path / "m") == Peek(SMALL, dtype, False)
    assert load(tmp_path / "m").stored == dtype
