"""What few bits mean, by hand; rounding held to its bounds; the leaf against fp64."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from gemel.config.errors import ConfigError
from gemel.model.leaves.linear import Leaf, Linear
from gemel.model.leaves.lowbit import INT4_GROUPS, LowBit, LowBitLinear, quantize, round_activations
from tests.tolerance import assert_close

FORMATS: list[tuple[Literal[8, 4], int]] = [(8, 0), (8, 32), *((4, group) for group in INT4_GROUPS)]


def matrix(num_rows: int = 24, width: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed))


def with_minima(num_rows: int, width: int, group: int) -> LowBit:
    symmetric = quantize(matrix(num_rows, width), 4, group)
    return LowBit(symmetric.q, symmetric.scale, torch.randn(symmetric.scale.shape, generator=torch.Generator().manual_seed(1)).half())


def test_four_bits_by_hand() -> None:
    q = torch.full((1, 32), 0x88, dtype=torch.uint8)
    q[0, :2] = torch.tensor([0x1F, 0x80])  # elements 15, 1, 0, 8, then eights; the second group all eights
    symmetric = LowBit(q, torch.tensor([[0.5, -2.0]]).half())
    assert (symmetric.bits, symmetric.shape, symmetric.group) == (4, (1, 64), 32)
    assert symmetric.dense()[0, :5].tolist() == [3.5, -3.5, -4.0, 0.0, 0.0] and not symmetric.dense()[0, 4:].any()
    shifted = LowBit(q, torch.tensor([[0.5, -2.0]]).half(), torch.tensor([[-1.0, 10.0]]).half())
    assert shifted.dense()[0, :5].tolist() == [6.5, -0.5, -1.0, 3.0, 3.0] and (shifted.dense()[0, 32:] == -6.0).all()


def test_eight_bits_by_hand() -> None:
    q = torch.arange(-64, 64, dtype=torch.int8).view(2, 64)
    per_row = LowBit(q, torch.tensor([0.5, 2.0]))
    assert (per_row.bits, per_row.shape, per_row.group) == (8, (2, 64), 0)
    assert torch.equal(per_row.dense(), q.float() * torch.tensor([[0.5], [2.0]]))
    grouped = LowBit(q, torch.tensor([[1.0, 2.0], [3.0, 4.0]]).half())
    assert grouped.group == 32 and grouped.dense()[1, 31:33].tolist() == [31 * 3.0, 32 * 4.0]


def test_rounding_by_hand() -> None:
    row = torch.zeros(1, 32)
    row[0, :6] = torch.tensor([2.0, -2.0, 0.9, -0.3, 0.375, 0.125])
    four = quantize(row, 4, 32)
    assert four.scale.item() == 0.25  # of 2 and -2 none is larger: the positive scale holds -2 exactly and clips 2 to 7 * 0.25
    assert four.dense()[0, :6].tolist() == [1.75, -2.0, 1.0, -0.25, 0.5, 0.0]  # 1.5 and 0.5 round to even
    row[0, 1] = -1.9
    assert quantize(row, 4, 32).scale.item() == -0.25 and quantize(row, 4, 32).dense()[0, 0].item() == 2.0
    eight = quantize(row, 8)
    assert eight.scale.item() == torch.tensor(2.0).div(127).item() and eight.q[0, :4].tolist() == [127, -121, 57, -19]


@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_rounded_to_nearest(bits: Literal[8, 4], group: int, dtype: torch.dtype) -> None:
    w = matrix().to(dtype)
    low = quantize(w, bits, group)
    assert torch.equal(w, matrix().to(dtype))
    grouped, scale = w.double().view(24, -1, group or 256), low.scale.double().view(24, -1, 1)
    steps = grouped / scale
    nearest = steps.round().clamp(-127, 127) if bits == 8 else steps.round().clamp(-8, 7)
    error = (low.dense().view(steps.shape) - grouped) / scale
    assert (error.abs() <= (nearest - steps).abs() + 1e-4).all()
    assert nearest.unique().numel() == 16 or bits == 8


def test_the_signed_scale_beats_the_plain_one() -> None:
    w = matrix(64, 512)
    grouped = w.view(-1, 32)
    plain = (grouped.abs().amax(1, keepdim=True) / 7).half().float()
    error = ((grouped / plain).round() * plain - grouped).square().mean()
    assert (quantize(w, 4, 32).dense() - w).square().mean() < 0.85 * error


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [quantize(matrix(), *form) for form in FORMATS]
    monkeypatch.setattr("gemel.model.leaves.lowbit._BLOCK_ELEMENTS", 1000)
    for form, want in zip(FORMATS, whole, strict=True):
        low = quantize(matrix(), *form)
        assert torch.equal(low.q, want.q) and torch.equal(low.scale, want.scale) and torch.equal(low.dense(), want.dense())


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_zeros_stay_zeros_and_what_is_no_number_is_seen(bits: Literal[8, 4], group: int) -> None:
    assert not quantize(torch.zeros(3, 128), bits, group).dense().any()
    tiny = quantize(torch.full((3, 128), 1e-30), bits, group)
    assert tiny.is_finite() and (tiny.dense() <= 2e-30).all()
    for bad in (torch.nan, torch.inf, -torch.inf):
        w = torch.ones(3, 128)
        w[1, 77] = bad
        assert not quantize(w, bits, group).is_finite()
    assert quantize(torch.full((1, 128), 1e8), bits, group).is_finite() == (group == 0)  # fp16 ends at 65504


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="rows of 96 elements do not divide into groups of 64; groups that do: 32"):
        quantize(torch.ones(2, 96), 4, 64)
    with pytest.raises(ConfigError, match=r"rows of 48 elements .* no group does: use int8 weights"):
        quantize(torch.ones(2, 48), 4, 32)
    with pytest.raises(ConfigError, match="4-bit weights cannot have groups of 16; 32, 64, 128 are built"):
        quantize(torch.ones(2, 48), 4, 16)
    quantize(torch.ones(2, 96), 4, 32)  # the ways out
    quantize(torch.ones(2, 48), 8)


def test_activations_are_rounded_in_groups_of_32() -> None:
    x = torch.zeros(2, 40)
    x[0, 0], x[0, 1], x[0, 2] = 127.0, 2.5, -3.5  # scale 1: ties go to even
    x[0, 32], x[0, 39] = 0.5, -63.5  # the last group is of 8; its scale is 1/2
    got = round_activations(x)
    assert got.shape == x.shape and got[0, [0, 1, 2, 32, 39]].tolist() == [127.0, 2.0, -4.0, 0.5, -63.5] and not got[1].any()
    assert round_activations(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_the_product(bits: Literal[8, 4], group: int) -> None:
    low, bias, x = quantize(matrix(), bits, group), matrix(1, 24)[0], matrix(5, 256, seed=2)
    leaf = LowBitLinear(low, bias, (16, 8), activations="full")
    assert isinstance(leaf, Leaf) and (leaf.in_features, leaf.out_features, leaf.sections) == (256, 24, (16, 8))
    assert (leaf.bits, leaf.group) == (bits, group) and not list(leaf.parameters())
    assert_close(leaf(x), F.linear(x.double(), leaf.plain().double(), bias.double()), "fp32_reorder")
    rounded = LowBitLinear(low, bias)
    assert rounded.activations == "int8"
    assert_close(rounded(x), F.linear(round_activations(x).double(), leaf.plain().double(), bias.double()), "fp32_reorder")
    assert not torch.equal(rounded(x), leaf(x))
    assert leaf(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("low", [quantize(matrix(), 8), quantize(matrix(), 8, 32), quantize(matrix(), 4, 64), with_minima(24, 256, 32)])
@pytest.mark.parametrize("style", ["column", "row"])
@pytest.mark.parametrize("rank", [0, 1])
def test_shards_like_the_plain_leaf(low: LowBit, style: Literal["column", "row"], rank: int) -> None:
    plain = Linear(256, 24, True, sections=(16, 8))
    plain.weight.data = low.dense()
    leaf = LowBitLinear(low, plain.bias, plain.sections)
    for each in (plain, leaf):
        each.shard(style, rank, 2)
    assert torch.equal(leaf.plain(), plain.weight) and leaf.sections == plain.sections
    assert (leaf.in_features, leaf.out_features) == (plain.in_features, plain.out_features)
    assert (leaf.bias is None and plain.bias is None) or (plain.bias is not None and torch.equal(leaf.bias, plain.bias))


def test_parts_of_the_input_sum_to_the_whole() -> None:
    x, low = matrix(3, 256, seed=3), with_minima(24, 256, 64)
    whole, parts = LowBitLinear(low), [LowBitLinear(low) for _ in range(4)]
    for rank, part in enumerate(parts):
        part.shard("row", rank, 4)
    assert_close(sum(part(piece) for part, piece in zip(parts, x.chunk(4, 1), strict=True)), whole(x), "fp32_reorder")


def test_a_group_is_never_cut() -> None:
    with pytest.raises(ConfigError, match="a width of 256 does not divide into 8 parts of whole groups of 64; sizes that do: 1, 2, 4"):
        LowBitLinear(quantize(matrix(), 4, 64)).shard("row", 0, 8)
    with pytest.raises(ConfigError, match="whole groups of 32; sizes that do: 1, 2, 4, 8"):  # of the activations
        LowBitLinear(quantize(matrix(), 8)).shard("row", 0, 16)
    full = LowBitLinear(quantize(matrix(), 8), activations="full")
    full.shard("row", 3, 16)
    assert full.in_features == 16
    with pytest.raises(ConfigError, match="a width of 16 does not divide into 3 parts; sizes that do: 1, 2"):
        LowBitLinear(quantize(matrix(), 8), sections=(16, 8)).shard("column", 0, 3)


def test_casting_a_model_leaves_it_alone() -> None:
    leaf = LowBitLinear(with_minima(24, 256, 32))
    before = {name: tensor.clone() for name, tensor in leaf.named_buffers()}
    leaf.to(torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype for name, tensor in leaf.named_buffers())
