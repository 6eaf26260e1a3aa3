"""AdamW in one launch against unpacking, torch's step and packing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gemel.config.optim import Precision, WeightStorage
from gemel.ops import triton
from gemel.ops.cpu import training
from gemel.train.optim import Optimizer, build
from tests.tolerance import assert_close
from tests.train.optim.problem import config


def problem(device: torch.device, state: Precision, weights: WeightStorage) -> tuple[list[Tensor], Optimizer]:
    """More than one block, more than one stretch, one that is not full, and one that begins within a stretch."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    parameters = {name: nn.Parameter(torch.randn(n, generator=generator).to(device, dtype)) for name, n in (("a", 9500), ("b", 5))}
    return list(parameters.values()), build(config(state=state, weights=weights), parameters.items(), starts={"a": 100})


@pytest.mark.parametrize("state", ["fp32", "bf16"])
@pytest.mark.parametrize("weights", ["fp32", "master", "stochastic"])
def test_a_step_is_the_plain_one(state: Precision, weights: WeightStorage, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """With decay, L1, and the same draws where numbers are rounded at random."""
    monkeypatch.setattr("gemel.train.optim.optimizer.STRETCH", 4096)
    monkeypatch.setattr(training, "kernels", lambda: None)
    (ours, optimizer), (theirs, plain) = problem(device, state, weights), problem(torch.device("cpu"), state, weights)
    launches: list[int] = []
    launched = triton.adamw
    monkeypatch.setattr(triton, "adamw", lambda how, part, table: (launches.append(part.gradient.numel()), launched(how, part, table)))
    for step in range(3):
        gradients = [torch.randn(w.shape, generator=torch.Generator().manual_seed(step)).to(w.dtype) for w in theirs]
        for parameters, moving in ((ours, optimizer), (theirs, plain)):
            for w, gradient in zip(parameters, gradients, strict=True):
                w.grad = gradient.to(w.device)
            with pytest.MonkeyPatch.context() as patch:
                if moving is optimizer and device.type == "cpu":
                    patch.setattr(triton, "takes", lambda *tensors: tensors[0].numel() > 0)
                moving.step(1e-2)
    assert launches == 3 * [9500, 5]
    row = "fp32_reorder" if (state, weights) == ("fp32", "fp32") else "bf16_reorder"
    for got, want in zip(ours, theirs, strict=True):
        assert_close(got.cpu(), want, row)
        assert (got.cpu() == want).float().mean() > 0.9  # a rare last bit apart
    for name, x in optimizer.state_dict().items():
        if not name.endswith("low"):  # what a last bit is apart in the weight is everything there
            assert_close(x.cpu(), plain.state_dict()[name], row)
        else:
            assert (x.cpu() == plain.state_dict()[name]).float().mean() > 0.5
