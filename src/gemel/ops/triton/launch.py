"""What all launches share: layouts that the kernels can read, and how many warps a program gets."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_BLOCK = 32768  # numbers that one program can hold in registers: 32 warps of 32 threads, 32 numbers each


def dense_tokens(tensor: Tensor) -> Tensor:
    """The tensor itself if the numbers of a token follow one another, else a copy; tokens may be apart."""
    step = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size > 1 and stride != step:
            return tensor.contiguous()
        step *= size
    return tensor


def on_device_of(tensor: Tensor) -> torch.cuda.device_of:
    """A context in which launches go to the tensor's device: Triton launches on the current one, whatever it is given."""
    return torch.cuda.device_of(tensor)


def warps(block: int) -> int:
    """Warps for a block of numbers that are loaded at once: about 32 numbers a thread, which leaves registers for what becomes of them."""
    return min(max(block // 1024, 1), 32)


def cut(sizes: Tensor, piece: int) -> tuple[Tensor, Tensor]:
    """Everything cut into pieces of equal size: for each piece, what it is of and the how-manieth of that it is."""
    num_pieces = (sizes + piece - 1) // piece
    which = torch.arange(len(sizes)).repeat_interleave(num_pieces)
    return which, torch.arange(len(which)) - (num_pieces.cumsum(0) - num_pieces)[which]
