"""Where weights and optimizer state are stored, and how they come as fp32 and go back.

A store is read and written in stretches of elements, so that what is unpacked at any time is a few megabytes, not a second copy of the
model. Each of them reads the numbers that it was given, within its precision, and holds nothing else.

| store | bytes per element | for |
|---|---|---|
| `Plain` | 4 | weights and state in fp32 |
| `Halved` | 2 + 2 | bf16 weights whose missing 16 bits the optimizer keeps |
| `Rounded` | 2 | bf16 weights, bf16 state |
| `Blocks` | 1.016 | 8-bit state |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gemel.ops.adamw import Draws, Stored
from gemel.train.optim import dynamic, noise

Allocate = Callable[[str, int, torch.dtype], Tensor]  # name, elements, type: zeros


class Store(Protocol):
    """Elements of one tensor, flat. `kept` is what a checkpoint needs beside the parameters, by a suffix to the name."""

    kept: dict[str, Tensor]

    def read(self, start: int, stop: int) -> Tensor:
        """Elements as fp32: the memory itself, or a copy."""
        ...

    def write(self, start: int, x: Tensor, key: int, offset: int = 0) -> None:
        """Put back what `read` gave, changed. How numbers are rounded where that is left to chance, `key` decides, and how far behind the
        place that it belongs to they begin.
        """
        ...


class Plain:
    """fp32 in memory. Reading gives the memory itself, so writing has nothing to do."""

    def __init__(self, data: Tensor, kept: bool = True):
        self._data = data
        self.kept = {"": data} if kept else {}

    def read(self, start: int, stop: int) -> Tensor:
        """See `Store.read`."""
        return self._data[start:stop]

    def write(self, start: int, x: Tensor, key: int, offset: int = 0) -> None:
        """Nothing."""

    def stored(self, start: int, stop: int, draws: Callable[[], Draws]) -> Stored:  # noqa: ARG002
        """For an optimizer that reads and writes in one pass."""
        return Stored(self._data[start:stop])


class Halved:
    """bf16 weights and, apart from them, the lower halves of their fp32 patterns.

    The parameter is the fp32 number rounded to bf16 (halves away from zero), and the lower half, read as a signed integer, is what is
    missing. Together they are the number, exactly, in 4 bytes: those who keep an fp32 copy beside the bf16 weights pay 6. And if somebody
    loads other weights into the parameter, the lower half is off by half a unit in the last place, where a copy would have brought the old
    weights back.
    """

    def __init__(self, data: Tensor, low: Tensor):
        self._data, self._high, self._low = data, data.view(torch.int16), low
        self.kept = {"low": low}

    def read(self, start: int, stop: int) -> Tensor:
        """See `Store.read`."""
        bits = self._high[start:stop].to(torch.int32).bitwise_left_shift_(16)
        return bits.add_(self._low[start:stop]).view(torch.float32)

    def write(self, start: int, x: Tensor, key: int, offset: int = 0) -> None:  # noqa: ARG002
        """See `Store.write`."""
        stop, bits = start + x.numel(), x.view(torch.int32)
        self._high[start:stop] = (bits + 0x8000).bitwise_right_shift_(16)
        self._low[start:stop] = bits  # narrowing keeps the lower 16 bits

    def stored(self, start: int, stop: int, draws: Callable[[], Draws]) -> Stored:  # noqa: ARG002
        """For an optimizer that reads and writes in one pass."""
        return Stored(self._data[start:stop], low=self._low[start:stop])


class Rounded:
    """bf16 alone, rounded up or down at random, with the probability that makes the mean right.

    To the nearest, a weight of 1 would never move by less than 2^-8, and an average with beta = 0.999 would stand still: each of its
    steps is less than half of what bf16 can express (Gupta et al. 2015, arXiv 1502.02551).
    """

    def __init__(self, data: Tensor, kept: bool = True):
        self._data = data
        self.kept = {"": data} if kept else {}

    def read(self, start: int, stop: int) -> Tensor:
        """See `Store.read`."""
        return self._data[start:stop].float()

    def write(self, start: int, x: Tensor, key: int, offset: int = 0) -> None:
        """See `Store.write`."""
        assert offset == 0 or offset + x.numel() <= noise.TABLE, "a stretch of the whole ends within this one"
        for at in range(0, x.numel(), noise.TABLE):
            bits = x[at : at + noise.TABLE].view(torch.int32)
            drawn = noise.sixteen_bits(noise.key(key, at), bits.numel(), bits.device, offset)
            self._data[start + at : start + at + bits.numel()].view(torch.int16).copy_(drawn.add_(bits).bitwise_right_shift_(16))

    def stored(self, start: int, stop: int, draws: Callable[[], Draws]) -> Stored:
        """For an optimizer that reads and writes in one pass. The keys are those that `write` would get for each stretch."""
        keys, offset, length = draws()
        return Stored(self._data[start:stop], draws=Draws(tuple(noise.key(key, 0) for key in keys), offset, length))


class Blocks:
    """Eight bits per element and an fp32 scale per 256, see `dynamic`. Stretches must begin at a multiple of 256."""

    def __init__(self, codes: Tensor, scales: Tensor, num: int, signed: bool):
        self._codes, self._scales, self._signed = codes, scales, signed
        self.kept = {"codes": codes[:num], "scales": scales}

    @classmethod
    def allocate(cls, allocate: Allocate, name: str, num: int, signed: bool) -> Blocks:
        """Zeros. The last block is filled up."""
        num_blocks = -(-num // dynamic.BLOCK)
        codes = allocate(f"{name}.codes", num_blocks * dynamic.BLOCK, torch.uint8)
        codes.fill_(int(dynamic.code(signed, codes.device).nearest[0]))
        return cls(codes, allocate(f"{name}.scales", num_blocks, torch.float32), num, signed)

    def read(self, start: int, stop: int) -> Tensor:
        """See `Store.read`."""
        first, last = start // dynamic.BLOCK, -(-stop // dynamic.BLOCK)
        codes = self._codes[first * dynamic.BLOCK : last * dynamic.BLOCK]
        return dynamic.decode(codes, self._scales[first:last], self._signed)[: stop - start]

    def write(self, start: int, x: Tensor, key: int, offset: int = 0) -> None:  # noqa: ARG002
        """See `Store.write`."""
        padded = F.pad(x, (0, -x.numel() % dynamic.BLOCK)) if x.numel() % dynamic.BLOCK else x
        codes, scales = dynamic.encode(padded, self._signed)
        self._codes[start : start + codes.numel()] = codes
        self._scales[start // dynamic.BLOCK : start // dynamic.BLOCK + scales.numel()] = scales
