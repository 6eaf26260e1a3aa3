"""The operations of training on GPUs, in Triton (Tillet, Kung and Cox 2019): names, arguments and results are those of `gemel.ops.train`,
whose torch versions are the truth here too.

Nothing is autotuned. What a tuner picks depends on the noise of its timings, and the order of sums on what it picks: two runs of one
recipe would differ, and a resumed run from an uninterrupted one. Tile sizes are constants with reasons, and sums across programs are done
in a fixed order, never by atomics, so that a GPU gives the same bits every time.

Triton is optional: without it, or on devices that it does not compile for, torch does the work, and `gemel doctor` says so. Importing this
package imports neither triton nor the kernels; that waits for the first tensors that they can take.
"""

from __future__ import annotations

import functools
import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gemel.ops.triton.activation import swiglu
    from gemel.ops.triton.attention import packed_attention
    from gemel.ops.triton.head_loss import head_cross_entropy
    from gemel.ops.triton.norm import rms_norm
    from gemel.ops.triton.optimizer import adamw
    from gemel.ops.triton.rotary import rope

__all__ = ["adamw", "head_cross_entropy", "packed_attention", "rms_norm", "rope", "swiglu", "takes", "why_not"]

DEVICE = "cuda"  # as torch calls NVIDIA's and AMD's
MISSING = "triton is not installed"
FORMATS = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)  # the oldest that Triton supports; bf16 products came with it

_MODULES = {
    "packed_attention": "attention",
    "head_cross_entropy": "head_loss",
    "rms_norm": "norm",
    "rope": "rotary",
    "swiglu": "activation",
    "adamw": "optimizer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    operation = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = operation
    return operation


def takes(*tensors: Tensor | None) -> bool:
    """Whether the operations can take these tensors: plain ones on one GPU, all of one of `FORMATS`, not empty, not being compiled."""
    first = next(tensor for tensor in tensors if tensor is not None)
    if first.device.type != DEVICE or first.dtype not in FORMATS or torch.compiler.is_compiling() or why_not(first.device) is not None:
        return False
    return all(
        type(tensor) in (Tensor, torch.nn.Parameter)
        and (tensor.device, tensor.dtype, tensor.layout) == (first.device, first.dtype, torch.strided)
        and tensor.numel() > 0
        for tensor in tensors
        if tensor is not None
    )


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot run on this GPU, or None if they can."""
    if find_spec("triton") is None:
        return MISSING
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}, Triton supports {CAPABILITY[0]}.{CAPABILITY[1]} and later"
    return None
