"""What a method is: arithmetic on fp32 tensors, in place, and the names of what it remembers.

A method knows nothing of bf16, of eight bits, of files or of devices: `storage` hands it fp32 views or copies and takes them back. So each
method is written once, reads like its paper, and every combination of method and storage exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Slot(NamedTuple):
    """One thing that a method remembers of a parameter.

    `shape` is the parameter's, but for `small` slots, which are always fp32. `signed` false promises numbers that are never negative.
    """

    name: str
    shape: torch.Size
    signed: bool = True
    small: bool = False


@dataclass(frozen=True, slots=True)
class At:
    """Where in the run an update happens: the rate, the share of weights that decays per rate, and the parameter's step, from 1."""

    lr: float
    weight_decay: float
    step: int

    @property
    def keep(self) -> float:
        """What decoupled decay multiplies the weights with."""
        return 1.0 - self.lr * self.weight_decay


class Method(Protocol):
    """The update rule of one kind.

    `elementwise` methods get flat segments of a parameter, any number of elements at a time; the others get the whole of it in its shape.
    """

    elementwise: bool

    def slots(self, shape: torch.Size) -> tuple[Slot, ...]:
        """What is remembered of a parameter of this shape; zeros at first."""
        ...

    def update(self, w: Tensor, g: Tensor, state: list[Tensor], at: At) -> None:
        """Change weights `w` and `state` in place; `g` is only read. All fp32, on one device."""
        ...
