"""AdamW in one pass over weights and moments, in whatever form they are stored (Loshchilov and Hutter 2017, arXiv 1711.05101).

The plain version is `train.optim.adamw` with the stores of `train.optim.storage`: unpack, move, pack, each a pass or more over memory. This
one is native on CPUs and in Triton on GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gemel.ops import triton
from gemel.ops.cpu import training
from gemel.ops.cpu.autograd import fit


class Draws(NamedTuple):
    """How numbers are rounded at random: they lie in stretches of `length` places, from place `offset` of the first on.

    Each stretch has a key, which the integer of a place in the table of `step` is mixed with.
    """

    keys: tuple[int, ...]
    offset: int
    length: int


class Stored(NamedTuple):
    """Flat numbers in memory: fp32, or bf16 either with the halves that are missing (`low`, int16) or rounded at random."""

    data: Tensor
    low: Tensor | None = None
    draws: Draws | None = None


class Part(NamedTuple):
    """A part of one parameter, or all of it: its weights, gradient (fp32 or bf16) and moments."""

    weight: Stored
    gradient: Tensor
    first: Stored
    second: Stored


class How(NamedTuple):
    """What a step does, in the terms of its loop.

    moment = moment + rest1 (g - moment), square = beta2 square + rest2 g^2,
    weight = keep weight - step moment / (sqrt(square) / root + eps), then up to `shrink` nearer to zero.
    """

    keep: float
    rest1: float
    beta2: float
    rest2: float
    root: float
    eps: float
    step: float
    shrink: float


def step(
    part: Part,
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
    beta1, beta2 = betas
    root = math.sqrt(1.0 - beta2**step)
    how = How(1.0 - lr * weight_decay, 1.0 - beta1, beta2, 1.0 - beta2, root, eps, lr / (1.0 - beta1**step), lr * l1)
    if not _complete(part):
        return False
    if all(triton.takes(x) for x in _tensors(part)):
        triton.adamw(how, part, table)
        return True
    kernels = training.kernels() if all(fit(x) is not None for x in _tensors(part)) else None
    if kernels is None:
        return False
    kernels.adamw(training.AdamW(*how, table.data_ptr()), [_stretch(part, *found) for found in _stretches(part)])
    return True


def _tensors(part: Part) -> list[Tensor]:
    return [part.gradient, *(stored.data for stored in (part.weight, part.first, part.second))]


def _complete(part: Part) -> bool:
    stored = part.weight, part.first, part.second
    same = all(x.is_contiguous() and x.numel() == part.gradient.numel() for x in _tensors(part))
    return same and all(x.data.dtype == torch.float32 or x.low is not None or x.draws is not None for x in stored)


def _stretches(part: Part) -> Iterator[tuple[int, int, int]]:
    """The number of each, and where in the part it begins and ends. All that is drawn for lies in the same ones."""
    draws, num = next((x.draws for x in (part.weight, part.first, part.second) if x.draws), None), part.gradient.numel()
    if draws is None:
        yield 0, 0, num
        return
    for number in range(len(draws.keys)):
        yield number, max(number * draws.length - draws.offset, 0), min((number + 1) * draws.length - draws.offset, num)


def _stretch(part: Part, number: int, begin: int, end: int) -> training.AdamWPart:
    weight, first, second = (_stored(x, number, begin) for x in (part.weight, part.first, part.second))
    gradient = part.gradient
    address = gradient.data_ptr() + begin * gradient.itemsize
    return training.AdamWPart(end - begin, weight, first, second, address, training.FORMATS[gradient.dtype])


def _stored(x: Stored, number: int, begin: int) -> training.Stored:
    low = None if x.low is None else x.low.data_ptr() + begin * x.low.itemsize
    place, mix = 0, (0, 0)
    if x.draws is not None:
        place, mix = x.draws.offset if number == 0 else 0, mixed(x.draws.keys[number])
    return training.Stored(x.data.data_ptr() + begin * x.data.itemsize, low, training.FORMATS[x.data.dtype], place, mix)


def mixed(key: int) -> tuple[int, int]:
    """The two words, as int32, that integers of the table are mixed with: the upper half of (integer ^ first) * second are random bits."""
    return _signed(key >> 32), _signed(key | 1)


def _signed(word: int) -> int:
    """The lower 32 bits as int32, which wraps around like any other when multiplied."""
    return (word & 0xFFFFFFFF ^ 1 << 31) - (1 << 31)
