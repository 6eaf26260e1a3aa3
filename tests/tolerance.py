"""The one table of tolerances. A test names a row; no test writes a number of its own.

Each row is a largest absolute difference relative to the scale of the reference (its largest absolute value), and a reason.
"""

from __future__ import annotations

import torch

RELATIVE = {
    "exact": 0.0,  # the same operations in the same order
    "fp32_elementwise": 5e-7,  # the same arithmetic on each number by itself, rounded in other places
    "fp32_cut": 1e-6,  # the same tokens, cut into batches in another way: sums of whole batches in another order, and nothing else
    "fp32_reorder": 2e-5,  # the same mathematics, sums in another order
    "fp32_parallel": 1e-5,  # the same gradients, added up over processes
    "fp32_steps": 1e-3,  # losses and norms of 20 steps of Adam, which divides small gradients by numbers as small
    "fp32_reference": 1e-4,  # against another implementation in fp32
    "golden_fp32": 2e-3,  # losses of 50 steps on another processor: what rounds differently grows from step to step
    "golden_bf16": 3e-2,  # the same with weights and products in bf16
    "int8_activations": 3e-2,  # activations rounded to int8: a last-bit difference before rounding moves a number by a whole step
    "fp16_scales": 1e-3,  # weights whose scales and minima were rounded to fp16, 2^-11 each
    "bf16_state": 1e-2,  # how far weights come in some tens of steps, with moments of 16 bits instead of 32
    "int8_state": 2e-2,  # the same with 8 bits; around the largest number of a block they lie 1.4% apart
    "bf16_reorder": 3e-2,  # the same mathematics in bf16
    "bf16_gradients": 6e-2,  # forward and backward through all layers in bf16, against fp32
}

# How far a random number may be from where two tokens meet and be taken for either, and a probability from where top-p or min-p cuts:
# weights are fp32, and a sum of them is as exact as one of them.
DRAW_BORDER = 1e-6

CHI_SQUARE_P = 1e-4  # a statistical test fails below this p-value; seeds are fixed, so it is not a matter of luck


def assert_close(got: torch.Tensor, want: torch.Tensor, row: str) -> None:
    """Fail unless max|got - want| <= RELATIVE[row] * max|want|."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)} != {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    scale = want.abs().max().clamp_min(1e-30)
    worst = ((got - want).abs().max() / scale).item()
    assert worst <= RELATIVE[row], f"{worst:.3g} of scale {scale.item():.3g}, allowed {RELATIVE[row]:.3g} ({row})"
