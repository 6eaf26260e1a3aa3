"""An operation and its reference, forward and backward: the reference in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.tolerance import assert_close

Operation = Callable[..., Tensor | tuple[Tensor, ...]]


def assert_same(operation: Operation, reference: Operation, tensors: Sequence[Tensor], row: str, *others: object) -> None:
    """Outputs of both for `tensors` and `others`, and gradients of a random sum of the outputs with respect to `tensors`."""
    got, got_gradients = _run(operation, [tensor.detach().requires_grad_() for tensor in tensors], others)
    wide = [tensor.detach().cpu().double().requires_grad_() for tensor in tensors]
    want, want_gradients = _run(reference, wide, [one.cpu() if isinstance(one, Tensor) else one for one in others])
    for a, b in zip((*got, *got_gradients), (*want, *want_gradients), strict=True):
        assert_close(a.cpu(), b, row)
    assert [one.dtype for one in got_gradients] == [one.dtype for one in tensors]


def _run(operation: Operation, tensors: Sequence[Tensor], others: Sequence[object]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    outputs = operation(*tensors, *others)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(7)
    slopes = [torch.randn(one.shape, generator=generator).to(one.device, one.dtype) for one in outputs]
    return outputs, torch.autograd.grad(outputs, tensors, slopes)
