"""In which numbers a step computes: casts around the model, and the scale that keeps fp16 gradients within their range."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from gemel.config.train import BF16, FP16, FP32, Precision


class Numbers:
    """The type of products, and what the loss is multiplied with before the backward pass.

    scale  changes when gradients overflow, or have not for long (fp16); else 1
    """

    def __init__(self, config: Precision, device: torch.device):
        self._config, self._device = config, device
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
        return nullcontext() if isinstance(self._config, FP32) else torch.autocast(self._device.type, self.dtype)

    def observe(self, finite: bool) -> bool:
        """Learn whether a step's gradients were finite. True if they were not because of the scale, which is now smaller."""
        if not isinstance(self._config, FP16):
            return False
        if not finite:
            self.scale, self._calm_steps = self.scale / 2, 0
            return self.scale >= 1
        self._calm_steps += 1
        if self._calm_steps >= self._config.growth_steps:
            self.scale, self._calm_steps = self.scale * 2, 0
        return False

    def state_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return {"scale": self.scale, "calm_steps": self._calm_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """The way back."""
        self.scale, self._calm_steps = state["scale"], int(state["calm_steps"])
