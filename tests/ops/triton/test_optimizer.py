from __future__ import annotations

import torch

from gemel.ops import triton
from gemel.ops.train import Moved, adamw_reference
from tests.tolerance import assert_close

HOW = {"rate": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "gradient_scale": 0.5}


def moved(shape: tuple[int, ...], weight: torch.dtype, gradient: torch.dtype, device: torch.device, decay: float) -> Moved:
    w, g, first, second = torch.randn(4, *shape, generator=torch.Generator().manual_seed(len(shape))).to(device)
    master = None if weight == torch.float32 else w.clone()
    return Moved(w.to(weight), g.to(gradient), first * 0.1, second.square(), master, decay)


def test_steps_over_tensors_of_all_kinds(device: torch.device) -> None:
    """More than one piece, one that is not full, types in turn; the reference is in float64."""
    tensors = [
        moved((100, 95), torch.float32, torch.float32, device, 0.1),
        moved((5,), torch.float32, torch.float32, device, 0.0),
        moved((77,), torch.bfloat16, torch.bfloat16, device, 0.1),
        moved((3, 3), torch.bfloat16, torch.float32, device, 0.1),
    ]
    wide = [Moved(*(part.cpu().double() if isinstance(part, torch.Tensor) else part for part in one)) for one in tensors]
    for step in (1, 2, 30):
        triton.adamw(tensors, step=step, **HOW)
        adamw_reference(wide, step=step, **HOW)
    for got, want in zip(tensors, wide, strict=True):
        narrow = got.weight.dtype == torch.bfloat16
        assert_close(got.weight.cpu(), want.weight, "bf16_reorder" if narrow else "fp32_reorder")
        assert_close(got.first.cpu(), want.first, "fp32_reorder")
        assert_close(got.second.cpu(), want.second, "fp32_reorder")
        if got.master is not None and want.master is not None:
            assert_close(got.master.cpu(), want.master, "fp32_reorder")


def test_no_gradient_only_decays(device: torch.device) -> None:
    one = moved((9000,), torch.float32, torch.float32, device, 0.5)
    before = one.weight.clone()
    for tensor in one[1:4]:
        tensor.zero_()
    triton.adamw([one], step=1, **HOW)
    assert torch.equal(one.weight, before * (1 - 1e-2 * 0.5))
