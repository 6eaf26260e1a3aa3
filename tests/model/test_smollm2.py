"""The real thing: SmolLM2-135M from its GGUF file, saved, and read back by `transformers`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from gemel.model.build import load, save
from gemel.model.leaves.linear import Linear
from gemel.model.leaves.lowbit import LowBitLinear
from gemel.model.leaves.prepacked import prepack
from tests.model.reference import logits, reference_logits
from tests.tolerance import assert_close

pytestmark = pytest.mark.model


def model_path() -> Path:
    """The file that GEMEL_TEST_MODEL names, or the one that `gemel pull` leaves in the user's cache."""
    named = os.environ.get("GEMEL_TEST_MODEL")
    path = Path(named) if named else Path("~/.cache/gemel/models/smollm2-135m-instruct.gguf").expanduser()
    if not path.exists():
        pytest.skip(f"no model at {path}: run `gemel pull` or set GEMEL_TEST_MODEL")
    return path


def test_logits_of_the_real_model(tmp_path: Path) -> None:
    import transformers

    original = load(model_path(), weights="dense")
    assert original.config.family == "llama" and original.config.num_layers == 30 and original.eos_token_ids
    save(original, tmp_path / "hf", dtype=torch.bfloat16)
    loaded = load(tmp_path / "hf")
    assert loaded.config == original.config and loaded.eos_token_ids == original.eos_token_ids
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    text = torch.randint(0, original.config.vocab_size, (24,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want = reference_logits(theirs, text)
        assert_close(logits(loaded.model, text), want, "fp32_reference")
        torch.set_num_threads(2)
        prepack(loaded.model)
        packed = logits(loaded.model, text, 16, 1, 7)
        assert_close(packed[:16], want[:16], "fp32_reference")
        for (a, b), got in zip(((0, 16), (16, 17), (17, 24)), packed.split((16, 1, 7)), strict=True):
            assert torch.equal(got, logits(loaded.model, text[a:b]))


def test_the_real_file_stays_packed_without_loss() -> None:
    dense, packed = load(model_path(), weights="dense"), load(model_path())
    assert dense.config.tied_head and not packed.config.tied_head
    kinds = set()
    for name, leaf in packed.model.named_modules():
        if isinstance(leaf, LowBitLinear):
            kinds.add((name.rpartition(".")[2], leaf.bits, leaf.group, leaf.minimum is not None))
            plain = dense.model.get_submodule(name)
            assert isinstance(plain, Linear) and torch.equal(leaf.plain(), plain.weight)
    assert kinds == {("head", 8, 32, False), *((name, 4, 32, True) for name in ("qkv", "out", "gate_up", "down"))}
    assert torch.equal(packed.model.embed.weight, dense.model.embed.weight)
