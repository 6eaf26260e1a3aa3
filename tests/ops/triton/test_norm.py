from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gemel.ops import norm, triton
from tests.ops.triton.gradients import assert_same

ROWS = {torch.float32: "fp32_reorder", torch.bfloat16: "bf16_reorder"}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize("shape", [(1, 3), (5, 100), (3, 5000), (300, 7), (5, 3, 24)], ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x, weight_D = random(*shape).to(device, dtype), random(shape[-1], seed=1).to(device, dtype)
    assert_same(triton.rms_norm, norm.rms_norm, (x, weight_D), ROWS[dtype], 1e-5)


def test_tokens_may_be_apart(device: torch.device) -> None:
    """Heads that are a part of a fused product, and a gradient that is one number seen as many."""
    fused_TMH = random(9, 6, 16).to(device)
    weight_H = random(16, seed=1).to(device).requires_grad_()
    part_TMH = fused_TMH[:, 1:4].requires_grad_()
    got = torch.autograd.grad(triton.rms_norm(part_TMH, weight_H, 1e-5).sum(), (part_TMH, weight_H))
    part_TMH = part_TMH.detach().contiguous().requires_grad_()
    want = torch.autograd.grad(triton.rms_norm(part_TMH, weight_H, 1e-5).sum(), (part_TMH, weight_H))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_rows_are_independent_of_others(device: torch.device) -> None:
    x_TD, weight_D = random(70, 96).to(device), random(96, seed=1).to(device)
    whole_TD = triton.rms_norm(x_TD, weight_D, 1e-5)
    assert torch.equal(triton.rms_norm(x_TD[33:35], weight_D, 1e-5), whole_TD[33:35])
