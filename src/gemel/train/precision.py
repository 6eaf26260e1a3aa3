"""In which numbers a step computes: the type of parameters and products, and the scale that keeps fp16 gradients within their range.

Two ways lead to products in bf16. With parameters in fp32 they are cast each time they are used (autocast), and norms, residual stream and
loss stay in fp32. With parameters in bf16 (`optim.weights` "master" or "stochastic") everything but the loss is in bf16, nothing is cast,
and what bf16 cannot hold of a weight is the optimizer's affair; gradients of several micro-batches then add up in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from gemel.config.optim import OptimConfig
from gemel.config.train import BF16, FP16, FP32, Precision


def parameter_dtype(config: OptimConfig) -> torch.dtype:
    """What parameters are while they are trained."""
    return torch.float32 if config.weights == "fp32" else torch.bfloat16


def add_up_in_fp32(parameters: Iterable[nn.Parameter]) -> None:
    """Let gradients of narrow parameters be fp32, as sums of several narrow gradients should be. Costs memory only while there are any."""
    for parameter in parameters:
        if parameter.dtype != torch.float32:
            parameter.grad_dtype = torch.float32


class Numbers:
    """What the forward pass runs in, and what the loss is multiplied with before the backward pass.

    scale  changes when gradients overflow, or have not for long (fp16); else 1
    """

    def __init__(self, config: Precision, parameters: torch.dtype, device: torch.device):
        self._config, self._parameters, self._device = config, parameters, device
        self.scale = config.initial_scale if isinstance(config, FP16) else 1.0
        self._calm_steps = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of products."""
        match self._config:
            case FP32():
                return torch.float32
            case BF16():
                return torch.bfloat16
            case FP16():
                return torch.float16

    def cast(self) -> AbstractContextManager[Any]:
        """What the forward pass runs in."""
        return nullcontext() if self.dtype == self._parameters else torch.autocast(self._device.type, self.dtype)

    def overflowed(self, finite: bool) -> bool:
        """Learn whether a step's gradients were finite. True if they were not, and a smaller scale may be all that it takes."""
        if not isinstance(self._config, FP16):
            return False
        self._calm_steps = self._calm_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self._calm_steps == self._config.growth_steps:
            self.scale, self._calm_steps = self.scale * 2, 0
        return not finite and self.scale >= 1

    def state_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return {"scale": self.scale, "calm_steps": self._calm_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """The way back."""
        self.scale, self._calm_steps = state["scale"], int(state["calm_steps"])
