from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gemel.ops import triton
from gemel.ops.train import head_cross_entropy_reference
from tests.ops.triton.gradients import assert_same
from tests.tolerance import assert_close


def batch(num_tokens: int, width: int, vocab: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Hidden states, weight, targets and weights; every fourth token is not trained, and its target is no id."""
    generator = torch.Generator().manual_seed(0)
    hidden_TD, weight_VD = torch.randn(num_tokens, width, generator=generator), torch.randn(vocab, width, generator=generator)
    targets_T, weights_T = torch.randint(vocab, (num_tokens,), generator=generator), torch.rand(num_tokens, generator=generator)
    targets_T[3::4], weights_T[3::4] = -100, 0
    return hidden_TD.to(device, dtype), weight_VD.to(device, dtype), targets_T.to(device), weights_T.to(device)


def reference(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, weights_T: Tensor, *options: float) -> Tensor:
    trained_T = weights_T > 0
    return head_cross_entropy_reference(hidden_TD[trained_T], weight_VD, targets_T[trained_T], weights_T[trained_T].double(), *options)[0]


@pytest.mark.parametrize("options", [(0.0, 0.0), (1e-2, 0.1)], ids=["plain", "z-loss and smoothing"])
@pytest.mark.parametrize(("dtype", "row"), [(torch.float32, "fp32_reorder"), (torch.bfloat16, "bf16_reorder")], ids=str)
def test_loss_and_gradients(options: tuple[float, float], dtype: torch.dtype, row: str, device: torch.device) -> None:
    hidden_TD, weight_VD, *rest = batch(11, 8, 37, device, dtype)
    assert_same(lambda *given: triton.head_cross_entropy(*given)[0], reference, (hidden_TD, weight_VD), row, *rest, *options)


def test_slices_and_blocks_that_end_early(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of more than one block, and slices of 4 tokens, of which the last has fewer."""
    hidden_TD, weight_VD, *rest = batch(20, 4, 75, device)
    from gemel.ops.triton import head_loss

    monkeypatch.setattr(head_loss, "MAX_BLOCK", 32)
    monkeypatch.setattr(head_loss, "SLICE_BYTES", 4 * weight_VD.itemsize * len(weight_VD))
    assert_same(lambda *given: triton.head_cross_entropy(*given)[0], reference, (hidden_TD, weight_VD), "fp32_reorder", *rest, 1e-2, 0.1)


def test_z_loss_by_hand(device: torch.device) -> None:
    hidden_TD, weight_VD, targets_T, weights_T = batch(11, 8, 37, device)
    loss, z = triton.head_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T, 0.5)
    lse_T = (hidden_TD.double() @ weight_VD.double().t()).logsumexp(-1)
    assert_close(z, 0.5 * (weights_T * lse_T.square()).sum(), "fp32_reorder")
    assert_close(loss - z, triton.head_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T)[0], "fp32_reorder")
    assert not z.requires_grad


def test_only_what_is_asked_for_is_differentiated(device: torch.device) -> None:
    hidden_TD, weight_VD, *rest = batch(11, 8, 37, device)
    both = torch.autograd.grad(
        triton.head_cross_entropy(hidden_TD.requires_grad_(), weight_VD.requires_grad_(), *rest)[0], (hidden_TD, weight_VD)
    )
    alone = torch.autograd.grad(triton.head_cross_entropy(hidden_TD, weight_VD.detach(), *rest)[0], hidden_TD)[0]
    assert torch.equal(alone, both[0])
    with torch.no_grad():
        assert not triton.head_cross_entropy(hidden_TD, weight_VD, *rest)[0].requires_grad


def test_nothing_trained_costs_nothing(device: torch.device) -> None:
    hidden_TD, weight_VD, targets_T, weights_T = batch(5, 8, 37, device)
    loss, z = triton.head_cross_entropy(hidden_TD.requires_grad_(), weight_VD, targets_T, weights_T * 0, 1e-2)
    loss.backward()
    assert (loss.item(), z.item(), hidden_TD.grad.abs().max().item()) == (0, 0, 0)


def test_a_target_that_is_no_id(device: torch.device) -> None:
    hidden_TD, weight_VD, targets_T, weights_T = batch(5, 8, 37, device)
    targets_T[1] = 37
    with pytest.raises(IndexError, match="37, the vocabulary has 37 entries"):
        triton.head_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T)


def test_autocast_decides_the_type_of_products(device: torch.device) -> None:
    hidden_TD, weight_VD, *rest = batch(11, 8, 37, device)
    with torch.autocast(device.type, torch.bfloat16):
        cast = triton.head_cross_entropy(hidden_TD.requires_grad_(), weight_VD, *rest)[0]
    narrow = triton.head_cross_entropy(hidden_TD.bfloat16(), weight_VD.bfloat16(), *rest)[0]
    assert torch.equal(cast, narrow)
    assert torch.autograd.grad(cast, hidden_TD)[0].dtype == torch.float32
