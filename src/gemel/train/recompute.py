"""Activations that are computed again instead of kept: memory for time.

Two ways. A block's forward is wrapped in place, so neither the model's definition nor the names of its parameters know of it.

- Selective: norms and gates are quick to compute from what they keep of their input anyway, so the product behind them need not keep their
  result as well. When autograd is about to keep a tensor that came out of an operation that knows how to be done `again`, it gets the
  operation instead. Nothing else of a block is computed twice (Korthikanti et al. 2022, arXiv 2205.05198, do so for attention's inside).
- Blocks: only the input is kept, and while its gradients are computed all that is inside of it is there. Groups of g out of n blocks hold
  n / g inputs and g blocks at once, which is least for g = sqrt(n) (Chen et al. 2016, arXiv 1604.06174).

The second computation is the first one again, bit by bit: same inputs, same order, same random numbers. So are the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from gemel.config.compute import Activations, KeepActivations, RecomputeBlocks, SelectiveRecompute
from gemel.model.attend import Attend
from gemel.model.attention import Rotation

Forward = Callable[[Tensor, Rotation | None, Attend], Tensor]
Again = Callable[[], Tensor]


def apply(config: Activations, blocks: Sequence[nn.Module]) -> None:
    """Make blocks that follow one another do what the configuration says."""
    match config:
        case KeepActivations():
            return
        case SelectiveRecompute():
            for block in blocks:
                block.forward = partial(_keeping_less, block.forward)
        case RecomputeBlocks():
            size = config.size(len(blocks))
            for first in range(0, len(blocks), size):
                _group(blocks[first : first + size])


def _keeping_less(forward: Forward, x_TD: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
    with saved_tensors_hooks(_pack, _unpack):
        return forward(x_TD, rotation, attend)


def _pack(x: Tensor) -> Tensor | Again:
    """What is kept in the place of a tensor: how to make it, if it is the result of an operation that can be done again.

    Such an operation's own backward pass comes after that of whoever keeps its result, so its inputs are there until then.
    """
    node: Any = x.grad_fn
    if type(node).__name__ == "GeluBackward0":  # torch's own
        return partial(_gelu, node)
    again = getattr(getattr(node, "_forward_cls", None), "again", None)
    return x if again is None else partial(again, node)


def _gelu(node: Any) -> Tensor:
    return F.gelu(node._saved_self, approximate=node._saved_approximate)


def _unpack(kept: Tensor | Again) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    with torch.no_grad():
        return kept()


def _group(blocks: Sequence[nn.Module]) -> None:
    """The first block of a group does the work of all, the others pass on what they get."""
    forwards: list[Forward] = [block.forward for block in blocks]
    blocks[0].forward = partial(_again, partial(_chain, forwards))
    for block in blocks[1:]:
        block.forward = _pass_on


def _again(forward: Forward, x_TD: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
    out_TD: Tensor = checkpoint(forward, x_TD, rotation, attend, use_reentrant=False)
    return out_TD


def _chain(forwards: Sequence[Forward], x_TD: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
    for forward in forwards:
        x_TD = forward(x_TD, rotation, attend)
    return x_TD


def _pass_on(x_TD: Tensor, _rotation: Rotation | None, _attend: Attend) -> Tensor:
    return x_TD
