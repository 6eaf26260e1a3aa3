"""In which numbers a step computes: the type of parameters and products, and the scale that keeps fp16 gradients within their range.

Two ways lead to products in bf16. With parameters in fp32 they are cast each time they are used (autocast), and norms, residual stream and
loss stay in fp32. With parameters in bf16 (`optim.weights` "master" or "stochastic") everything but the loss is in bf16, nothing is cast,
and what bf16 cannot hold of a weight is the optimizer's affair; gradients of several micro-batches then add up in fp32.

In fp8 the blocks' products are torchao's, which scales both factors of each, in all three products of a training step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from gemel.config.compute import BF16, FP8, FP16, FP32, Precision
from gemel.config.errors import ConfigError, UnsupportedError
from gemel.config.optim import OptimConfig
from gemel.model.leaves.linear import Linear, replace
from gemel.model.model import Model


def parameter_dtype(config: OptimConfig) -> torch.dtype:
    """What parameters are while they are trained."""
    return torch.float32 if config.weights == "fp32" else torch.bfloat16


def add_up_in_fp32(parameters: Iterable[nn.Parameter]) -> None:
    """Let gradients of narrow parameters be fp32, as sums of several narrow gradients should be. Costs memory only while there are any."""
    for parameter in parameters:
        if parameter.dtype != torch.float32:
            parameter.grad_dtype = torch.float32


def in_fp8(config: FP8, model: Model, device: torch.device, emulate: bool = False) -> None:
    """Let the products of the blocks be done in fp8. `emulate` rounds as that does and multiplies in fp32, on any device.

    Raises `UnsupportedError` without torchao or a GPU that has such products, `ConfigError` for a matrix that is no multiple of 16.
    """
    try:
        from torchao.float8 import Float8LinearConfig
        from torchao.float8.float8_linear import Float8Linear
    except ImportError:
        raise UnsupportedError("precision.kind = 'fp8' needs a package: pip install torchao; or take kind = 'bf16'") from None
    if not emulate and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise UnsupportedError(f"precision.kind = 'fp8' needs a GPU of compute capability 8.9 or more, not {device}; take kind = 'bf16'")
    how = dataclasses.replace(Float8LinearConfig.from_recipe_name(config.scaling), emulate=emulate)

    def make(leaf: nn.Module) -> nn.Module:
        assert isinstance(leaf, Linear)
        if leaf.in_features % 16 or leaf.out_features % 16:
            raise ConfigError(
                f"a matrix of {leaf.out_features} x {leaf.in_features} cannot be multiplied in fp8, which takes multiples of 16; choose "
                "other widths in model.config, or precision.kind = 'bf16'"
            )
        made: nn.Module = Float8Linear.from_float(leaf, config=how)
        made.sections = leaf.sections  # type: ignore[assignment]
        return made

    replace(model, "layers.*", make)


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
            case BF16() | FP8():
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
