"""The binding of what training needs of the CPU kernels (train.h): tensors in, tensors out, no gradients yet.

Tensors are fp32 or bf16 on the CPU, and the numbers of a row are contiguous; whoever calls has seen to that (`gemel.ops.train`).
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
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


class PackedAttention(Structure):
    """gemel_packed_attention."""

    _fields_ = [
        *((name, c_int32) for name in ("num_documents", "num_heads", "num_kv_heads", "width", "format", "window")),
        *(("scale", c_float), ("reserved", c_int32), ("starts", c_void_p), ("slopes", c_void_p)),
        *((name, c_int64) for name in ("ld_q", "ld_k", "ld_v", "ld_d_out")),
        *((name, c_void_p) for name in ("q", "k", "v", "out", "lse", "d_out", "d_q", "d_k", "d_v")),
    ]


class Rows(Structure):
    """gemel_rows."""

    _fields_ = [("data", c_void_p), ("ld", c_int64)]


class RMSNorm(Structure):
    """gemel_rms_norm."""

    _fields_ = [
        *((name, c_int32) for name in ("num_rows", "group", "width", "format")),
        *(("eps", c_float), ("reserved", c_int32)),
        *(("x", Rows), ("d_y", Rows)),
        *((name, c_void_p) for name in ("scale", "factor", "y", "d_x", "d_scale")),
    ]


class Rope(Structure):
    """gemel_rope."""

    _fields_ = [
        *((name, c_int32) for name in ("num_rows", "group", "width", "format", "back", "reserved")),
        *(("x", Rows), ("cosines", c_void_p), ("sines", c_void_p), ("ld_angles", c_int64), ("y", c_void_p)),
    ]


class SwiGLU(Structure):
    """gemel_swiglu."""

    _fields_ = [
        *((name, c_int32) for name in ("num_rows", "width", "format", "reserved")),
        *(("x", Rows), ("d_y", Rows), ("y", c_void_p)),
    ]


class Stored(Structure):
    """gemel_stored."""

    _fields_ = [("data", c_void_p), ("low", c_void_p), ("format", c_int32), ("place", c_int32), ("mix", c_int32 * 2)]


class AdamWPart(Structure):
    """gemel_adamw_part."""

    _fields_ = [
        ("count", c_int64),
        *((name, Stored) for name in ("weight", "first", "second")),
        *(("gradient", c_void_p), ("gradient_format", c_int32), ("reserved", c_int32)),
    ]


class AdamW(Structure):
    """gemel_adamw."""

    _fields_ = [*((name, c_float) for name in ("keep", "rest1", "beta2", "rest2", "root", "eps", "step", "shrink")), ("table", c_void_p)]


# name: (result, arguments)
_SIGNATURES = {
    "gemel_workshop_new": (c_void_p, [c_int32]),
    "gemel_workshop_free": (None, [c_void_p]),
    "gemel_gemm": (None, [c_void_p, c_int32, c_int32, c_int32, c_void_p, c_void_p, c_void_p, c_int64, c_int32, c_int32]),
    "gemel_adamw_step": (None, [c_void_p, c_void_p, c_int32, c_void_p]),
    **{
        f"gemel_{name}": (None, [c_void_p, c_void_p])
        for name in (
            *("head_cross_entropy", "packed_attention_forward", "packed_attention_backward"),
            *("rms_norm_forward", "rms_norm_backward", "rope_turn", "swiglu_run"),
        )
    },
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
        """The product a b, or, in fp32, what it is added to. Either factor may be a transposed view."""
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

    def packed_attention(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, starts: Tensor, window: int, slopes_N: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Outputs [T, N, H], and the base-2 logarithms of the sums of softmax [N, T]. `starts` int32, `slopes_N` fp32; window 0 is none."""
        out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype)
        lse_NT = torch.empty(q_TNH.shape[1], q_TNH.shape[0])
        job = _attention(q_TNH, k_TKH, v_TKH, starts, window, slopes_N, out_TNH, lse_NT)
        self._call("gemel_packed_attention_forward", ctypes.byref(job))
        return out_TNH, lse_NT

    def packed_attention_backward(
        self,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        starts: Tensor,
        window: int,
        slopes_N: Tensor | None,
        out_TNH: Tensor,
        lse_NT: Tensor,
        d_out_TNH: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of queries, keys and values."""
        gradients = tuple(torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (q_TNH, k_TKH, v_TKH))
        job = _attention(q_TNH, k_TKH, v_TKH, starts, window, slopes_N, out_TNH, lse_NT)
        job.d_out, job.ld_d_out = d_out_TNH.data_ptr(), d_out_TNH.stride(0)
        job.d_q, job.d_k, job.d_v = map(_address, gradients)
        self._call("gemel_packed_attention_backward", ctypes.byref(job))
        return gradients[0], gradients[1], gradients[2]

    def rms_norm(self, x: Tensor, scale_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The result, and the factor of each row. `scale_D` fp32."""
        job = _norm(x, scale_D)
        y, factor = torch.empty(x.shape, dtype=x.dtype), torch.empty(job.num_rows)
        job.eps, job.y, job.factor = eps, y.data_ptr(), factor.data_ptr()
        self._call("gemel_rms_norm_forward", ctypes.byref(job))
        return y, factor

    def rms_norm_backward(self, x: Tensor, scale_D: Tensor, factor: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of what was normed and of the scale (fp32)."""
        job = _norm(x, scale_D)
        d_x, d_scale_D = torch.empty(x.shape, dtype=x.dtype), torch.empty_like(scale_D)
        job.d_y, job.factor = _rows_of(d_y), factor.data_ptr()
        job.d_x, job.d_scale = d_x.data_ptr(), d_scale_D.data_ptr()
        self._call("gemel_rms_norm_backward", ctypes.byref(job))
        return d_x, d_scale_D

    def rope(self, x_TMH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor, *, back: bool) -> Tensor:
        """Heads rotated, or a gradient rotated back. The angles have one stride."""
        y_TMH = torch.empty(x_TMH.shape, dtype=x_TMH.dtype)
        num_tokens, group, width = x_TMH.shape
        job = Rope(num_tokens * group, group, width, FORMATS[x_TMH.dtype], back, 0, _rows_of(x_TMH))
        job.cosines, job.sines, job.ld_angles = cos_T1H.data_ptr(), sin_T1H.data_ptr(), cos_T1H.stride(0)
        job.y = y_TMH.data_ptr()
        self._call("gemel_rope_turn", ctypes.byref(job))
        return y_TMH

    def swiglu(self, gate_up_T2F: Tensor, d_y_TF: Tensor | None = None) -> Tensor:
        """silu(gate) * up, or, with the gradient of that, the gradient of gate and up."""
        num_rows, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
        y = torch.empty(num_rows, width if d_y_TF is None else 2 * width, dtype=gate_up_T2F.dtype)
        job = SwiGLU(num_rows, width, FORMATS[y.dtype], 0, _rows_of(gate_up_T2F), _rows_of(d_y_TF), y.data_ptr())
        self._call("gemel_swiglu_run", ctypes.byref(job))
        return y

    def adamw(self, how: AdamW, parts: Sequence[AdamWPart]) -> None:
        """One step of the optimizer over all parts."""
        self._call("gemel_adamw_step", ctypes.byref(how), len(parts), (AdamWPart * len(parts))(*parts))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, starts: Tensor, window: int, slopes_N: Tensor | None, out_TNH: Tensor, lse_NT: Tensor
) -> PackedAttention:
    _, num_heads, width = q_TNH.shape
    return PackedAttention(
        *(len(starts) - 1, num_heads, k_TKH.shape[1], width, FORMATS[q_TNH.dtype], window, width**-0.5, 0),
        *map(_address, (starts, slopes_N)),
        *(q_TNH.stride(0), k_TKH.stride(0), v_TKH.stride(0), 0),
        *map(_address, (q_TNH, k_TKH, v_TKH, out_TNH, lse_NT)),
    )


def _norm(x: Tensor, scale_D: Tensor) -> RMSNorm:
    width, group = x.shape[-1], x.shape[1] if x.dim() == 3 else 1
    return RMSNorm(x.numel() // width, group, width, FORMATS[x.dtype], x=_rows_of(x), scale=scale_D.data_ptr())


def _rows_of(tensor: Tensor | None) -> Rows:
    return Rows() if tensor is None else Rows(tensor.data_ptr(), tensor.stride(0))


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
