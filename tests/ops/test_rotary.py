import math

import pytest
import torch

from gemel import ops
from gemel.config.model import DynamicNTK, LinearScaling, Llama3Scaling, Rope, Yarn
from tests.tolerance import assert_close


def _rotate(x_TMH: torch.Tensor, rope: Rope, positions: list[int]) -> torch.Tensor:
    cos, sin = ops.rope_table(rope, x_TMH.shape[-1], max(positions) + 1)
    return ops.rope(x_TMH, cos[positions][:, None], sin[positions][:, None])


def test_rotation_is_multiplication_by_a_unit_complex_number() -> None:
    x, positions = torch.randn(4, 3, 10), [0, 1, 17, 100]
    first, second = x.double().chunk(2, -1)
    frequency = 500.0 ** (-torch.arange(5, dtype=torch.float64) / 5)
    angle = torch.tensor(positions, dtype=torch.float64)[:, None, None] * frequency
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    assert_close(_rotate(x, Rope(theta=500.0), positions), torch.cat((turned.real, turned.imag), -1), "fp32_reorder")


def test_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    scores = [(_rotate(q, Rope(), [a]) * _rotate(k, Rope(), [b])).sum() for a, b in ((5, 3), (25, 23), (102, 100))]
    assert_close(torch.stack(scores), scores[0].expand(3), "fp32_reorder")


def test_linear_scaling_divides_positions() -> None:
    plain, _ = ops.rope_frequencies(Rope(), 8)
    scaled, scale = ops.rope_frequencies(Rope(scaling=LinearScaling(factor=4.0)), 8)
    assert scale == 1.0 and torch.equal(scaled, plain / 4)


def test_dynamic_ntk_changes_nothing_up_to_the_original_length() -> None:
    plain, _ = ops.rope_frequencies(Rope(), 8)
    short, _ = ops.rope_frequencies(Rope(scaling=DynamicNTK(factor=2.0, original_positions=64, length=48)), 8)
    long, _ = ops.rope_frequencies(Rope(scaling=DynamicNTK(factor=2.0, original_positions=64, length=128)), 8)
    assert torch.equal(short, plain)
    # theta * (2 * 128 / 64 - 1) ** (8 / 6): the slowest pair turns 3 ** (4/3 * 3/4) = 3 times slower, the fastest as before
    assert_close(plain / long, torch.tensor([1.0, 3 ** (1 / 3), 3 ** (2 / 3), 3.0]), "fp32_reorder")


def test_llama3_bands() -> None:
    bands = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192)
    plain, _ = ops.rope_frequencies(Rope(theta=500_000.0), 128)
    scaled, _ = ops.rope_frequencies(Rope(theta=500_000.0, scaling=bands), 128)
    turns = 8192 * plain / (2 * math.pi)
    assert torch.equal(scaled[turns > 4], plain[turns > 4])
    assert_close(scaled[turns < 1], plain[turns < 1] / 8, "fp32_reorder")
    between = (turns > 1) & (turns < 4)
    assert between.any() and ((scaled < plain) & (scaled > plain / 8))[between].all()


@pytest.mark.parametrize(
    ("yarn", "scale"),
    [
        (Yarn(factor=4.0, original_positions=64), 0.1 * math.log(4) + 1),
        (Yarn(factor=4.0, original_positions=64, attention_factor=1.5), 1.5),
        (Yarn(factor=4.0, original_positions=64, mscale=2.0, mscale_all_dim=0.5), (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
        (Yarn(factor=0.5, original_positions=64), 1.0),
    ],
)
def test_yarn_attention_factor(yarn: Yarn, scale: float) -> None:
    assert ops.rope_frequencies(Rope(scaling=yarn), 32)[1] == pytest.approx(scale)
    cos, _ = ops.rope_table(Rope(scaling=yarn), 32, 1)
    assert_close(cos[0], torch.full((32,), scale), "fp32_reorder")


def test_yarn_keeps_fast_pairs_and_slows_slow_ones() -> None:
    plain, _ = ops.rope_frequencies(Rope(), 64)
    scaled, _ = ops.rope_frequencies(Rope(scaling=Yarn(factor=4.0, original_positions=2048)), 64)
    ratio = plain / scaled
    assert_close(ratio[0], torch.tensor(1.0), "fp32_reorder")
    assert_close(ratio[-1], torch.tensor(4.0), "fp32_reorder")
    assert (ratio.diff() >= -1e-6).all()
