"""One native matrix product by itself, with random weights that are packed as the engine packs them: for peaks and `bench/kernels.py`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from gemel.ops.cpu import native

FORMATS = {"float32": native.F32, "bfloat16": native.BF16, "int8": native.I8, "int4": native.I4}
GROUP = 32  # along a row, of int4 weights that share a scale


class Team:
    """Threads of the native kernels. `close` ends them."""

    def __init__(self, library: ctypes.CDLL, threads: int):
        self.library = library
        self.handle: int = library.gemel_team_new(threads)

    def close(self) -> None:
        """End the threads; products of this team must not run any more."""
        self.library.gemel_team_free(self.handle)


class Product:
    """x W^T for a random W [n, k]. `quantize` rounds activations to int8 where the weights are low-bit.

    `values`, `scales` are what was packed: W itself, or whole numbers and the scales to multiply them with.
    """

    def __init__(self, team: Team, weights: str, n: int, k: int, *, quantize: bool = True, seed: int = 0):
        self.team, self.n, self.k = team, n, k
        generator = torch.Generator().manual_seed(seed)
        self.values, self.scales = _random(weights, n, k, generator)
        self._weight = native.Weight(format=FORMATS[weights], n=n, k=k)
        self._weight.group = GROUP if weights == "int4" else 0
        self._weight.quantize = int(quantize and weights in ("int8", "int4"))
        reference = ctypes.byref(self._weight)
        self.packed = torch.zeros(int(team.library.gemel_packed_bytes(reference)), dtype=torch.uint8)
        scales = None if self.scales is None else self.scales.data_ptr()
        team.library.gemel_pack(None, reference, self.values.data_ptr(), scales, None, self.packed.data_ptr())
        self._weight.packed = self.packed.data_ptr()

    def another(self) -> Product:
        """The same weights at another address, so that reading them finds no cache warm."""
        twin = object.__new__(Product)
        twin.__dict__ |= self.__dict__
        twin.packed = self.packed.clone()
        twin._weight = native.Weight.from_buffer_copy(self._weight)
        twin._weight.packed = twin.packed.data_ptr()
        return twin

    @property
    def read_bytes(self) -> int:
        """Memory of the packed weight."""
        return self.packed.numel()

    def __call__(self, x_MK: Tensor, y_MN: Tensor) -> None:
        """Multiply fp32 [M, k] into fp32 [M, n]."""
        address = ctypes.byref(self._weight)
        self.team.library.gemel_matmul(self.team.handle, address, x_MK.data_ptr(), len(x_MK), y_MN.data_ptr(), native.STORE)


def _random(weights: str, n: int, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    if weights in ("float32", "bfloat16"):
        return torch.randn(n, k, generator=generator).to(getattr(torch, weights)), None
    if weights == "int8":
        return torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8), torch.full((n,), 0.01)
    return torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8), torch.full((n, k // GROUP), 0.1)
