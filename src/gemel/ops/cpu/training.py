"""The binding of what training needs of the CPU kernels (train.h): tensors in, tensors out, no gradients yet.

Tensors are fp32 or bf16 on the CPU, and the numbers of a row are contiguous; whoever calls has seen to that (`gemel.ops.train`).
"""

from __future__ import annotations

import ctypes
import functools
import threading
from ctypes import Structure, c_double, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from gemel.ops.cpu import native

FORMATS = {torch.float32: native.F32, torch.bfloat16: native.BF16}


class Factor(Structure):
    """gemel_factor."""

    _fields_ = [("data", c_void_p), ("ld", c_int64), ("format", c_int32), ("transposed", c_int32)]


class HeadLoss(Structure):
    """gemel_head_loss."""

    _fields_ = [
        *((name, c_int32) for name in ("num_tokens", "vocab", "width", "format")),
        *((name, c_float) for name in ("z_loss", "label_smoothing")),
        *((name, c_int64) for name in ("ld_hidden", "ld_weight")),
        *((name, c_void_p) for name in ("hidden", "weight", "targets", "weights", "d_hidden", "d_weight")),
        *((name, c_double) for name in ("loss", "z")),
    ]


# name: (result, arguments)
_SIGNATURES = {
    "gemel_workshop_new": (c_void_p, [c_int32]),
    "gemel_workshop_free": (None, [c_void_p]),
    "gemel_gemm": (None, [c_void_p, c_int32, c_int32, c_int32, c_void_p, c_void_p, c_void_p, c_int64, c_int32, c_int32]),
    "gemel_head_cross_entropy": (None, [c_void_p, c_void_p]),
}


class Kernels:
    """A library and a team of threads of its own. Calls take turns, whoever makes them; the interpreter's lock is not held meanwhile."""

    def __init__(self, library: ctypes.CDLL, threads: int):
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._library, self._turn = library, threading.Lock()
        self._workshop = library.gemel_workshop_new(threads)

    def _call(self, name: str, *arguments: object) -> None:
        with self._turn:
            getattr(self._library, name)(self._workshop, *arguments)

    def close(self) -> None:
        """End the threads. Nothing may be called afterwards."""
        self._library.gemel_workshop_free(self._workshop)

    def gemm(self, a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, *, add: bool = False) -> Tensor:
        """out = a b, or, in fp32, out += a b. Either factor may be a transposed view."""
        a, b = _factor(a_MK), _factor(b_KN)
        shape = (*a_MK.shape[:1], *b_KN.shape[::-1])
        out = (out_MN.data_ptr(), out_MN.stride(0), FORMATS[out_MN.dtype])
        self._call("gemel_gemm", shape[0], shape[1], shape[2], ctypes.byref(a), ctypes.byref(b), *out, add)
        return out_MN

    def head_cross_entropy(
        self,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        weights_T: Tensor,
        z_loss: float,
        label_smoothing: float,
        d_hidden_TD: Tensor | None,
        d_weight_VD: Tensor | None,
    ) -> tuple[float, float]:
        """The loss and how much of it is z-loss; fills the gradients that are given. Targets are int32, weights and d_weight fp32."""
        job = HeadLoss(
            *(*hidden_TD.shape[:1], *weight_VD.shape, FORMATS[hidden_TD.dtype], z_loss, label_smoothing),
            *(hidden_TD.stride(0), weight_VD.stride(0)),
            *map(_address, (hidden_TD, weight_VD, targets_T, weights_T, d_hidden_TD, d_weight_VD)),
        )
        self._call("gemel_head_cross_entropy", ctypes.byref(job))
        return job.loss, job.z


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _factor(matrix: Tensor) -> Factor:
    transposed = matrix.stride(1) != 1
    return Factor(matrix.data_ptr(), matrix.stride(0 if not transposed else 1), FORMATS[matrix.dtype], transposed)


def kernels() -> Kernels | None:
    """The kernels with as many threads as torch has now, or None where there are none."""
    return _with_threads(torch.get_num_threads())


@functools.cache
def _with_threads(threads: int) -> Kernels | None:
    library, _ = native.find()
    return None if library is None or not hasattr(library, "gemel_workshop_new") else Kernels(library, threads)
