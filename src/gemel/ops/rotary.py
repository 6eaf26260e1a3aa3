"""Rotary positions (Su et al. 2021, arXiv 2104.09864): a table of angles, and the rotation of a head's two halves.

Angles are fp32, as in the code that the supported models were trained with: at position 8,000 a float64 table would differ from theirs by
5e-4 rad. T tokens, P positions, M heads of any kind, H head width, R = H / 2 rotated pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gemel.config.model import DynamicNTK, LinearScaling, Llama3Scaling, Rope, Yarn


def rope(x_TMH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
    """Rotate pair (i, i + H/2) of every head by its angle. `sin` carries a minus in its first half (see `rope_table`).

    With the sign in the table, swapping the halves is a roll by H/2 and the rotation is three calls.
    """
    return torch.addcmul(x_TMH * cos_T1H, x_TMH.roll(x_TMH.shape[-1] // 2, -1), sin_T1H)


def rope_table(rope: Rope, head_width: int, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [P, H] in fp32 on the CPU: cos = (c, c), sin = (-s, s)."""
    frequency_R, scale = rope_frequencies(rope, head_width)
    angle_PR = torch.arange(num_positions, dtype=torch.float32, device="cpu")[:, None] * frequency_R
    cos_PR, sin_PR = angle_PR.cos().mul_(scale), angle_PR.sin().mul_(scale)
    return torch.cat((cos_PR, cos_PR), -1), torch.cat((-sin_PR, sin_PR), -1)


def rope_frequencies(rope: Rope, head_width: int) -> tuple[Tensor, float]:
    """Radians per position of each pair ([R], fp32 on the CPU), and the factor on cosine and sine."""
    match rope.scaling:
        case None:
            return _powers(rope.theta, head_width), 1.0
        case LinearScaling(factor=factor):
            return _powers(rope.theta, head_width) / factor, 1.0
        case DynamicNTK() as ntk:
            return _powers(_ntk_theta(rope.theta, head_width, ntk), head_width), 1.0
        case Yarn() as yarn:
            return _yarn(rope.theta, head_width, yarn)
        case Llama3Scaling() as bands:
            return _llama3(_powers(rope.theta, head_width), bands), 1.0


def _powers(theta: float, head_width: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, head_width, 2, dtype=torch.float32, device="cpu") / head_width)


def _ntk_theta(theta: float, head_width: int, ntk: DynamicNTK) -> float:
    """The base that stretches the slowest pair over `length` and leaves the fastest alone."""
    length = max(ntk.length, ntk.original_positions)
    stretch = ntk.factor * length / ntk.original_positions - (ntk.factor - 1)
    return float(theta * stretch ** (head_width / (head_width - 2)))


def _yarn(theta: float, head_width: int, yarn: Yarn) -> tuple[Tensor, float]:
    """Pairs that turn over `beta_fast` times in the original length keep their speed, those below `beta_slow` are slowed by `factor`."""

    def pair_that_turns(times: float) -> float:
        return head_width * math.log(yarn.original_positions / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_width - 1)
    span = last - first if last != first else 0.001
    slow_R = ((torch.arange(head_width // 2, dtype=torch.float32, device="cpu") - first) / span).clamp(0, 1)
    kept_R = _powers(theta, head_width)
    return kept_R / yarn.factor * slow_R + kept_R * (1 - slow_R), _yarn_attention_factor(yarn)


def _yarn_attention_factor(yarn: Yarn) -> float:
    """The temperature of section 3.4 of the paper, put on queries and keys alike through the table."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0

    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return mscale(yarn.mscale) / mscale(yarn.mscale_all_dim)
    return mscale(1.0)


def _llama3(kept_R: Tensor, bands: Llama3Scaling) -> Tensor:
    """Wavelengths above original / low are slowed by `factor`, those below original / high kept, a ramp in frequency between."""
    turns_R = bands.original_positions * kept_R / (2 * math.pi)
    keep_R = ((turns_R - bands.low_freq_factor) / (bands.high_freq_factor - bands.low_freq_factor)).clamp(0, 1)
    return kept_R / bands.factor * (1 - keep_R) + kept_R * keep_R
