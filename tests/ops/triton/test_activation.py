from __future__ import annotations

import pytest
import torch

from gemel.ops import activation, triton
from tests.ops.triton.gradients import assert_same


@pytest.mark.parametrize(("dtype", "row"), [(torch.float32, "fp32_reorder"), (torch.bfloat16, "bf16_reorder")], ids=str)
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 1), (5, 77), (3, 1025)])
def test_swiglu(num_tokens: int, width: int, dtype: torch.dtype, row: str, device: torch.device) -> None:
    x_T2F = torch.randn(num_tokens, 2 * width, generator=torch.Generator().manual_seed(0)) * 4
    assert_same(triton.swiglu, activation.swiglu, (x_T2F.to(device, dtype),), row)


def test_rows_may_be_apart(device: torch.device) -> None:
    x = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)).to(device)
    assert_same(triton.swiglu, activation.swiglu, (x[:, 4:24],), "fp32_reorder")
