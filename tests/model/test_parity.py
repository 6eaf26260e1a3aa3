"""Every family and every variant against `transformers`: logits, gradients, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gemel.model.build import load, save
from gemel.model.families import family as family_of
from gemel.model.leaves.prepacked import prepack
from tests.model.reference import FAMILIES, logits, reference_logits, same_weights, save_reference, tokens
from tests.tolerance import assert_close

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FAMILIES),
    *((name, {"tie_word_embeddings": True}) for name in ("llama", "qwen2")),
    *((name, {"tie_word_embeddings": False}) for name in ("gpt2", "bloom")),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 20}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": False}),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    ("qwen3", {"attention_bias": True, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("gpt2", {"n_inner": None}),
    ("bloom", {"n_head": 4}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 20}),
    ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}),
    ("llama", {"rope_parameters": YARN | {"rope_theta": 1e4}}),
    ("llama", {"rope_parameters": YARN | {"rope_theta": 1e4, "attention_factor": 1.3}}),
    ("llama", {"rope_parameters": YARN | {"rope_theta": 1e4, "mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 20, "truncate": False}}),
    ("qwen3", {"rope_parameters": YARN | {"rope_theta": 1e6}}),
]
NAMES = [f"{name}-{'-'.join(map(str, changes)) or 'plain'}-{i}" for i, (name, changes) in enumerate(VARIANTS)]


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=NAMES)
def test_logits_and_round_trip(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    theirs = save_reference(tmp_path / "theirs", family, **changes)
    loaded = load(tmp_path / "theirs")
    text = tokens(40)
    want = reference_logits(theirs, text)
    with torch.inference_mode():
        assert_close(logits(loaded.model, text), want, "fp32_reference")

    save(loaded, tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back) is type(theirs) and back.dtype == torch.float32
    assert torch.equal(reference_logits(back, text), want)
    again = load(tmp_path / "ours")
    assert again.config == loaded.config and same_weights(again, loaded)
    assert (again.eos_token_ids, again.bos_token_id) == (loaded.eos_token_ids, loaded.bos_token_id)


@pytest.mark.parametrize("length", [12, 40])
def test_dynamic_ntk_is_exact_for_the_length_it_was_built_for(length: int, tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    theirs = save_reference(tmp_path, "llama", rope_parameters=rope, max_position_embeddings=16)
    loaded = load(tmp_path, max_context=length)
    assert loaded.config.max_positions == length
    text = tokens(length)
    with torch.inference_mode():
        assert_close(logits(loaded.model, text), reference_logits(theirs, text), "fp32_reference")


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_bitwise_alone(family: str, tmp_path: Path) -> None:
    save_reference(tmp_path, family)
    model = load(tmp_path).model
    assert prepack(model) == 3 * 4 + 1
    lengths = (1, 13, 40, 2, 1, 27)
    text = tokens(sum(lengths))
    with torch.inference_mode():
        packed = logits(model, text, *lengths).split(lengths)
        for document, got in zip(text.split(lengths), packed, strict=True):
            assert torch.equal(got, logits(model, document))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_through_packed_documents(family: str, tmp_path: Path) -> None:
    theirs = save_reference(tmp_path, family)
    loaded = load(tmp_path)
    lengths = (11, 1, 20)
    text, weights = tokens(sum(lengths)), torch.randn(sum(lengths), 97, generator=torch.Generator().manual_seed(1))
    (logits(loaded.model, text, *lengths).log_softmax(-1) * weights).sum().backward()
    for document, weight in zip(text.split(lengths), weights.split(lengths), strict=True):
        (theirs(document[None]).logits[0].log_softmax(-1) * weight).sum().backward()
    want = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    ours = dict(loaded.model.named_parameters())
    for weight in family_of(family).weights(loaded.config):
        grad = ours.pop(weight.name).grad
        assert grad is not None
        assert_close(grad, weight.form.join([want[part] for part in weight.parts]), "fp32_reference")
    assert not ours
