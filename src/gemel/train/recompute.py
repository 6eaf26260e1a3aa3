"""Activations that are computed again instead of kept: memory for time.

A block's forward is wrapped in place, so neither the model's definition nor the names of its parameters know of it. Blocks can be taken
together: of a group only the input is kept, and while its gradients are computed all that is inside of it is there. Groups of g out of n
blocks hold n / g inputs and g blocks at once, which is least for g = sqrt(n) (Chen et al. 2016, arXiv 1604.06174).

The second computation is the first one again, bit by bit: same inputs, same order, same random numbers. So are the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from gemel.config.compute import Activations, KeepActivations, RecomputeBlocks, SelectiveRecompute
from gemel.model.attend import Attend
from gemel.model.attention import Rotation
from gemel.ops import triton
from gemel.ops.cpu import autograd

aten = torch.ops.aten
# Costly for what they return: products with weights, and attention, whose recomputation would grow with the square of a document.
COSTLY = {
    *autograd.COSTLY,
    *triton.COSTLY,
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}
Forward = Callable[[Tensor, Rotation | None, Attend], Tensor]


def apply(config: Activations, blocks: Sequence[nn.Module]) -> None:
    """Make blocks that follow one another do what the configuration says."""
    match config:
        case KeepActivations():
            return
        case SelectiveRecompute():
            for block in blocks:
                block.forward = partial(_again, block.forward, partial(create_selective_checkpoint_contexts, _policy))
        case RecomputeBlocks():
            size = config.size(len(blocks))
            for first in range(0, len(blocks), size):
                _group(blocks[first : first + size])


def _group(blocks: Sequence[nn.Module]) -> None:
    """The first block of a group does the work of all, the others pass on what they get."""
    forwards: list[Forward] = [block.forward for block in blocks]
    blocks[0].forward = partial(_again, partial(_chain, forwards), noop_context_fn)
    for block in blocks[1:]:
        block.forward = _pass_on


def _again(forward: Forward, contexts: Callable[[], Any], x_TD: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
    out_TD: Tensor = checkpoint(forward, x_TD, rotation, attend, use_reentrant=False, context_fn=contexts)
    return out_TD


def _chain(forwards: Sequence[Forward], x_TD: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
    for forward in forwards:
        x_TD = forward(x_TD, rotation, attend)
    return x_TD


def _pass_on(x_TD: Tensor, _rotation: Rotation | None, _attend: Attend) -> Tensor:
    return x_TD


def _policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in COSTLY else CheckpointPolicy.PREFER_RECOMPUTE
