"""The chunked head and cross-entropy: against torch's own on whole logits, against float64, and without a tensor of their size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gemel.ops import head
from gemel.ops.cpu import training
from gemel.ops.train import head_cross_entropy
from tests.tolerance import assert_close

T, D, V = 37, 16, 101


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native version has tests of its own."""
    monkeypatch.setattr(training, "kernels", lambda: None)


Case = tuple[Tensor, Tensor, Tensor, Tensor]


def case(dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (T,), generator=generator)
    weights = torch.rand(T, generator=generator) * (torch.rand(T, generator=generator) > 0.3)
    return hidden, weight, targets, weights


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, z_loss: float, smoothing: float) -> tuple[Tensor, Tensor]:
    """With all logits at once, by torch's cross-entropy."""
    logits = hidden @ weight.t()
    z = (weights * z_loss * logits.logsumexp(-1).square()).sum()
    return (weights * F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)).sum() + z, z


@pytest.mark.parametrize("rows", [1, 5, T, 1000])
@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.0, 0.0), (1e-2, 0.0), (0.0, 0.2), (1e-2, 0.2)])
def test_slices_equal_the_whole_in_float64(rows: int, z_loss: float, smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "SLICE_BYTES", rows * V * 4)
    hidden, weight, targets, weights = case()
    got, got_z = head_cross_entropy(hidden, weight, targets, weights, z_loss, smoothing)
    (got * 3).backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want, want_z = plain(*exact, targets, weights.double(), z_loss, smoothing)
    (want * 3).backward()
    assert_close(got, want, "fp32_reorder")
    assert_close(got_z, want_z, "fp32_reorder")
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert_close(ours.grad, theirs.grad, "fp32_reorder")


def test_by_hand() -> None:
    """Two classes with logits 0 and log 3: probabilities 1/4 and 3/4."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [float(torch.tensor(3.0).log())]])
    got, z = head_cross_entropy(hidden, weight, torch.tensor([0]), torch.tensor([2.0]), z_loss=0.5)
    four = torch.tensor(4.0)
    assert_close(z, 2 * 0.5 * four.log().square(), "fp32_reorder")
    assert_close(got - z, 2 * four.log(), "fp32_reorder")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_sum_in_fp32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "SLICE_BYTES", 3 * V * 4)
    hidden, weight, targets, weights = case(dtype)
    got, _ = head_cross_entropy(hidden, weight, targets, weights)
    got.backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want, _ = plain(*exact, targets, weights.double(), 0.0, 0.0)
    want.backward()
    assert_close(got, want, "bf16_reorder")
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == dtype
        assert_close(ours.grad, theirs.grad, "bf16_reorder")


def test_autocast_multiplies_in_its_type() -> None:
    hidden, weight, targets, weights = case()
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = head_cross_entropy(hidden, weight, targets, weights)
    narrow, _ = head_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets, weights)
    assert torch.equal(got, narrow) and not torch.equal(got, head_cross_entropy(hidden, weight, targets, weights)[0])
    got.backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_what_is_not_trained_changes_nothing() -> None:
    hidden, weight, targets, weights = case()
    got, _ = head_cross_entropy(hidden, weight, targets, weights)
    got.backward()
    kept = weights > 0
    alone, _ = head_cross_entropy(hidden[kept], weight, targets[kept], weights[kept])
    assert torch.equal(got, alone)
    assert hidden.grad is not None and not hidden.grad[~kept].any() and hidden.grad[kept].any(1).all()


class Largest(TorchDispatchMode):
    """The most elements that any tensor had which an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_of_the_logits_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "SLICE_BYTES", 4 * V * 4)
    hidden, weight, targets, weights = case()
    with Largest() as seen:
        head_cross_entropy(hidden, weight, targets, weights, 1e-4, 0.1)[0].backward()
    assert seen.elements == V * D  # the gradient of the head; a slice of 4 rows has fewer
    with Largest() as seen:
        plain(hidden, weight, targets, weights, 1e-4, 0.1)[0].backward()
    assert seen.elements == T * V
