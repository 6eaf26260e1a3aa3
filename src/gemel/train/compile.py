"""Blocks compiled by torch: what lies between products becomes one kernel instead of many passes over memory.

All blocks run the same lines, so they are compiled once, in two pieces: before attention and behind it. Attention itself is left alone.
Which documents lie where is different in every step, and compiled code would be compiled anew for each; and it has kernels of its own.

Inductor, torch's compiler, keeps what it made in a folder. Here that is Gemel's cache, so that the second run on a machine finds it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gemel.config.compute import Compile, NoCompile
from gemel.config.env import env
from gemel.config.errors import UnsupportedError
from gemel.model.attend import Attend
from gemel.model.attention import Rotation
from gemel.model.model import Model

CACHE = "TORCHINDUCTOR_CACHE_DIR"  # read by torch when it compiles; whoever has set it keeps it
Forward = Callable[[Tensor, Rotation | None, Attend], Tensor]


def apply(config: Compile, model: Model, device: torch.device) -> None:
    """Let blocks be compiled when they are first used. `UnsupportedError` where there is nothing to compile with."""
    if isinstance(config, NoCompile):
        return
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise UnsupportedError(
            "compile.kind = 'blocks' needs a C++ compiler, and there is neither g++ nor clang++; install one, or take 'none'"
        )
    import torch._dynamo.config as dynamo

    os.environ.setdefault(CACHE, str(env().cache / "compiled"))
    dynamo.allow_unspec_int_on_nn_module = True  # or every block would be compiled by itself, because its number is another
    for block in model.layers:
        block.forward = partial(_run, torch.compile(block.forward))


def _run(forward: Forward, x_TD: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
    return forward(x_TD, rotation, _Apart(attend))


class _Apart:
    """An `Attend` that compiled code calls and does not look into."""

    def __init__(self, attend: Attend):
        self._attend = attend

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """See `Attend`."""
        return self._attend(layer, q_TNH, k_TKH, v_TKH)
