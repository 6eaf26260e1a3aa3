from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gemel.ops import head, triton
from tests.ops.triton.gradients import assert_same
from tests.tolerance import assert_close


def batch(num_tokens: int, width: int, vocab: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Hidden states, weight, targets and weights."""
    generator = torch.Generator().manual_seed(0)
    hidden_TD, weight_VD = torch.randn(num_tokens, width, generator=generator), torch.randn(vocab, width, generator=generator)
    targets_T, weights_T = torch.randint(vocab, (num_tokens,), generator=generator), torch.rand(num_tokens, generator=generator)
    return hidden_TD.to(device, dtype), weight_VD.to(device, dtype), targets_T.to(device), weights_T.to(device)


def loss(*given: object) -> Tensor:
    return triton.head_cross_entropy(*given)[0]


def reference(hidden_TD: Tensor, weight_VD: Tensor, *given: object) -> Tensor:
    return head.cross_entropy(hidden_TD, weight_VD, *given)[0]


@pytest.mark.parametrize("options", [(0.0, 0.0), (1e-2, 0.1)], ids=["plain", "z-loss and smoothing"])
@pytest.mark.parametrize(("dtype", "row"), [(torch.float32, "fp32_reorder"), (torch.bfloat16, "bf16_reorder")], ids=str)
def test_loss_and_gradients(options: tuple[float, float], dtype: torch.dtype, row: str, device: torch.device) -> None:
    hidden_TD, weight_VD, *rest = batch(11, 8, 37, device, dtype)
    assert_same(loss, reference, (hidden_TD, weight_VD), row, *rest, *options)


def test_slices_and_blocks_that_end_early(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of more than one block, and slices of 4 tokens, of which the last has fewer."""
    hidden_TD, weight_VD, *rest = batch(20, 4, 75, device)
    from gemel.ops.triton import head_loss

    monkeypatch.setattr(head_loss, "MAX_BLOCK", 32)
    monkeypatch.setattr(head_loss, "SLICE_BYTES", 4 * weight_VD.itemsize * len(weight_VD))
    assert_same(loss, reference, (hidden_TD, weight_VD), "fp32_reorder", *rest, 1e-2, 0.1)


def test_z_loss_by_hand(device: torch.device) -> None:
    hidden_TD, weight_VD, targets_T, weights_T = batch(11, 8, 37, device)
    both, z = triton.head_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T, 0.5)
    lse_T = (hidden_TD.double() @ weight_VD.double().t()).logsumexp(-1)
    assert_close(z, 0.5 * (weights_T * lse_T.square()).sum(), "fp32_reorder")
    assert_close(both - z, loss(hidden_TD, weight_VD, targets_T, weights_T), "fp32_reorder")
    assert not z.requires_grad


def test_only_what_is_asked_for_is_differentiated(device: torch.device) -> None:
    hidden_TD, weight_VD, *rest = batch(11, 8, 37, device)
    inputs = hidden_TD.requires_grad_(), weight_VD.requires_grad_()
    both = torch.autograd.grad(loss(*inputs, *rest), inputs)
    assert torch.equal(torch.autograd.grad(loss(hidden_TD, weight_VD.detach(), *rest), hidden_TD)[0], both[0])
    assert torch.equal(torch.autograd.grad(loss(hidden_TD.detach(), weight_VD, *rest), weight_VD)[0], both[1])
    with torch.no_grad():
        assert torch.equal(loss(*inputs, *rest), loss(*inputs, *rest).detach())
