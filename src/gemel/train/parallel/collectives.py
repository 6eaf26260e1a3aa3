"""What ranks say to each other in the middle of a model, differentiable: each exchange and the one that is its gradient.

Between the products of a block every rank has all tokens, or with sequence parallel its part of them (Korthikanti et al. 2022,
arXiv 2205.05198). Into a product that is cut, and out of it:

                 all tokens everywhere            parts of the tokens
    enter        nothing    | sum of gradients    gather the parts        | sum, keep one's own part
    leave        sum        | nothing             sum, keep one's own     | gather

T tokens, D width of any kind.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gemel.train.parallel.mesh import Axis

# torch 2.13 calls them by other names, and warns of these
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def enter(x_TD: Tensor, axis: Axis, sequence: bool) -> Tensor:
    """Before a product that is cut by columns, or the head: all tokens, whose gradients are summed over the parts."""
    kind = x_TD.device.type
    if torch.is_autocast_enabled(kind):
        x_TD = x_TD.to(torch.get_autocast_dtype(kind))  # the product would; what travels is then half as much
    out_TD: Tensor = (_Gather if sequence else _SumGradient).apply(x_TD, axis)  # type: ignore[no-untyped-call]
    return out_TD


def leave(x_TD: Tensor, axis: Axis, sequence: bool) -> Tensor:
    """Behind a product that is cut by rows, or the embedding: the sum of the parts."""
    out_TD: Tensor = (_SumScatter if sequence else _Sum).apply(x_TD, axis)  # type: ignore[no-untyped-call]
    return out_TD


def keep_own(x_TD: Tensor, axis: Axis) -> Tensor:
    """The own part of tokens that all have. The gradient is of that part only: whoever has parameters before this adds them up."""
    return x_TD.chunk(axis.size)[axis.rank]


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return _sum(grad_TD, ctx.axis), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, axis: Axis) -> Tensor:  # noqa: ARG004
        return _sum(x_TD, axis)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grad_TD, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _gather(x_TD, axis)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return _sum_scatter(grad_TD, ctx.axis), None


class _SumScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _sum_scatter(x_TD, axis)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return _gather(grad_TD, ctx.axis), None


def _sum(x_TD: Tensor, axis: Axis) -> Tensor:
    """In a tensor of its own: what came in may be kept by somebody."""
    total_TD = x_TD.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total_TD, group=axis.group)
    return total_TD


def _gather(x_TD: Tensor, axis: Axis) -> Tensor:
    whole_TD = x_TD.new_empty((len(x_TD) * axis.size, *x_TD.shape[1:]))
    _all_gather(whole_TD, x_TD.contiguous(), group=axis.group)
    return whole_TD


def _sum_scatter(x_TD: Tensor, axis: Axis) -> Tensor:
    assert len(x_TD) % axis.size == 0, f"{len(x_TD)} tokens do not divide among {axis.size} ranks"
    part_TD = x_TD.new_empty((len(x_TD) // axis.size, *x_TD.shape[1:]))
    _reduce_scatter(part_TD, x_TD.contiguous(), group=axis.group)
    return part_TD
