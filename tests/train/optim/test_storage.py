"""How weights and state are stored: exact where that is promised, unbiased where it is left to chance, close where it is eight bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gemel.train.optim import dynamic, noise
from gemel.train.optim.storage import Blocks, Halved, Plain, Rounded
from tests.tolerance import CHI_SQUARE_P, assert_close

CPU = torch.device("cpu")


def _numbers(num: int, seed: int = 0) -> Tensor:
    """Numbers over many orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, generator=generator) * torch.exp(3 * torch.randn(num, generator=generator))


def _zeros(_: str, num: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(num, dtype=dtype)


# --- halves ------------------------------------------------------------------------------------------------------------------------------


def test_halves_are_the_number_exactly() -> None:
    special = torch.tensor([0.0, -0.0, 1.0, 3.4028235e38, -3.4028235e38, 1e-45, math.inf, -math.inf])
    x = torch.cat([special, _numbers(1000)])
    bf16 = torch.zeros(x.numel(), dtype=torch.bfloat16)
    store = Halved(bf16, torch.zeros(x.numel(), dtype=torch.int16))
    store.write(0, x, 0)
    assert torch.equal(store.read(0, x.numel()).view(torch.int32), x.view(torch.int32))
    assert torch.equal(bf16[8:], x[8:].bfloat16())


def test_halves_round_ties_away_from_zero_and_still_know_the_number() -> None:
    x = torch.tensor([1 + 2**-8, -1 - 2**-8, 1 + 3 * 2**-8])
    bf16 = torch.zeros(3, dtype=torch.bfloat16)
    store = Halved(bf16, torch.zeros(3, dtype=torch.int16))
    store.write(0, x, 0)
    assert bf16.tolist() == [1 + 2**-7, -1 - 2**-7, 1 + 2**-6]
    assert torch.equal(store.read(0, 3), x)


def test_halves_begin_as_the_parameter_and_follow_weights_that_are_loaded_later() -> None:
    bf16 = _numbers(300).bfloat16()
    store = Halved(bf16, torch.zeros(300, dtype=torch.int16))
    assert torch.equal(store.read(0, 300), bf16.float())
    store.write(0, store.read(0, 300) * 1.001, 0)
    bf16.fill_(5.0)
    assert_close(store.read(0, 300), torch.full((300,), 5.0), "bf16_reorder")


def test_stores_write_only_their_stretch() -> None:
    x = _numbers(1024)
    whole = torch.zeros(1024, dtype=torch.bfloat16)
    for store in (
        Plain(torch.zeros(1024)),
        Halved(whole, torch.zeros(1024, dtype=torch.int16)),
        Rounded(torch.zeros(1024, dtype=torch.bfloat16)),
        Blocks.allocate(_zeros, "x", 1024, signed=True),
    ):
        part = store.read(256, 768)
        part.copy_(x[256:768])
        store.write(256, part, 1)
        assert store.read(0, 1024)[:256].count_nonzero() == 0 and store.read(0, 1024)[768:].count_nonzero() == 0
        assert_close(store.read(256, 768), x[256:768], "bf16_reorder")


# --- stochastic rounding -----------------------------------------------------------------------------------------------------------------


def test_rounding_is_to_one_of_the_neighbours_and_right_on_average() -> None:
    """4,000 roundings of each of 64 numbers: how often they go up is binomial, and the squared deviations together are chi-square."""
    x, num = _numbers(64), 4000
    below = (x.view(torch.int32) >> 16 << 16).view(torch.float32)
    above = ((x.view(torch.int32) >> 16 << 16) + 0x10000).view(torch.float32)
    ups = torch.zeros(64)
    for step in range(num):
        data = torch.zeros(64, dtype=torch.bfloat16)
        Rounded(data).write(0, x.clone(), noise.key(0, "name", step))
        assert bool(((data.float() == below) | (data.float() == above)).all())
        ups += data.float() == above
    p = ((x - below) / (above - below)).double()
    chi_square = ((ups - num * p).square() / (num * p * (1 - p)).clamp_min(1e-9)).sum()
    assert torch.special.gammaincc(torch.tensor(32.0), chi_square.float() / 2) > CHI_SQUARE_P


def test_neighbours_round_independently() -> None:
    """The correlation of 2,000 draws of neighbouring elements is that of independent ones, about 1 / sqrt(2000)."""
    draws = torch.stack([noise.sixteen_bits(noise.key(step), 256, CPU).float() for step in range(2000)])
    correlation = torch.corrcoef(draws.T).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / math.sqrt(2000)


def test_bits_are_uniform() -> None:
    bits = noise.sixteen_bits(noise.key("a"), noise.TABLE, CPU)
    assert bits.min() >= 0 and bits.max() < 2**16
    counts = torch.bincount(bits >> 8, minlength=256).double()
    expected = noise.TABLE / 256
    chi_square = ((counts - expected).square() / expected).sum()
    assert torch.special.gammaincc(torch.tensor(127.5), chi_square.float() / 2) > CHI_SQUARE_P


def test_bits_depend_on_the_key_alone() -> None:
    first = noise.sixteen_bits(noise.key(1, "a", 7), 1000, CPU)
    assert torch.equal(first, noise.sixteen_bits(noise.key(1, "a", 7), 1000, CPU))
    assert torch.equal(first[:10], noise.sixteen_bits(noise.key(1, "a", 7), 10, CPU))
    for other in (noise.key(2, "a", 7), noise.key(1, "b", 7), noise.key(1, "a", 8)):
        assert (first == noise.sixteen_bits(other, 1000, CPU)).sum() < 10
    # written down once, so that an upgrade cannot change what a resumed run draws
    assert noise.sixteen_bits(noise.key(1, "a", 7), 4, CPU).tolist() == [14631, 14927, 58384, 36779]


def test_an_average_moves_in_bf16_only_when_rounded_at_random() -> None:
    """beta = 0.999 from 1 towards 2: a step of 0.001 is a quarter of the spacing of bf16."""
    data, nearest, exact = torch.ones(1000, dtype=torch.bfloat16), torch.ones(1000, dtype=torch.bfloat16), torch.ones(1000)
    for step in range(1000):
        moved = torch.lerp(Rounded(data).read(0, 1000), torch.full((1000,), 2.0), 0.001)
        Rounded(data).write(0, moved, noise.key(step))
        nearest.copy_(torch.lerp(nearest.float(), torch.full((1000,), 2.0), 0.001))
        exact.lerp_(torch.full((1000,), 2.0), 0.001)
    assert nearest.eq(1.0).all()
    assert_close(data.float().mean(), exact.mean(), "fp16_scales")


# --- eight bits --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_is_the_paper_s(signed: bool) -> None:
    values = dynamic.code(signed, CPU).values.double()
    assert values.shape == (256,) and bool((values.diff() > 0).all())
    assert values[-1] == 1.0 and (values == 0).sum() == 1
    top = values[(values > 0.1) & (values < 1.0)]
    num_cells = 64 if signed else 128
    assert_close(top, 0.1 + 0.9 / num_cells * (torch.arange(num_cells) + 0.5), "fp32_reorder")
    smallest = values[values > 0].min().item()
    assert smallest == pytest.approx(0.55e-6 if signed else 0.325e-6)
    assert (values < 0).sum() == (127 if signed else 0)


@pytest.mark.parametrize("signed", [True, False])
def test_encodes_to_the_nearest_code(signed: bool) -> None:
    x = _numbers(256 * 40) if signed else _numbers(256 * 40).abs()
    codes, scales = dynamic.encode(x, signed)
    normal = (x.view(-1, 256) / x.view(-1, 256).abs().amax(1, keepdim=True)).view(-1).double()
    values = dynamic.code(signed, CPU).values.double()
    distance = (normal - values[codes.int()]).abs()
    least = (normal.unsqueeze(1) - values).abs().amin(1)
    kept = torch.ones_like(normal, dtype=torch.bool) if signed else normal > 2 * values[1]
    assert bool((distance - least <= 2.0**-11 * normal.abs() + 1e-12)[kept].all())
    assert torch.equal(scales, x.view(-1, 256).abs().amax(1))
    assert_close(dynamic.decode(codes, scales, signed), scales.repeat_interleave(256) * values[codes.int()].float(), "exact")


def test_zero_stays_zero_and_what_is_not_never_becomes_it_without_a_sign() -> None:
    x = torch.zeros(512)
    x[0], x[1] = 1.0, 1e-12
    codes, scales = dynamic.encode(x, signed=False)
    back = dynamic.decode(codes, scales, signed=False)
    assert 0 < back[1] < 1e-6
    assert back[0] == 1.0 and back[2:].count_nonzero() == 0
    signed = dynamic.decode(*dynamic.encode(x, signed=True), signed=True)
    assert signed[0] == 1.0 and signed[1:].count_nonzero() == 0


def test_an_outlier_spoils_its_own_block_only() -> None:
    x = _numbers(512)
    alone = dynamic.decode(*dynamic.encode(x, signed=True), signed=True)
    x[300] = 1e9
    beside = dynamic.decode(*dynamic.encode(x, signed=True), signed=True)
    assert torch.equal(alone[:256], beside[:256])
    assert not torch.equal(alone[256:300], beside[256:300])


def test_a_last_block_may_be_short() -> None:
    x = _numbers(700)
    store = Blocks.allocate(_zeros, "x", 700, signed=True)
    assert store.read(0, 700).count_nonzero() == 0
    store.write(0, x, 0)
    assert store.kept["codes"].shape == (700,) and store.kept["scales"].shape == (3,)
    assert_close(store.read(0, 700), x, "int8_state")
