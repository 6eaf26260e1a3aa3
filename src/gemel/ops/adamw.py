"""AdamW in one native pass over weights and moments, in whatever form they are stored (Loshchilov and Hutter 2017, arXiv 1711.05101).

The plain version is `train.optim.adamw` with the stores of `train.optim.storage`: unpack, move, pack, each a pass or more over memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gemel.ops.cpu import training
from gemel.ops.cpu.autograd import fit


class Stored(NamedTuple):
    """Flat numbers in memory: fp32, or bf16 either with the halves that are missing (`low`, int16) or rounded at random with a `key`."""

    data: Tensor
    low: Tensor | None = None
    key: int | None = None


class Part(NamedTuple):
    """A stretch of one parameter: its weights, gradient (fp32 or bf16) and moments."""

    weight: Stored
    gradient: Tensor
    first: Stored
    second: Stored


def step(
    parts: Sequence[Part],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
    weight_decay: float = 0.0,
    l1: float = 0.0,
    table: Tensor,
) -> bool:
    """Move weights and moments in place; steps count from 1. False, and nothing done, where there are no kernels for these tensors.

    `l1` is what weights shrink by towards zero after the step, times the rate. `table` are the integers (int32) that keys are mixed with.
    """
    kernels = training.kernels() if all(_fits(part) for part in parts) else None
    if kernels is None:
        return False
    beta1, beta2 = betas
    how = training.AdamW(
        *(1.0 - lr * weight_decay, 1.0 - beta1, beta2, 1.0 - beta2, math.sqrt(1.0 - beta2**step), eps, lr / (1.0 - beta1**step), lr * l1),
        table.data_ptr(),
    )
    kernels.adamw(how, [_part(part) for part in parts])
    return True


def _fits(part: Part) -> bool:
    tensors = [x for stored in (part.weight, part.first, part.second) for x in (stored.data,)] + [part.gradient]
    same = all(x.is_contiguous() and x.numel() == part.gradient.numel() for x in tensors)
    complete = all(x.data.dtype == torch.float32 or x.low is not None or x.key is not None for x in (part.weight, part.first, part.second))
    return same and complete and all(fit(x) is not None for x in tensors)


def _part(part: Part) -> training.AdamWPart:
    weight, first, second = (_stored(x) for x in (part.weight, part.first, part.second))
    gradient = part.gradient
    return training.AdamWPart(gradient.numel(), weight, first, second, gradient.data_ptr(), training.FORMATS[gradient.dtype])


def _stored(x: Stored) -> training.Stored:
    mix = (0, 0) if x.key is None else (x.key >> 32, (x.key | 1) & 0xFFFFFFFF)
    return training.Stored(x.data.data_ptr(), None if x.low is None else x.low.data_ptr(), training.FORMATS[x.data.dtype], 0, mix)
