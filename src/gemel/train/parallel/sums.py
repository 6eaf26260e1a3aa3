"""Sums of gradients over ranks, which travel while the backward pass goes on.

Gradients come in about the reverse order of the parameters. They are put together into buckets of a few megabytes, and each bucket leaves
as soon as it is full and all before it have left, so that all ranks send the same in the same order (Li et al. 2020, arXiv 2006.15704).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gemel.train.parallel.mesh import Axis

BUCKET = 2**22  # elements: enough to be worth a message, few enough to leave early


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements of a parameter, flat."""

    name: str
    parameter: nn.Parameter
    start: int
    stop: int


@dataclass(slots=True)
class Bucket:
    """What travels together, to rank `owner` of the axis, or to all."""

    owner: int | None
    slices: list[Slice] = field(default_factory=list)


def buckets(slices: Sequence[Slice], owner: int | None = None) -> list[Bucket]:
    """The slices in the order in which their gradients come, a bucket's worth at a time."""
    made, size = [Bucket(owner)], 0
    for one in reversed(slices):
        if size + one.stop - one.start > BUCKET and made[-1].slices:
            made, size = [*made, Bucket(owner)], 0
        made[-1].slices.append(one)
        size += one.stop - one.start
    return made if slices else []


class Sums:
    """Over the ranks of an axis. `finish` gives each bucket's sum to `arrived`: on every rank, or on its owner."""

    def __init__(self, made: Sequence[Bucket], axis: Axis, arrived: Callable[[Bucket, Tensor], None], free: bool):
        """`free` says that gradients are not kept where they come from."""
        self._buckets, self._axis, self._arrived, self._free = made, axis, arrived, free
        self._needs: dict[int, list[int]] = {}  # by parameter: the buckets that it has slices in
        for number, bucket in enumerate(made):
            for one in bucket.slices:
                self._needs.setdefault(id(one.parameter), []).append(number)
        self._hooked = False
        self._sending = False
        self._begin()

    def _begin(self) -> None:
        self._missing = [len(bucket.slices) for bucket in self._buckets]
        self._unsent = Counter({parameter: len(numbers) for parameter, numbers in self._needs.items()})
        self._sent: list[tuple[Bucket, Tensor, Any]] = []

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Around a backward pass behind which no gradient changes any more: buckets leave as they fill."""
        if not self._hooked:
            for parameter in {id(one.parameter): one.parameter for bucket in self._buckets for one in bucket.slices}.values():
                parameter.register_post_accumulate_grad_hook(self._came)  # type: ignore[no-untyped-call]
            self._hooked = True
        self._sending = True
        try:
            yield
        finally:
            self._sending = False

    def _came(self, parameter: Tensor) -> None:
        if not self._sending:
            return
        for number in self._needs[id(parameter)]:
            self._missing[number] -= 1
        while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] == 0:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        bucket = self._buckets[len(self._sent)]
        flat = torch.cat([_gradient(one) for one in bucket.slices])
        if bucket.owner is None:
            work = dist.all_reduce(flat, group=self._axis.group, async_op=True)
        else:
            work = dist.reduce(flat, group=self._axis.group, group_dst=bucket.owner, async_op=True)
        self._sent.append((bucket, flat, work))
        for one in bucket.slices:
            self._unsent[id(one.parameter)] -= 1
            if self._free and not self._unsent[id(one.parameter)]:
                one.parameter.grad = None

    def finish(self) -> None:
        """Send what has not left, and wait until all has come."""
        while len(self._sent) < len(self._buckets):
            self._send()
        for bucket, flat, work in self._sent:
            work.wait()
            if bucket.owner in (None, self._axis.rank):
                self._arrived(bucket, flat)
        self._begin()


def _gradient(one: Slice) -> Tensor:
    grad = one.parameter.grad
    if grad is None:  # nothing here looked at it, others may have
        return torch.zeros(one.stop - one.start, dtype=one.parameter.grad_dtype or one.parameter.dtype, device=one.parameter.device)
    return grad.reshape(-1)[one.start : one.stop]


def unpack(bucket: Bucket, flat: Tensor) -> Iterator[tuple[Slice, Tensor]]:
    """The slices of a bucket with what belongs to them."""
    return zip(bucket.slices, torch.split(flat, [one.stop - one.start for one in bucket.slices]), strict=True)


@torch.no_grad()
def add_up(grads: Sequence[Tensor], axis: Axis) -> None:
    """Of each gradient the sum over the ranks, in its place; all ranks have the same ones."""
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat, group=axis.group)
    for grad, total in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
        grad.copy_(total.view(grad.shape))
