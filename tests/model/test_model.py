import re
from pathlib import Path

import pytest
import torch

import gemel.model
from gemel.config.model import GELU, Alibi, Learned, ModelConfig
from gemel.config.model import LayerNorm as LayerNormConfig
from gemel.model.attend import PackedAttend
from gemel.model.attention import Attention
from gemel.model.model import Model
from tests.model.reference import logits, tokens
from tests.tolerance import RELATIVE, assert_close

SMALL = ModelConfig(
    family="llama",
    num_layers=2,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    ffn_width=64,
    vocab_size=97,
    max_positions=64,
)


@pytest.mark.parametrize("name", ["model.py", "block.py", "attention.py", "ffn.py"])
def test_the_model_knows_no_technique(name: str) -> None:
    text = (Path(gemel.model.__file__).parent / name).read_text()
    assert not re.findall(r"(?i)lora|quant|int8|rank|dist|training|cache", text)


def test_tokens_see_only_their_past() -> None:
    torch.manual_seed(0)
    model, text = Model(SMALL), tokens(20)
    changed = text.clone()
    changed[12] = (changed[12] + 1) % 97
    before, after = logits(model, text), logits(model, changed)
    assert_close(after[:12], before[:12], "fp32_reorder")
    assert (after[12:] - before[12:]).abs().amax(-1).min() > 0


def test_positions_are_relative_with_rope_and_alibi_and_not_when_learned() -> None:
    for positions, moves in ((SMALL.positions, False), (Alibi(), False), (Learned(), True)):
        torch.manual_seed(0)
        model = Model(SMALL.model_copy(update={"positions": positions}))
        text, attend = tokens(10), PackedAttend(model.config, (0, 10))
        here, there = (model(text, torch.arange(first, first + 10), attend) for first in (0, 30))
        if moves:
            assert (here - there).abs().max() > RELATIVE["fp32_reference"] * here.abs().max()
        else:
            assert_close(there, here, "fp32_reference")


def test_a_position_beyond_the_table_is_an_error() -> None:
    with pytest.raises(IndexError):
        Model(SMALL)(tokens(2), torch.tensor([63, 64]), PackedAttend(SMALL, (0, 2)))


def test_a_tied_head_is_the_embedding() -> None:
    tied = Model(SMALL.model_copy(update={"tied_head": True}))
    assert tied.head.weight is tied.embed.weight
    assert Model(SMALL).head.weight.data_ptr() != Model(SMALL).embed.weight.data_ptr()


def test_the_residual_stream_has_the_parameters_dtype() -> None:
    model = Model(SMALL).to(torch.bfloat16)
    hidden = model(tokens(5), torch.arange(5), PackedAttend(SMALL, (0, 5)))
    assert hidden.dtype == torch.bfloat16 and model.head(hidden).dtype == torch.bfloat16


def test_every_kind_of_model_runs() -> None:
    config = SMALL.model_copy(
        update={"norm": LayerNormConfig(), "ffn": GELU(), "positions": Learned(), "embed_norm": True, "num_kv_heads": 4}
    )
    assert logits(Model(config), tokens(5)).shape == (5, 97)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_parts_of_the_heads_sum_to_the_whole(qk_norm: bool) -> None:
    config = SMALL.model_copy(update={"qk_norm": qk_norm, "qkv_bias": True, "out_bias": True})
    torch.manual_seed(0)
    whole, x = Attention(config, 0), torch.randn(9, 32)
    rotation = Model(config).rotary
    assert rotation is not None
    angles, attend = rotation(torch.arange(9), torch.float32), PackedAttend(config, (0, 4, 9))
    want = whole(x, angles, attend)
    total = torch.zeros_like(want)
    for part in range(2):
        piece = Attention(config, 0)
        piece.load_state_dict(whole.state_dict())
        piece.qkv.shard("column", part, 2)
        piece.out.shard("row", part, 2)
        total += piece(x, angles, attend)
    assert_close(total, want, "fp32_reorder")
