from __future__ import annotations

import pytest
import torch

from gemel.config.model import Rope
from gemel.ops import rotary, triton
from tests.ops.triton.gradients import assert_same


@pytest.mark.parametrize(("dtype", "row"), [(torch.float32, "fp32_reorder"), (torch.bfloat16, "bf16_reorder")], ids=str)
@pytest.mark.parametrize(("num_heads", "width"), [(1, 2), (3, 24), (40, 64)])
def test_rope(num_heads: int, width: int, dtype: torch.dtype, row: str, device: torch.device) -> None:
    positions_T = torch.tensor([0, 1, 2, 0, 70])
    cos_T1H, sin_T1H = (table[positions_T][:, None].to(device, dtype) for table in rotary.rope_table(Rope(theta=1e4), width, 80))
    x_TMH = torch.randn(5, num_heads, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    assert_same(triton.rope, rotary.rope, (x_TMH,), row, cos_T1H, sin_T1H)


def test_queries_and_keys_of_a_fused_product(device: torch.device) -> None:
    """Tokens that are apart, and angles whose halves differ in more than their sign."""
    fused_TMH = torch.randn(5, 6, 16, generator=torch.Generator().manual_seed(0)).to(device)
    cos_T1H, sin_T1H = torch.randn(2, 5, 1, 16, generator=torch.Generator().manual_seed(1)).to(device)
    assert_same(triton.rope, rotary.rope, (fused_TMH[:, :4],), "fp32_reorder", cos_T1H, sin_T1H)
