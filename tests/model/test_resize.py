"""A resized model computes the same for old tokens, and its new rows are means of pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gemel.config.errors import ConfigError, UnsupportedError
from gemel.model import build
from gemel.model.resize import resize
from tests import tiny
from tests.model.reference import FAMILIES, logits, save_reference, tokens
from tests.tolerance import assert_close

PIECES = {97: (1, 2, 3), 98: (5,), 99: (5, 5, 7, 8)}


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_old_tokens_keep_their_logits(kind: str) -> None:
    loaded, text = tiny.build(kind), tokens(12)
    before, rows, head = logits(loaded.model, text), loaded.model.embed.weight.clone(), loaded.model.head.weight.clone()
    resized = resize(loaded, 100, PIECES)
    assert resized.config.vocab_size == 100
    assert_close(logits(resized.model, text)[:, :97], before, "fp32_reorder")
    assert torch.equal(resized.model.embed.weight[:97], rows)
    assert torch.equal(resized.model.head.weight[:97], head)
    assert (resized.model.head.weight is resized.model.embed.weight) == resized.config.tied_head


def test_new_rows_are_means_of_pieces_and_padding_is_the_mean_of_all() -> None:
    loaded = tiny.build("gqa")
    rows, head = loaded.model.embed.weight.clone(), loaded.model.head.weight.clone()
    model = resize(loaded, 100, PIECES, pad_to_multiple=64).model
    assert model.embed.weight.shape == model.head.weight.shape == (128, 32)
    for new, old in ((model.embed.weight, rows), (model.head.weight, head)):
        assert_close(new[97], (old[1] + old[2] + old[3]) / 3, "fp32_reorder")
        assert torch.equal(new[98], old[5])
        assert_close(new[99], (2 * old[5] + old[7] + old[8]) / 4, "fp32_reorder")
        assert_close(new[100:], old.mean(0).expand(28, 32), "fp32_reorder")


def test_a_new_token_says_what_the_mean_of_its_pieces_says() -> None:
    model, text = resize(tiny.build("gqa"), 100, PIECES).model, tokens(9)
    out = logits(model, text)
    assert_close(out[:, 97], out[:, 1:4].mean(1), "fp32_reorder")


def test_means_are_rounded_once() -> None:
    loaded = tiny.build("gqa")
    loaded.model.bfloat16()
    rows = loaded.model.embed.weight.clone()
    weight = resize(loaded, 100, PIECES).model.embed.weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight[97], rows[1:4].float().mean(0).bfloat16())


def test_padding_rows_that_are_there_get_used() -> None:
    loaded = resize(tiny.build("gqa"), 97, {}, pad_to_multiple=64)
    assert loaded.config.vocab_size == 128
    rows = loaded.model.embed.weight.clone()
    again = resize(loaded, 100, PIECES, pad_to_multiple=64)
    assert again.config.vocab_size == 128
    assert torch.equal(again.model.embed.weight[98], rows[5])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_one_is_what_transformers_resizes_to(family: str, tmp_path: Path) -> None:
    theirs = save_reference(tmp_path / "old", family)
    resized = resize(build.load(tmp_path / "old"), 100, PIECES, pad_to_multiple=8)
    build.save(resized, tmp_path / "new")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
    theirs.resize_token_embeddings(104, mean_resizing=False)
    with torch.no_grad():
        for matrix in {id(m): m for m in (theirs.get_input_embeddings().weight, theirs.get_output_embeddings().weight)}.values():
            old = matrix[:97].clone()
            matrix[97:] = old.mean(0)
            for index, parts in PIECES.items():
                matrix[index] = torch.stack([old[part] for part in parts]).mean(0)
    text = torch.tensor([[3, 97, 98, 5, 99, 11]])
    with torch.no_grad():
        assert_close(ours(text).logits, theirs(text).logits, "fp32_reorder")
    assert ours.config.vocab_size == theirs.config.vocab_size == 104


@pytest.mark.parametrize("pieces", [{97: ()}, {97: (97,)}, {97: (1, 120)}, {140: (1,)}, {96: (96,)}])
def test_ids_that_do_not_fit_are_refused(pieces: dict[int, tuple[int, ...]]) -> None:
    with pytest.raises(ConfigError, match="give old ids below 97"):
        resize(tiny.build("gqa"), 100, pieces)


def test_a_head_of_few_bits_is_refused(tmp_path: Path) -> None:
    build.save(tiny.build("gqa"), tmp_path / "plain")
    with pytest.raises(UnsupportedError, match="quantize again"):
        resize(build.load(tmp_path / "plain", weights="int8"), 100, PIECES)
